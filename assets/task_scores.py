"""Scores on tasks: what each block, alone in the parent, scores in lm-eval; only where the profile asks for them."""

from dataclasses import asdict
from typing import Any

import dagster as dg

from assets.library import space_from_json
from assets.materialise import Stopwatch, materialised, picture, table
from assets.plan import Plan
from assets.watches import watch_run_scores
from puzzle_dag.architecture import Run, layer_index
from puzzle_dag.progress import ProgressLog
from puzzle_dag.store import fingerprint
from resources.rows import write_rows
from resources.workspace import Workspace


def _metadata(rows: list[dict[str, Any]], partition: str) -> dict[str, Any]:
    from puzzle_dag.report.pictures import score_heat_map

    blocks: dict[str, dict[str, float]] = {}
    for row in rows:
        blocks.setdefault(row["block"], {})[row["task"]] = row["value"]
    parent = blocks[next(iter(blocks))]  # the parent's own block comes first
    lost = {name: sum(parent[task] - value for task, value in found.items()) / len(parent) for name, found in blocks.items()}
    pairs = {name: value for name, value in lost.items() if "/" in name}
    drawn = score_heat_map([pairs], title=partition, label="accuracy lost, mean over the tasks")
    return {
        "num_blocks": len(blocks),
        "grades": table([{"block": name, **found} for name, found in blocks.items()]),
        "picture": picture(drawn, "accuracy that each pair loses, mean over the tasks"),
    }


def task_score_assets(plan: Plan) -> list[dg.AssetsDefinition]:
    """Return task_scores, where the profile asks for them."""
    profile = plan.profile
    if profile.task_scores is None:
        return []
    settings = {"task_scores": profile.task_scores.model_dump()}
    stages = ["puzzle_dag.children.block_grades", "puzzle_dag.children.evaluate", "puzzle_dag.children.tasks"]

    @dg.asset(
        **plan.options(
            "task_scores",
            deps=["block_library", "parent", "corpus"],
            stages=stages,
            settings=settings,
            partitions=plan.partitions.layers,
            kinds=("lm_eval", "parquet"),
            device=True,
            description="Accuracy of the parent with each block of one layer in it, alone, on a few items of each task; every block and "
            "task is kept, so an interrupted run goes on.",
        )
    )
    def task_scores(context: dg.AssetExecutionContext, workspace: Workspace) -> dg.MaterializeResult:
        from puzzle_dag.children.block_grades import grade_blocks, list_replacements
        from puzzle_dag.pieces import LayerPieces

        assert profile.task_scores is not None
        layer, library = layer_index(context.partition_key), workspace.shelf.value("block_library", context.partition_key)
        runs = [Run.parse(name) for name in watch_run_scores(plan, workspace, context.partition_key)["runs"]]
        with workspace.device():
            time, parent = Stopwatch(), workspace.load_parent()
            pieces = LayerPieces.from_json(workspace.store, library["pieces"])
            grades = grade_blocks(
                parent,
                list_replacements(parent, layer, space_from_json(library["space"]), pieces, runs),
                profile.task_scores,
                profile.corpus,
                workspace.store,
                workspace.var / "task_scores",
                regrade=workspace.anew,
                progress=ProgressLog(f"task scores {context.partition_key}"),
            )
        rows = [asdict(grade) for grade in grades]
        return materialised(
            context,
            plan,
            workspace,
            {"scores": rows},
            data_version=fingerprint(rows),
            files=[write_rows(workspace.tables / "task_scores" / f"{context.partition_key}.parquet", rows)],
            metadata=_metadata(rows, context.partition_key),
            time=time,
        )

    return [task_scores]
