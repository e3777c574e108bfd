"""How fast parent and children are: vLLM's times with real weights, parent and child by turns."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import dagster as dg

from assets.children import checkpoint_folder
from assets.costs import read_cost_table
from assets.materialise import Stopwatch, materialised, table
from assets.plan import Plan
from assets.predictions import predict_seconds
from assets.refinement import chosen_solution
from assets.served import bounds_time, constraint_rows, measured_constraints, serving_batches
from assets.versions import stage_version
from puzzle_dag.progress import ProgressLog
from puzzle_dag.store import fingerprint
from resources.rows import write_rows
from resources.workspace import Workspace

_SERVING = "puzzle_dag.children.serve"


def _predict(plan: Plan, workspace: Workspace, scenario: str, target: str) -> dict[str, dict[int, float]]:
    """Return model -> batch size -> seconds of prefill and decode together, by costs that hold for the engine of today."""
    from puzzle_dag.costs.agreement import check_agreement
    from puzzle_dag.engine.client import read_engine_version

    costs = read_cost_table(workspace, target)
    check_agreement(costs, costs.target, read_engine_version())
    predicted = predict_seconds(plan, workspace, scenario, costs)
    return {model: {batch: s["prefill"] + s["decode"] for batch, s in by_batch.items()} for model, by_batch in predicted.items()}


def _serve(
    plan: Plan,
    workspace: Workspace,
    spec: dict[str, Any],
    *,
    child: tuple[str, str, Path] | None = None,
    batch_sizes: tuple[int, ...] | None = None,
    further_engines: int = 0,
    predicted: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Return a ServingReport as JSON and its key in the store: measured now or, for the same models and machine, before.

    `child` is its name, digest and checkpoint; without one the parent is served alone, at all of the target's batch sizes, in
    as many turns as the target's own settings say.
    """
    from puzzle_dag.children.serve import FEWEST_ENGINES, measure_serving
    from puzzle_dag.engine.client import read_engine_version
    from puzzle_dag.engine.hardware import detect_hardware

    parent, target, settings = workspace.load_parent(), workspace.target_of(spec), plan.profile.serving
    engines = max(FEWEST_ENGINES, target.engines_per_probe + 1)
    if child:
        engines, target = settings.turns or engines, target.model_copy(update={"repeats": settings.repeats or target.repeats})
    name, digest, checkpoint = child or ("", "", None)
    inputs = {
        "version": stage_version(_SERVING),
        "engines": engines,
        "further_engines": further_engines,
        "repeats": target.repeats,
        "batch_sizes": list(batch_sizes or target.batch_sizes),
        "parent": parent.digest,
        "children": {name: digest} if child else {},
        # How the costs are checked says nothing about how a model serves.
        "target": {k: v for k, v in spec.items() if k != "heldout_models"},
        "engine_version": read_engine_version(),
        "hardware": detect_hardware().name,
    }

    def measure(folder: Path) -> tuple[str, dict[str, Any]]:
        report = measure_serving(
            parent.folder,
            {name: checkpoint} if checkpoint else {},
            target,
            engines=engines,
            further_engines=further_engines,
            batch_sizes=batch_sizes,
            predicted_s=predicted,
            progress=ProgressLog(f"serving {name or 'the parent'}"),
        )
        return fingerprint(asdict(report)), asdict(report)

    with workspace.device():
        made = workspace.keep("serving", inputs, measure)
    return {"report": made.metadata, "key": made.folder.name}


def _engine_peak_bytes(report: dict[str, Any]) -> int:
    return max(m["peak_rss_bytes"] for m in report["models"])


def _parent_serving_asset(plan: Plan) -> dg.AssetsDefinition:
    @dg.asset(
        **plan.options(
            "parent_serving",
            deps=["parent", "target_spec"],
            stages=[_SERVING],
            partitions=plan.partitions.targets,
            kinds=("vllm",),
            device=True,
            description="The parent on the real engine with its real weights: throughput, latency, memory.",
        )
    )
    def parent_serving(context: dg.AssetExecutionContext, workspace: Workspace) -> dg.MaterializeResult:
        time = Stopwatch()
        served = _serve(plan, workspace, workspace.shelf.value("target_spec", context.partition_key))
        report = served["report"]
        rows = [{"target": context.partition_key, **m} for m in report["models"]]
        files = [write_rows(workspace.tables / "parent_serving" / f"{context.partition_key}.parquet", rows)]
        metadata = {"served": table(rows), "hardware": report["hardware"], "engine_version": report["engine_version"]}
        peak = _engine_peak_bytes(report)
        return materialised(context, plan, workspace, served, files=files, metadata=metadata, time=time, engine_peak_bytes=peak)

    return parent_serving


def _serving_asset(plan: Plan) -> dg.AssetsDefinition:
    @dg.asset(
        **plan.options(
            "serving",
            # A scenario's target is its own choice, so the edge is from all targets; the store keeps what was measured.
            deps=["uptrained_child", plan.dep("parent_serving", dg.AllPartitionMapping())],
            stages=[_SERVING],
            settings=plan.profile.serving.model_dump(),
            partitions=plan.partitions.scenarios,
            kinds=("vllm",),
            device=True,
            description="Parent and child on the real engine, in turns: the speed-up with its confidence interval, beside the prediction.",
        )
    )
    def serving(context: dg.AssetExecutionContext, workspace: Workspace) -> dg.MaterializeResult:
        from puzzle_dag.serving.command import typed_command

        time, name = Stopwatch(), context.partition_key
        scenario, child = workspace.read_scenario(name), workspace.shelf.value("uptrained_child", name)
        spec, solution = workspace.shelf.value("target_spec", scenario.target), chosen_solution(plan, workspace, name)
        checkpoint, target = checkpoint_folder(workspace, "uptrained_child", child), workspace.target_of(spec)
        parent = workspace.shelf.value("parent_serving", scenario.target)["report"]
        served = _serve(
            plan,
            workspace,
            spec,
            child=(name, child["digest"], checkpoint),
            batch_sizes=serving_batches(scenario, target, solution["batch"], parent),
            further_engines=plan.profile.serving.further_turns if bounds_time(scenario) else 0,
            predicted=_predict(plan, workspace, name, scenario.target),
        )
        report = served["report"]
        met = constraint_rows(measured_constraints(scenario, target, report, name, solution["batch"]))
        source = solution["notes"].get("costs", "measured")
        rows = [{"scenario": name, "target": scenario.target, "predicted_from": source, **m} for m in report["models"]]
        return materialised(
            context,
            plan,
            workspace,
            {"uptrained_child": child["digest"], "target": scenario.target, **served},
            files=[write_rows(workspace.tables / "serving" / f"{name}.parquet", rows)],
            metadata={
                "speedups": table(report["speedups"]),
                "predicted_from": f"{source} costs",
                "constraints": table(met),
                "command": typed_command(checkpoint, target),
                "served": table(report["models"]),
                "hardware": report["hardware"],
                "engine_version": report["engine_version"],
            },
            time=time,
            engine_peak_bytes=_engine_peak_bytes(report),
        )

    return serving


def serving_assets(plan: Plan) -> list[dg.AssetsDefinition]:
    """Return parent_serving and serving."""
    return [_parent_serving_asset(plan), _serving_asset(plan)]
