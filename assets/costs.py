"""Costs: what each variant costs on each target, measured with the engine that will serve."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg

from assets.engine_watches import watch_block_costs
from assets.materialise import Stopwatch, materialised, picture, table
from assets.plan import Plan
from puzzle_dag.architecture import FFN, Architecture, Attention, Block
from puzzle_dag.costs.accelerators import ACCELERATORS
from puzzle_dag.progress import ProgressLog
from puzzle_dag.store import fingerprint
from resources.rows import write_rows
from resources.workspace import Workspace

if TYPE_CHECKING:
    from puzzle_dag.costs.comparison import Comparison
    from puzzle_dag.costs.table import CostTable


def parent_block(plan: Plan) -> Block:
    """Return the parent's own block."""
    return Block(Attention("gqa", plan.shape.num_key_value_heads), FFN("swiglu", plan.shape.intermediate_size))


def parent_architecture(plan: Plan) -> Architecture:
    """Return the parent as the search and the cost table see it: its own block in every layer."""
    return (parent_block(plan),) * plan.shape.num_hidden_layers


def read_cost_table(workspace: Workspace, target: str) -> "CostTable":
    """Return a target's cost table as `block_costs` wrote it. Raises CostTableError."""
    from puzzle_dag.costs.table import CostTable

    return CostTable.read(workspace.tables / "costs" / f"{target}.parquet")


def _draw(costs: "CostTable") -> bytes:
    from puzzle_dag.report.costs import cost_panels

    return cost_panels(costs.rows, title=f"{costs.target.name}: {costs.source} seconds a layer")


def _metadata(costs: "CostTable", comparisons: "list[Comparison]") -> dict[str, Any]:
    from puzzle_dag.report.costs import residual_plot

    rows = [
        {"batch": r.batch, "phase": r.phase, "place": r.place, "variant": r.variant, "seconds": r.seconds, "source": r.source}
        for r in costs.rows
    ]
    shown = {
        "source": costs.source,
        **provenance_metadata(costs),
        **({"published_peaks": ACCELERATORS[costs.target.hardware].source} if costs.source == "analytic" else {}),
        **({"pace": costs.levelling.words} if costs.source != "analytic" else {}),
        "num_engines": costs.num_engines,
        "hardware": costs.rows[0].hardware,
        "engine_version": costs.rows[0].engine_version,
        "costs": table(rows),
        "picture": picture(_draw(costs), f"{costs.source} seconds a layer against batch size, prefill and decode apart"),
    }
    if costs.source == "measured" and costs.target.engines_per_probe < 2:
        shown["warning"] = "each model was measured in one engine: its noise is not known, and one disturbed engine is a wrong cost; set 2"
    if comparisons:
        shown["residuals"] = picture(residual_plot(comparisons), "predicted against measured, a point a model and batch size")
    return shown


def block_share_rows(costs: "CostTable", parent: Architecture) -> list[dict[str, float]]:
    """Return what share of the parent's predicted time its blocks take, a row a batch size: in prefill, in decode, and in both.

    What is left (embedding, head, the engine's own work) no choice of blocks can save.
    """
    return [
        {
            "batch": batch,
            "blocks_of_prefill": costs.block_share(parent, batch, "prefill"),
            "blocks_of_decode": costs.block_share(parent, batch, "decode"),
            "blocks_of_all": costs.block_share(parent, batch),
        }
        for batch in costs.batch_sizes
    ]


def _write_comparisons(path: Path, comparisons: "list[Comparison]") -> list[Path]:
    """Write the comparisons, or take former ones away where there are none of today's costs."""
    if comparisons:
        return [write_rows(path, [asdict(c) for c in comparisons])]
    path.unlink(missing_ok=True)
    return []


def provenance_metadata(costs: "CostTable") -> dict[str, Any]:
    """Return where costs come from, what the engine takes of the memory, and whether the arithmetic of its KV cache is right."""
    from puzzle_dag.costs.agreement import check_agreement, find_serving_version
    from puzzle_dag.costs.commands import describe_capacity

    origin = costs.provenance
    if origin is None:
        return {}
    differing = check_agreement(costs, costs.target, find_serving_version(costs.target))
    shown: dict[str, Any] = {
        "source": costs.source if origin.imported_from is None else f"imported from {origin.imported_from} at {origin.imported_at}",
        "measured_at": f"{origin.first_measured_at or 'not kept'} to {origin.last_measured_at or 'not kept'}",
        "engine_that_serves": "; ".join(differing) or "the one that measured, as far as is known here",
        "kv_capacity": describe_capacity(origin.capacity),
    }
    if origin.capacity:
        shown["kv_capacity_models"] = table(list(origin.capacity))
    if origin.engine_bytes is not None:
        shown["engine_bytes"] = origin.engine_bytes
    return shown


def _block_costs_asset(plan: Plan) -> dg.AssetsDefinition:
    @dg.asset(
        **plan.options(
            "block_costs",
            deps=["cost_variants", "target_spec"],
            stages=[f"puzzle_dag.costs.{stage}" for stage in ("measure", "tabulate", "heldout", "roofline")],
            partitions=plan.partitions.targets,
            kinds=("vllm", "parquet"),
            device=True,
            description="Seconds and bytes of each variant at each batch size and phase; only probes that the store lacks are measured. "
            "Analytic where nobody measured the target and a scenario accepts that.",
        )
    )
    def block_costs(context: dg.AssetExecutionContext, workspace: Workspace) -> dg.MaterializeResult:
        from puzzle_dag.costs.obtain import obtain_costs

        variants, spec = workspace.shelf.value("cost_variants"), workspace.shelf.value("target_spec", context.partition_key)
        log, num_engines_run = ProgressLog(f"costs {context.partition_key}"), 0

        def progress(done: int, total: int, unit: str) -> None:
            nonlocal num_engines_run
            num_engines_run += done > 0  # once an engine; probes and held-out models are rounds of their own
            log(done, total, unit)

        with workspace.device():
            time = Stopwatch()
            costs, comparisons = obtain_costs(
                plan.shape,
                parent_block(plan),
                workspace.target_of(spec),
                [Attention.parse(a) for a in variants["attention"]],
                [FFN.parse(f) for f in variants["ffn"]],
                workspace.store,
                analytic=watch_block_costs(plan, workspace, context.partition_key)["analytic"],
                remeasure=workspace.anew,
                progress=progress,
            )
        path = workspace.tables / "costs" / f"{context.partition_key}.parquet"
        costs.write(path)
        return materialised(
            context,
            plan,
            workspace,
            {
                "target_spec": fingerprint(spec),
                "digest": costs.digest,
                "source": costs.source,
                "num_engines": costs.num_engines,
                "num_engines_run": num_engines_run,
            },
            data_version=costs.digest,
            files=[path, *_write_comparisons(workspace.tables / "predictions" / path.name, comparisons)],
            metadata={
                "num_engines_run": num_engines_run,
                **_metadata(costs, comparisons),
                "block_shares": table(block_share_rows(costs, parent_architecture(plan))),
            },
            time=time,
            engine_peak_bytes=costs.provenance.engine_peak_bytes if costs.provenance else None,
        )

    return block_costs


def _cost_table_asset(plan: Plan) -> dg.AssetsDefinition:
    @dg.asset(
        **plan.options(
            "cost_table",
            deps=["block_costs"],
            kinds=("parquet",),
            description="The costs of all targets whose measurement is up to date.",
        )
    )
    def cost_table(context: dg.AssetExecutionContext, workspace: Workspace) -> dg.MaterializeResult:
        shelf, targets = workspace.shelf, {}
        for target in workspace.read_profile().targets:
            costs, spec = shelf.find("block_costs", target), shelf.find("target_spec", target)
            # A target whose measurement failed still has its former costs; they are not of today's target.
            if costs is not None and spec is not None and costs.value["target_spec"] == fingerprint(spec.value):
                targets[target] = costs.data_version
        return materialised(
            context, plan, workspace, {"targets": targets}, metadata={"targets": ", ".join(targets), "num_targets": len(targets)}
        )

    return cost_table


def cost_assets(plan: Plan) -> list[dg.AssetsDefinition]:
    """Return block_costs and cost_table."""
    return [_block_costs_asset(plan), _cost_table_asset(plan)]
