"""Auto mode: an automation condition on every asset, for those who leave Dagster's daemon running and its sensor switched on.

Dagster's own conditions see neither edited files nor deleted artifacts, and not whether something further up is stale.
So the one used here asks the refresh: true is what a refresh would run next, with nothing before it left to run. Each
tick asks for one wave; an item that failed is asked for again only after something changed that it is made from.
"""

import warnings
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import dagster as dg

from assets.plan import Plan, dagster_name


class NextToRun(dg.AutomationCondition):  # type: ignore[type-arg]
    """True for each partition that is stale, with nothing stale, failed or blocked among all that it is made from."""

    def __init__(self, root: Path, profile: str) -> None:
        """Ask about the assets of one profile."""
        self._root, self._profile = root, profile

    @property
    def description(self) -> str:
        """Return what the UI shows."""
        return "stale as a refresh sees it, and nothing before it is"

    def evaluate(self, context: dg.AutomationContext) -> dg.AutomationResult:
        """Return the partitions that a refresh would run next. Raises ConfigError: the tick fails and says what to put right."""
        ready = _ready(context.asset_graph_view, self._root, self._profile).get(context.key.path[-1], frozenset())
        if context.partitions_def is None:
            return dg.AutomationResult(context, context.candidate_subset if None in ready else context.get_empty_subset())
        known = context.candidate_subset.expensively_compute_partition_keys()
        keys = {key for key in ready if key in known}
        return dg.AutomationResult(
            context, context.asset_graph_view.get_subset_from_partition_keys(context.key, context.partitions_def, keys)
        )


@lru_cache(maxsize=1)
def _ready(view: Any, root: Path, profile: str) -> Mapping[str, frozenset[str | None]]:
    """Return asset -> partitions that are next to run; computed once a tick, of which each has a view of its own."""
    from assets.refresh import refresh

    ready: dict[str, set[str | None]] = {}
    for outcome in refresh(root, profile, view.instance, dry=True).of("stale"):
        if not outcome.waits_for:
            ready.setdefault(outcome.item.asset, set()).add(outcome.item.partition)
    return {asset: frozenset(partitions) for asset, partitions in ready.items()}


def automation_condition(root: Path, profile: str) -> dg.AutomationCondition:  # type: ignore[type-arg]
    """Return the condition that all assets of a profile carry; nothing evaluates it until `auto_sensor` is switched on."""
    newly = NextToRun(root, profile).newly_true().with_label("newly the next to run")
    return (newly & ~dg.AutomationCondition.in_progress()).with_label("stale, and its turn")


def auto_sensor(plan: Plan) -> dg.AutomationConditionSensorDefinition:
    """Return the sensor of the profile's auto mode, off until it is switched on."""
    with warnings.catch_warnings():
        # Evaluating our own condition in the code location is in beta; the pinned Dagster has it.
        warnings.simplefilter("ignore", dg.BetaWarning)
        return dg.AutomationConditionSensorDefinition(
            name=dagster_name("auto", plan.profile.name, "sensor"),
            target=dg.AssetSelection.key_prefixes(plan.profile.name),
            minimum_interval_seconds=30,
            # The condition is our own code, and reads our files.
            use_user_code_server=True,
            emit_backfills=False,
            run_tags={"puzzle_dag/auto": plan.profile.name},
            description="Auto mode: whatever becomes stale runs, wave by wave, queued and one at a time on the device.",
        )
