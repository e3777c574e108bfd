"""Checks of the scores that a profile asks for beside those of single blocks: of runs, and on tasks."""

import math

import dagster as dg

from assets.checking import Body, check_of, check_result
from assets.costs import parent_block
from assets.plan import Plan
from assets.watches import watch_run_scores
from puzzle_dag.architecture import Run
from resources.workspace import Workspace


def _runs_are_sound(plan: Plan) -> Body:
    def body(context: dg.AssetCheckExecutionContext, workspace: Workspace) -> dg.AssetCheckResult:
        rows = workspace.shelf.value("run_scores", context.partition_key)["scores"]
        wrong = [
            r["run"]
            for r in rows
            if not (math.isfinite(r["kl"]) and r["kl"] >= 0 and math.isfinite(r["lm_loss"]) and 0 <= r["top1_agreement"] <= 1)
            or r["blocks"] != " ".join(block.name for block in Run.parse(r["run"]).blocks(parent_block(plan)))
        ]
        missing = set(watch_run_scores(plan, workspace, context.partition_key)["runs"]) - {r["run"] for r in rows}
        return check_result(
            not wrong and not missing, unsound=", ".join(wrong) or "none", missing=", ".join(sorted(missing)) or "none", num_runs=len(rows)
        )

    return body


def _grades_are_sound(plan: Plan) -> Body:
    def body(context: dg.AssetCheckExecutionContext, workspace: Workspace) -> dg.AssetCheckResult:
        rows = workspace.shelf.value("task_scores", context.partition_key)["scores"]
        wrong = [f"{r['block']} on {r['task']}" for r in rows if not 0 <= r["value"] <= 1]
        scored = workspace.shelf.value("block_library", context.partition_key)["space"]
        pairs = {f"{a}/{f}" for a in scored["attention"] for f in scored["ffn"]}
        asked = plan.profile.task_scores.tasks if plan.profile.task_scores is not None else ()
        missing = {(block, task) for block in pairs for task in asked} - {(r["block"], r["task"]) for r in rows}
        return check_result(not wrong and not missing, unsound=", ".join(wrong) or "none", num_missing=len(missing), num_grades=len(rows))

    return body


def further_score_checks(plan: Plan) -> list[dg.AssetChecksDefinition]:
    """Return the checks of run_scores and task_scores, where the profile asks for them."""
    layers = plan.partitions.layers
    checks = {
        "run_scores": (_runs_are_sound(plan), "Every run that begins at the layer has finite scores, and the blocks that its name says."),
        "task_scores": (_grades_are_sound(plan), "Every pair of the layer has an accuracy between 0 and 1 on every task."),
    }
    return [
        check_of(plan, name, "sound", layers, checks[name][0], blocking=True, description=checks[name][1]) for name in plan.further_scores
    ]
