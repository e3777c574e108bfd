"""Checks of what was measured for speed: costs grow with the batch size, and a served child is as fast as they foretold."""

from dataclasses import asdict

import dagster as dg

from assets.checking import Body, check_result
from assets.costs import read_cost_table
from assets.facts import read_chain
from assets.materialise import table
from assets.plan import Plan
from resources.workspace import Workspace

PREDICTION_TOLERANCE = 0.1
"""Share by which the speed-up that was foretold may lie outside the measured 95 % interval."""


def costs_are_monotone(plan: Plan) -> Body:
    """Return the body of the check that no variant gets faster with a larger batch, noise aside."""

    def body(context: dg.AssetCheckExecutionContext, workspace: Workspace) -> dg.AssetCheckResult:
        from puzzle_dag.costs.monotone import find_drops

        costs = read_cost_table(workspace, context.partition_key)
        drops = find_drops(costs.rows)
        return check_result(
            not drops, blocking=False, num_drops=len(drops), num_costs=len(costs.rows), drops=table([asdict(d) for d in drops])
        )

    return body


def serves_as_predicted(plan: Plan) -> Body:
    """Return the body of the check that the measured speed-up is the one that the cost table foretold."""

    def body(context: dg.AssetCheckExecutionContext, workspace: Workspace) -> dg.AssetCheckResult:
        chain = read_chain(plan, workspace, context.partition_key)
        if chain.serving is None or chain.solution is None:
            return check_result(False, blocking=False, why="what was served is not of today's solution; run `python -m assets refresh`")
        kept, rows = chain.solution["batch"], []
        for found in chain.serving["report"]["speedups"]:
            low, high, foretold = found["low"], found["high"], found["predicted"]
            if found["child"] != chain.name or foretold is None:
                continue
            within = low * (1 - PREDICTION_TOLERANCE) <= foretold <= high * (1 + PREDICTION_TOLERANCE)
            rows.append(
                {
                    "batch": found["batch"],
                    "kept": "yes" if found["batch"] == kept else "no",
                    "predicted": foretold,
                    "measured": found["speedup"],
                    "low": low,
                    "high": high,
                    "error": foretold / found["speedup"] - 1,
                    "within": "yes" if within else "no",
                }
            )
        # The scenario is served at the batch size that the solution keeps; the others are there to look at.
        judged = [r for r in rows if r["kept"] == "yes"]
        return check_result(bool(judged) and all(r["within"] == "yes" for r in judged), blocking=False, speedups=table(rows))

    return body
