"""The held-out check of block_costs: models that were no probes, predicted against measured, with the noise beside it."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import dagster as dg

from assets.materialise import table
from assets.plan import Plan
from resources.rows import read_rows
from resources.workspace import Workspace


def _not_checked(why: str, fix: str) -> dg.AssetCheckResult:
    """Return the result of a check that wasn't done. It passes, for nothing is known to be wrong, and says so before all else."""
    words = f"Nothing was checked: {why}. {fix}."
    return dg.AssetCheckResult(
        passed=True, severity=dg.AssetCheckSeverity.WARN, description=words, metadata={"not_checked": words, "checked": False}
    )


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
        ask = f"set `heldout_models: {ENOUGH_MODELS}` in conf/targets/{target.name}.yaml"
        if source == "analytic":
            return _not_checked(
                f"the costs are {source}, and this machine has no engine to hold them against",
                f"To have them checked, {ask} and refresh on a machine with {target.hardware}",
            )
        if source == "measured" and target.heldout_models == 0:
            return _not_checked("`heldout_models` of the target is 0", f"To have the costs checked, {ask}, and refresh")
        file = workspace.tables / "predictions" / f"{target.name}.parquet"
        verdicts = judge(Comparison(**r) for r in (read_rows(file) if file.exists() else []))
        if not verdicts and source == "imported":
            return _not_checked(
                "the imported file has no held-out models",
                f"To have the costs checked, {ask} where the target is measured, and import the new file",
            )
        if not verdicts:
            return _not_checked(
                "every model of the search space is a probe",
                f"To have the costs checked, add variants to `search_space` in conf/profiles/{plan.profile.name}.yaml",
            )
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
