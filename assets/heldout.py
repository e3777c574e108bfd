"""The held-out check of block_costs: models that were no probes, predicted against measured, with the noise beside it."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import dagster as dg

from assets.materialise import table
from assets.plan import Plan
from resources.rows import read_rows
from resources.workspace import Workspace


def _skipped(why: str) -> dg.AssetCheckResult:
    return dg.AssetCheckResult(passed=True, severity=dg.AssetCheckSeverity.WARN, metadata={"checked": False, "why_not": why})


def _rows(verdicts: list[Any]) -> list[dict[str, Any]]:
    return [
        {**asdict(v), "median_limit": v.median_limit, "worst_limit": v.worst_limit, "verdict": "passed" if v.passed else "failed"}
        for v in verdicts
    ]


def heldout_is_predicted(plan: Plan) -> Callable[[dg.AssetCheckExecutionContext, Workspace], dg.AssetCheckResult]:
    """Return the check's body; an error beyond the limits is an ERROR, fewer than 8 models a WARN that can't tell."""

    def body(context: dg.AssetCheckExecutionContext, workspace: Workspace) -> dg.AssetCheckResult:
        from puzzle_dag.costs.comparison import Comparison
        from puzzle_dag.costs.heldout import ENOUGH_MODELS, judge

        target = workspace.target_of(workspace.shelf.value("target_spec", context.partition_key))
        source = workspace.shelf.value("block_costs", context.partition_key).get("source", "measured")
        if source == "analytic":
            return _skipped(f"the costs are {source}; there are no engines of this machine to hold them against")
        if source == "measured" and target.heldout_models == 0:
            return _skipped("the target's `heldout_models` is 0; set it to 8 or more to have the costs checked")
        file = workspace.tables / "predictions" / f"{target.name}.parquet"
        verdicts = judge(Comparison(**r) for r in (read_rows(file) if file.exists() else []))
        if not verdicts and source == "imported":
            return _skipped("the imported file has no held-out models; set `heldout_models: 8` in the target where it is measured")
        if not verdicts:
            return _skipped("the search space has no model that is no probe")
        passed, enough = all(v.passed for v in verdicts), all(v.num_models >= ENOUGH_MODELS for v in verdicts)
        return dg.AssetCheckResult(
            passed=passed and enough,
            severity=dg.AssetCheckSeverity.WARN if passed else dg.AssetCheckSeverity.ERROR,
            metadata={
                "checked": True,
                "num_models": verdicts[0].num_models,
                "num_models_needed": ENOUGH_MODELS,
                "worst_median_error": max(v.median_error for v in verdicts),
                "worst_error": max(v.worst_error for v in verdicts),
                "verdicts": table(_rows(verdicts)),
            },
        )

    return body
