"""What every asset check is made of: a body that judges, and a result whose severity says whether it blocks."""

import warnings
from collections.abc import Callable
from typing import Any

import dagster as dg

from assets.auto import check_condition
from assets.plan import Naming
from resources.workspace import Workspace

Body = Callable[[dg.AssetCheckExecutionContext, Workspace], dg.AssetCheckResult]


def check_of(
    plan: Naming, asset: str, name: str, partitions: dg.PartitionsDefinition | None, body: Body, *, blocking: bool, description: str
) -> dg.AssetChecksDefinition:
    """Return a check of an asset, a result a partition where the asset has them."""

    def run(context: dg.AssetCheckExecutionContext, workspace: Workspace) -> dg.AssetCheckResult:
        return body(context, workspace)

    with warnings.catch_warnings():
        # Partitioned checks are in preview; the pinned Dagster has them, and they are what the UI shows a partition.
        warnings.simplefilter("ignore", dg.PreviewWarning)
        decorate = dg.asset_check(
            asset=plan.key(asset),
            name=name,
            blocking=blocking,
            description=description,
            partitions_def=partitions,
            automation_condition=check_condition(plan.root, plan.profile.name),
        )
        return decorate(run)


def check_result(passed: bool, *, blocking: bool = True, **metadata: Any) -> dg.AssetCheckResult:
    """Return a result; one that doesn't block warns."""
    severity = dg.AssetCheckSeverity.ERROR if blocking else dg.AssetCheckSeverity.WARN
    return dg.AssetCheckResult(passed=passed, severity=severity, metadata=metadata)
