"""How good parent and children are: lm-eval's grades on the same items."""

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg

from assets.children import checkpoint_folder
from assets.materialise import Stopwatch, materialised, picture, table
from assets.plan import Plan
from assets.versions import stage_version
from puzzle_dag.progress import ProgressLog
from puzzle_dag.store import fingerprint, write_atomically
from resources.rows import write_rows
from resources.workspace import Workspace

if TYPE_CHECKING:
    from puzzle_dag.children.retention import MeanRetention, Perplexity, Retention

_GRADING = ["puzzle_dag.children.evaluate", "puzzle_dag.children.tasks", "puzzle_dag.children.retention"]
_RESULTS = "results.json"


def _grade(plan: Plan, workspace: Workspace, digest: str, checkpoint: Path | None) -> list[Any]:
    """Return the TaskResults of a checkpoint (of the parent where there is none), from the store where they are there."""
    from puzzle_dag.children.evaluate import TaskResult, evaluate_checkpoint, evaluate_model
    from puzzle_dag.children.tasks import item_sources

    profile = plan.profile
    versions = {s: stage_version(s) for s in _GRADING[:2]}
    inputs = {
        "versions": versions,
        "model": digest,
        "accuracy": profile.accuracy.model_dump(),
        "corpus": plan.profile.corpus.model_dump(),
        "items": item_sources(profile.accuracy.tasks),
        "seed": profile.seed,
    }

    def grade(folder: Path) -> tuple[str, dict[str, Any]]:
        data, progress = workspace.var / "tasks", ProgressLog("grading")
        options: dict[str, Any] = {"seed": profile.seed, "progress": progress}
        tasks, settings, corpus = profile.accuracy.tasks, profile.accuracy, profile.corpus
        if checkpoint is None:
            parent = workspace.load_parent()
            results = evaluate_model(parent.model, parent.tokenizer, tasks, settings, corpus, data, **options)
        else:
            results = evaluate_checkpoint(checkpoint, tasks, settings, corpus, data, device=profile.device, **options)
        content = [asdict(r) for r in results]
        write_atomically(folder / _RESULTS, json.dumps(content))
        return fingerprint(content), {}

    with workspace.device():
        made = workspace.keep("grades", inputs, grade)
    return [TaskResult(**r) for r in json.loads((made.folder / _RESULTS).read_text())]


def _result_rows(results: list[Any]) -> list[dict[str, Any]]:
    return [{k: getattr(r, k) for k in ("task", "metric", "value", "stderr", "chance", "num_items")} for r in results]


def _parent_accuracy_asset(plan: Plan) -> dg.AssetsDefinition:
    settings = {"accuracy": plan.profile.accuracy.model_dump(), "seed": plan.profile.seed}

    @dg.asset(
        **plan.options(
            "parent_accuracy",
            deps=["parent", "corpus"],
            stages=_GRADING[:2],
            settings=settings,
            kinds=("lm_eval",),
            device=True,
            description="The parent's grades in lm-eval, item by item: what children are compared with.",
        )
    )
    def parent_accuracy(context: dg.AssetExecutionContext, workspace: Workspace) -> dg.MaterializeResult:
        time = Stopwatch()
        results = _grade(plan, workspace, workspace.load_parent().digest, None)
        rows, path = _result_rows(results), workspace.var / "grades" / "parent.json"
        write_atomically(path, json.dumps([asdict(r) for r in results]))
        version = fingerprint([asdict(r) for r in results])
        files = [path, write_rows(workspace.tables / "parent_accuracy.parquet", rows)]
        metadata = {"grades": table(rows), "num_tasks": len({r["task"] for r in rows})}
        return materialised(context, plan, workspace, {"results": rows}, data_version=version, files=files, metadata=metadata, time=time)

    return parent_accuracy


def retention_metadata(scenario: str, kept: "list[Retention]", mean: "MeanRetention", floor: float) -> dict[str, Any]:
    """Return what the UI shows of a child's grades; there are bars where the parent is better than chance at a task."""
    from puzzle_dag.report.pictures import retention_bars

    shown = ("task", "parent", "child", "chance", "raw", "corrected", "corrected_stderr")
    metadata: dict[str, Any] = {
        "mean_retention": mean.value if mean.value is not None else "undefined: the parent is no better than chance",
        "mean_retention_stderr": mean.stderr if mean.stderr is not None else "undefined",
        "retention": table([{k: getattr(r, k) for k in shown} for r in kept]),
    }
    bars = {r.task: (r.corrected, r.corrected_stderr or 0.0) for r in kept if r.corrected is not None}
    if bars:
        metadata["picture"] = picture(retention_bars(bars, floor=floor, title=scenario), "retention")
    return metadata


def _accuracy_rows(scenario: str, kept: "list[Retention]", text: "list[Perplexity]") -> list[dict[str, Any]]:
    """Return the rows of the table: accuracies, then what is none, without chance and retention."""
    from puzzle_dag.children.retention import Retention

    columns = [f.name for f in fields(Retention)]
    return [{"scenario": scenario, **{c: getattr(r, c, None) for c in columns}} for r in (*kept, *text)]


def _accuracy_asset(plan: Plan) -> dg.AssetsDefinition:
    settings = {"accuracy": plan.profile.accuracy.model_dump(), "seed": plan.profile.seed}

    @dg.asset(
        **plan.options(
            "accuracy",
            deps=["uptrained_child", "parent_accuracy"],
            stages=_GRADING,
            settings=settings,
            partitions=plan.partitions.scenarios,
            kinds=("lm_eval",),
            device=True,
            description="The child's grades on the same items as the parent's, and what it retains, raw and corrected for chance.",
        )
    )
    def accuracy(context: dg.AssetExecutionContext, workspace: Workspace) -> dg.MaterializeResult:
        from puzzle_dag.children.evaluate import TaskResult
        from puzzle_dag.children.retention import mean_retention, perplexities, retention

        time, child = Stopwatch(), workspace.shelf.value("uptrained_child", context.partition_key)
        checkpoint = checkpoint_folder(workspace, "uptrained_child", child)
        results = _grade(plan, workspace, child["digest"], checkpoint)
        parent = [TaskResult(**r) for r in json.loads((workspace.var / "grades" / "parent.json").read_text())]
        kept, text = retention(parent, results), perplexities(parent, results)
        mean, rows = mean_retention(kept), [{"scenario": context.partition_key, **asdict(r)} for r in kept]
        floor = workspace.read_scenario(context.partition_key).retention_floor
        value = {
            "uptrained_child": child["digest"],
            "results": _result_rows(results),
            "retention": rows,
            "mean": asdict(mean),
            "perplexities": [asdict(p) for p in text],
        }
        path = workspace.tables / "accuracy" / f"{context.partition_key}.parquet"
        return materialised(
            context,
            plan,
            workspace,
            value,
            files=[write_rows(path, _accuracy_rows(context.partition_key, kept, text))],
            metadata={
                **retention_metadata(context.partition_key, kept, mean, floor),
                **({"perplexities": table([asdict(p) for p in text])} if text else {}),
            },
            time=time,
        )

    return accuracy


def grading_assets(plan: Plan) -> list[dg.AssetsDefinition]:
    """Return parent_accuracy and accuracy."""
    return [_parent_accuracy_asset(plan), _accuracy_asset(plan)]
