"""The search: for each scenario the architecture that costs least quality and meets every constraint."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import dagster as dg

from assets.costs import parent_block
from assets.materialise import Stopwatch, materialised, picture, table
from assets.plan import Plan
from puzzle_dag.store import fingerprint
from resources.rows import read_rows, write_rows
from resources.workspace import Workspace

if TYPE_CHECKING:
    from puzzle_dag.config import Scenario
    from puzzle_dag.piece_costs import PieceCosts
    from puzzle_dag.search.score import BlockScore
    from puzzle_dag.search.solution import Solution


class CostsMissingError(ValueError):
    """A scenario's target has no costs that are of today."""


def read_scores(workspace: Workspace) -> list[list["BlockScore"]]:
    """Return the score table, a list a layer."""
    from puzzle_dag.search.score import BlockScore

    layers: dict[int, list[BlockScore]] = {}
    for row in read_rows(workspace.tables / "score_table.parquet"):
        layers.setdefault(row["layer"], []).append(BlockScore(**row))
    return [layers[i] for i in sorted(layers)]


def read_costs(plan: Plan, workspace: Workspace, target: str) -> dict[str, "PieceCosts"]:
    """Return the costs of all targets that are up to date, as the search sees them. Raises CostsMissingError."""
    from puzzle_dag.costs.table import CostTable

    names = workspace.shelf.value("cost_table")["targets"]
    if target not in names:
        raise CostsMissingError(f"target {target} has no costs of today; see why block_costs[{target}] failed, then refresh")
    return {n: CostTable.read(workspace.tables / "costs" / f"{n}.parquet").to_piece_costs(plan.shape) for n in names}


def check_source(workspace: Workspace, scenario: "Scenario", costs: "PieceCosts") -> None:
    """Check that a scenario accepts costs like these. Raises CostsMissingError, with what to do."""
    from puzzle_dag.costs.obtain import explain_unmeasured

    if costs.source == "analytic" and scenario.costs != "analytic":
        target = workspace.target_of(workspace.shelf.value("target_spec", scenario.target))
        raise CostsMissingError(f"scenario {scenario.name}: {explain_unmeasured(target)}")


def solution_row(solution: "Solution") -> dict[str, Any]:
    """Return a solution as one flat row."""
    predicted = {f"predicted_{k}": v for k, v in solution.predicted.items()}
    parent = {f"parent_{k.removeprefix('parent_')}": v for k, v in solution.parent.items()}
    head = {k: getattr(solution, k) for k in ("scenario", "target", "status", "minimized", "objective", "bound", "gap", "batch", "seconds")}
    return {
        **head,
        "costs": solution.notes.get("costs", "measured"),
        **predicted,
        **parent,
        "blocks": " ".join(c.block for c in solution.choices),
        "digest": solution.digest,
    }


def _metadata(plan: Plan, workspace: Workspace, solution: "Solution") -> dict[str, Any]:
    from puzzle_dag.report.pictures import architecture_map

    variants = workspace.shelf.value("cost_variants")
    drawn = architecture_map(
        [c.block for c in solution.choices],
        attentions=variants["attention"],
        ffns=variants["ffn"],
        parent_block=parent_block(plan).name,
        title=solution.scenario,
    )
    return {
        "status": solution.status,
        "costs": solution.notes["costs"],
        "objective": solution.objective,
        "bound": solution.bound,
        "gap": solution.gap,
        "batch": solution.batch,
        "constraints": table(
            [
                {"constraint": x.name, "at_least": x.at_least, "at_most": x.at_most, "predicted": x.value, "parent": x.parent_value}
                for x in solution.limits
            ]
        ),
        "architecture": table([{"layer": c.layer, "block": c.block, "score": c.score} for c in solution.choices]),
        "picture": picture(drawn, "the architecture"),
    }


def search_assets(plan: Plan) -> list[dg.AssetsDefinition]:
    """Return solution."""

    @dg.asset(
        **plan.options(
            "solution",
            deps=["scenario_spec", "score_table", "cost_table"],
            stages=["puzzle_dag.search.solve"],
            partitions=plan.partitions.scenarios,
            kinds=("highs",),
            description="The chosen block of every layer, proven by HiGHS; the same choice again rebuilds nothing.",
        )
    )
    def solution(context: dg.AssetExecutionContext, workspace: Workspace) -> dg.MaterializeResult:
        from puzzle_dag.search.solve import solve_scenario

        time, spec = Stopwatch(), workspace.shelf.value("scenario_spec", context.partition_key)
        scenario = workspace.scenario_of(spec)
        costs = read_costs(plan, workspace, scenario.target)
        check_source(workspace, scenario, costs[scenario.target])
        found = solve_scenario(read_scores(workspace), costs, scenario, parent_block(plan))
        found = replace(found, notes={**found.notes, "costs": costs[scenario.target].source})
        return materialised(
            context,
            plan,
            workspace,
            {"scenario_spec": fingerprint(spec), "solution": found.to_json()},
            data_version=found.digest,
            files=[write_rows(workspace.tables / "solutions" / f"{context.partition_key}.parquet", [solution_row(found)])],
            metadata=_metadata(plan, workspace, found),
            time=time,
        )

    return [solution]
