"""Served children beyond their constraints, where the profile asks for it: under load over HTTP, and as draft models of their parent."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import dagster as dg

from assets.children import checkpoint_folder
from assets.costs import read_cost_table
from assets.materialise import Stopwatch, materialised, picture, table
from assets.plan import Plan
from assets.predictions import predict_seconds
from assets.versions import stage_version
from puzzle_dag.config import SpeculationSettings, Target
from puzzle_dag.progress import ProgressLog
from puzzle_dag.store import fingerprint
from resources.rows import write_rows
from resources.workspace import Workspace

_LOAD, _LOAD_CLIENT = "puzzle_dag.serving.curve", "puzzle_dag.serving.load"
_SPECULATION = "puzzle_dag.serving.speculate"
ALTERNATIVES = "n-gram speculation (vLLM's method `ngram`) needs no draft model; a GPU build of vLLM may run this one"
"""What is left where an engine can't run a child as a draft model."""


def _machine() -> dict[str, str]:
    from puzzle_dag.engine.client import read_engine_version
    from puzzle_dag.engine.hardware import detect_hardware

    return {"engine_version": read_engine_version(), "hardware": detect_hardware().name}


def _engine(target: Target) -> dict[str, Any]:
    from puzzle_dag.engine.jobs import EngineSettings

    return asdict(EngineSettings.of(target))


def _predict_load(plan: Plan, workspace: Workspace, scenario: str, target: str) -> dict[str, dict[int, Any]]:
    """Return what the cost table says of parent and child at its batch sizes."""
    from puzzle_dag.serving.curve import PredictedLoad

    predicted = predict_seconds(plan, workspace, scenario, read_cost_table(workspace, target))
    return {
        model: {batch: PredictedLoad(prefill_s=seconds["prefill"], decode_s=seconds["decode"]) for batch, seconds in by_batch.items()}
        for model, by_batch in predicted.items()
    }


def _load_curve(plan: Plan, workspace: Workspace, scenario: str, target: str, child: dict[str, Any], checkpoint: Path) -> dict[str, Any]:
    """Return a LoadCurve as JSON. Every point is kept as it comes, so an interrupted run goes on where it was."""
    from puzzle_dag.serving.curve import measure_load_curve
    from puzzle_dag.serving.load import LoadPoint

    settings = plan.profile.load_curve
    assert settings is not None
    spec, parent = workspace.shelf.value("target_spec", target), workspace.load_parent()
    common = {
        "version": stage_version(_LOAD),
        "parent": parent.digest,
        "child": child["digest"],
        "engine": _engine(workspace.target_of(spec)),
        "lengths": [spec["input_length"], spec["output_length"]],
        "rounds": settings.rounds,
        "max_concurrency": max(settings.concurrencies),
        **_machine(),
    }

    def key(model: str, turn: int, concurrency: int) -> dict[str, Any]:
        return {**common, "model": model if model == "parent" else "child", "turn": turn, "concurrency": concurrency}

    def keep(place: tuple[str, int, int], point: LoadPoint) -> None:
        workspace.keep("load_point", key(*place), lambda _: (fingerprint(point.to_json()), point.to_json()))

    places = [(m, t, c) for m in ("parent", scenario) for t in range(settings.turns) for c in settings.concurrencies]
    found = {place: workspace.store.find("load_point", fingerprint(key(*place))) for place in places}
    with workspace.device():
        curve = measure_load_curve(
            parent.folder,
            {scenario: checkpoint},
            workspace.target_of(spec),
            settings,
            known={place: LoadPoint(**artifact.metadata) for place, artifact in found.items() if artifact is not None},
            on_point=keep,
            predicted=_predict_load(plan, workspace, scenario, target),
            progress=ProgressLog(f"load {scenario}"),
        )
    return asdict(curve)


def _draw(levels: list[dict[str, Any]], target: dict[str, Any], title: str) -> dg.MetadataValue:
    from puzzle_dag.report.load import load_curves
    from puzzle_dag.report.online import load_marks

    drawn = load_curves(load_marks(levels, target["output_length"]), title=title)
    return picture(drawn, "throughput against latency; the numbers are concurrent requests")


def _load_curve_asset(plan: Plan) -> dg.AssetsDefinition:
    settings = plan.profile.load_curve
    assert settings is not None

    @dg.asset(
        **plan.options(
            "load_curve",
            deps=["uptrained_child", "serving"],
            stages=[_LOAD],
            settings=settings.model_dump(exclude={"scenarios"}),
            partitions=plan.partitions.scenarios,
            kinds=("vllm",),
            device=True,
            description="Parent and child behind `vllm serve`, by turns, under vLLM's own load: TTFT, TPOT and throughput by concurrency.",
        )
    )
    def load_curve(context: dg.AssetExecutionContext, workspace: Workspace) -> dg.MaterializeResult:
        time, name = Stopwatch(), context.partition_key
        child, target = workspace.shelf.value("uptrained_child", name), workspace.read_scenario(name).target
        checkpoint = checkpoint_folder(workspace, "uptrained_child", child)
        curve = _load_curve(plan, workspace, name, target, child, checkpoint)
        rows = [{"scenario": name, "target": target, "source": "measured", **level} for level in curve["levels"]]
        return materialised(
            context,
            plan,
            workspace,
            {"uptrained_child": child["digest"], "target": target, "curve": curve},
            files=[write_rows(workspace.tables / "load_curve" / f"{name}.parquet", rows)],
            metadata={
                "levels": table(curve["levels"]),
                "picture": _draw(curve["levels"], workspace.shelf.value("target_spec", target), name),
                "hardware": curve["hardware"],
                "engine_version": curve["engine_version"],
            },
            time=time,
        )

    return load_curve


def _heldout_prompts(workspace: Workspace, input_length: int, batch: int) -> list[list[int]]:
    """Return the beginnings of held-out rows, which nothing was trained on, half a row at most; they repeat where there are too few."""
    from safetensors.torch import load_file

    rows = load_file(workspace.var / "tokens.safetensors")["heldout"]
    length = min(input_length, rows.shape[1] // 2)
    return [rows[i % len(rows), :length].tolist() for i in range(batch)]


def _speculate(plan: Plan, workspace: Workspace, scenario: str, target: str, child: dict[str, Any]) -> dict[str, Any]:
    """Return a SpeculationReport as JSON: measured now or, for the same models, prompts and machine, before."""
    from puzzle_dag.serving.speculate import measure_speculation

    settings, parent = plan.profile.speculation, workspace.load_parent()
    assert isinstance(settings, SpeculationSettings)
    spec = workspace.shelf.value("target_spec", target)
    prompts = _heldout_prompts(workspace, spec["input_length"], max(settings.batch_sizes))
    inputs = {
        "version": stage_version(_SPECULATION),
        "parent": parent.digest,
        "child": child["digest"],
        "engine": _engine(workspace.target_of(spec)),
        "settings": settings.model_dump(mode="json", exclude={"scenarios"}),
        "prompts": fingerprint(prompts),
        **_machine(),
    }

    def measure(_: Path) -> tuple[str, dict[str, Any]]:
        checkpoint = checkpoint_folder(workspace, "uptrained_child", child)
        progress = ProgressLog(f"speculation {scenario}")
        report = asdict(measure_speculation(parent.folder, checkpoint, prompts, workspace.target_of(spec), settings, progress=progress))
        return fingerprint(report), report

    with workspace.device():
        return workspace.keep("speculation", inputs, measure).metadata


def _speculation_asset(plan: Plan) -> dg.AssetsDefinition:
    settings = plan.profile.speculation
    assert settings is not None

    @dg.asset(
        **plan.options(
            "speculation",
            deps=["uptrained_child", "serving", "tokens"],
            stages=[_SPECULATION],
            settings=settings.model_dump(exclude={"scenarios"}),
            partitions=plan.partitions.scenarios,
            kinds=("vllm",),
            device=True,
            description="The child as the draft model of its own parent, against the parent alone: acceptance rate and speed-up.",
        )
    )
    def speculation(context: dg.AssetExecutionContext, workspace: Workspace) -> dg.MaterializeResult:
        time, name = Stopwatch(), context.partition_key
        child, target = workspace.shelf.value("uptrained_child", name), workspace.read_scenario(name).target
        report = _speculate(plan, workspace, name, target, child)
        shared = {"scenario": name, "target": target, "source": "measured", "drafted_at_a_time": report["num_draft_tokens"]}
        rows, unsupported = [{**shared, **b} for b in report["batches"]], report["unsupported"]
        path = workspace.tables / "speculation" / f"{name}.parquet"
        path.unlink(missing_ok=True)  # of a former child, where this one can't draft
        return materialised(
            context,
            plan,
            workspace,
            {"uptrained_child": child["digest"], "target": target, "report": report},
            files=[write_rows(path, rows)] if rows else [],
            metadata={
                "speculation": table(report["batches"]),
                "hardware": report["hardware"],
                "engine_version": report["engine_version"],
                **({"unsupported": unsupported, "what_would_work": ALTERNATIVES} if unsupported else {}),
            },
            time=time,
        )

    return speculation


def online_assets(plan: Plan) -> list[dg.AssetsDefinition]:
    """Return load_curve and speculation, as far as the profile asks for them."""
    wanted = ((plan.profile.load_curve, _load_curve_asset), (plan.profile.speculation, _speculation_asset))
    return [make(plan) for settings, make in wanted if settings is not None]
