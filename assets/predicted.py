"""The predicted frontier: what each speed, memory and latency costs in quality, from solutions alone, before any child is trained."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import dagster as dg

from assets.costs import parent_block
from assets.drawings import page_link
from assets.facts import read_chain
from assets.materialise import Stopwatch, materialised, picture, table
from assets.plan import Plan
from assets.search import read_costs, read_scores
from puzzle_dag.progress import ProgressLog
from puzzle_dag.report.html import Picture
from resources.rows import write_rows
from resources.workspace import Workspace

AXES = {
    "throughput_tokens_per_s": "throughput (parent = 1)",
    "memory_bytes": "weights and KV cache (parent = 1)",
    "latency_s": "latency (parent = 1)",
}
"""Quantity -> name of its axis."""


def predicted_pictures(rows: Sequence[Mapping[str, Any]]) -> dict[str, Picture]:
    """Return summed KL against throughput, memory and latency for each target, by name; each says what its costs are."""
    from puzzle_dag.report.pictures import FrontierPoint, frontier

    kinds = {"curve": "solution", "parent": "parent", "scenario": "child", "searched": "searched"}
    drawn = {}
    for target, quantity in dict.fromkeys((r["target"], r["quantity"]) for r in rows):
        own = [r for r in rows if (r["target"], r["quantity"]) == (target, quantity)]
        points = [FrontierPoint(_name(r), r["ratio"], r["kl"], kinds[r["kind"]]) for r in own]  # type: ignore[arg-type]
        source = f"{own[0]['costs']} costs"
        batches = "its best batch size" if quantity == "throughput_tokens_per_s" else f"batch {own[0]['batch']}"
        png = frontier(
            points,
            x=f"{AXES[quantity]}, at {batches}",
            y="summed KL (nats a token)",
            title=f"{target}: {source}",
            children="children (predicted)",
            is_loss=True,
        )
        drawn[f"{target}_{quantity}"] = Picture(png, f"{target} {quantity.replace('_', ' ')}, predicted from {source}")
    return drawn


def _name(row: Mapping[str, Any]) -> str:
    """Return what stands beside a point."""
    return f"{row['scenario']} as first found" if row["kind"] == "searched" else row["scenario"] or row["kind"]


def _predict(plan: Plan, workspace: Workspace) -> list[dict[str, Any]]:
    """Return the points of every target that a scenario is for and that has costs."""
    from puzzle_dag.search.predicted import predict_frontier
    from puzzle_dag.search.solution import Solution

    chains = [read_chain(plan, workspace, name) for name in workspace.read_profile().scenarios]
    searched = {c.name: Solution.from_json(c.searched) for c in chains if c.searched is not None}
    children = {c.name: Solution.from_json(c.solution) for c in chains if c.solution is not None}
    scores, costs, rows = read_scores(workspace), read_costs(plan, workspace), list[dict[str, Any]]()
    for target in dict.fromkeys(s.target for s in searched.values()):
        own = {name: s for name, s in children.items() if s.target == target}
        # Of a scenario whose refinement or trial failed there is no child, only what the search found.
        other = {n: s for n, s in searched.items() if s.target == target and (n not in own or own[n].digest != s.digest)}
        found = predict_frontier(scores, costs[target], parent_block(plan), own, searched=other, progress=ProgressLog(f"frontier {target}"))
        rows += [asdict(p) for p in found]
    return rows


def predicted_assets(plan: Plan) -> list[dg.AssetsDefinition]:
    """Return predicted_frontier."""

    @dg.asset(
        **plan.options(
            "predicted_frontier",
            deps=["score_table", "cost_table", *dict.fromkeys(("solution", plan.chosen))],
            stages=["puzzle_dag.search.predicted"],
            kinds=("highs", "parquet"),
            description="Summed KL against throughput, memory and latency, from solutions alone: what a constraint will cost.",
        )
    )
    def predicted_frontier(context: dg.AssetExecutionContext, workspace: Workspace) -> dg.MaterializeResult:
        time, rows = Stopwatch(), _predict(plan, workspace)
        path = workspace.tables / "predicted_frontier.parquet"
        path.unlink(missing_ok=True)  # of former scenarios, where none is solved now
        shown = ("target", "quantity", "kind", "scenario", "ratio", "value", "batch", "kl", "status", "costs")
        return materialised(
            context,
            plan,
            workspace,
            {"rows": rows},
            files=[write_rows(path, rows)] if rows else [],
            metadata={
                "page": page_link(plan, "index"),
                "costs": ", ".join(f"{target}: {source}" for target, source in {r["target"]: r["costs"] for r in rows}.items()),
                "points": table([{k: r[k] for k in shown} for r in rows]),
                **{name: picture(drawn.png, drawn.caption) for name, drawn in predicted_pictures(rows).items()},
            },
            time=time,
        )

    return [predicted_frontier]
