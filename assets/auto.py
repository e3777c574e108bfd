"""Auto mode: an automation condition on every asset and check, for those who leave Dagster's daemon running and its sensor switched on.

Dagster's own conditions see neither edited files nor deleted artifacts, and not whether something further up is stale.
So those used here ask the refresh: true is what a refresh would run next, with nothing before it left to run. Each
tick asks for one wave; an item that failed is asked for again only after something changed that it is made from.
"""

import warnings
from collections.abc import Collection, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import dagster as dg

from assets.plan import Plan, dagster_name


class _Next(dg.AutomationCondition):  # type: ignore[type-arg]
    """A condition that asks a profile's refresh what comes next."""

    def __init__(self, root: Path, profile: str) -> None:
        """Ask the refresh of one profile."""
        self._root, self._profile = root, profile

    def _result(self, context: dg.AutomationContext, name: str, check: str | None) -> dg.AutomationResult:
        """Return true for the partitions of an asset, or of one of its checks, that a refresh would come to next."""
        return _true_for(context, _ready(context.asset_graph_view, self._root, self._profile).get((name, check), ()))


class NextToRun(_Next):
    """True for each partition that is stale, with nothing stale, failed or blocked among all that it is made from."""

    @property
    def description(self) -> str:
        """Return what the UI shows."""
        return "stale as a refresh sees it, and nothing before it is"

    def evaluate(self, context: dg.AutomationContext) -> dg.AutomationResult:
        """Return the partitions that a refresh would run next. Raises ConfigError: the tick fails and says what to put right."""
        return self._result(context, context.key.path[-1], None)


class NextToCheck(_Next):
    """True for each partition whose asset this tick asks for, else for each that is up to date and not yet judged as it is.

    A check that has a condition of its own no longer runs along with its asset by itself, so it is asked for with it.
    Dagster then has it run for the asset's partitions alone; the others come with the next tick.
    """

    @property
    def description(self) -> str:
        """Return what the UI shows."""
        return "its asset is asked for, or is up to date and its verdict older than what it goes by"

    def evaluate(self, context: dg.AutomationContext) -> dg.AutomationResult:
        """Return the partitions to judge. Raises ConfigError: the tick fails and says what to put right."""
        key = context.key
        asked = context.request_subsets_by_key.get(key.asset_key)
        if asked is not None and not asked.is_empty:
            return _true_for(context, asked.expensively_compute_partition_keys() if asked.is_partitioned else {None})
        return self._result(context, key.asset_key.path[-1], key.name)


def _true_for(context: dg.AutomationContext, ready: Collection[str | None]) -> dg.AutomationResult:
    """Return the result of a condition that is true for these partitions, as far as they are there; None is the whole of an asset."""
    partitions = context.asset_graph.get(context.key).partitions_def
    if partitions is None:
        return dg.AutomationResult(context, context.candidate_subset if None in ready else context.get_empty_subset())
    known = context.candidate_subset.expensively_compute_partition_keys()
    keys = {key for key in ready if key in known}
    return dg.AutomationResult(context, context.asset_graph_view.get_subset_from_partition_keys(context.key, partitions, keys))


@lru_cache(maxsize=1)
def _ready(view: Any, root: Path, profile: str) -> Mapping[tuple[str, str | None], frozenset[str | None]]:
    """Return (asset, check or None) -> partitions that are next; computed once a tick, of which each has a view of its own."""
    from assets.refresh import refresh

    ready: dict[tuple[str, str | None], set[str | None]] = {}
    record = refresh(root, profile, view.instance, dry=True)
    for outcome in (*record.of("stale"), *record.of("unchecked")):
        if not outcome.waits_for:
            for check in outcome.checks or (None,):
                ready.setdefault((outcome.item.asset, check), set()).add(outcome.item.partition)
    return {key: frozenset(partitions) for key, partitions in ready.items()}


def automation_condition(root: Path, profile: str) -> dg.AutomationCondition:  # type: ignore[type-arg]
    """Return the condition that all assets of a profile carry; nothing evaluates it until `auto_sensor` is switched on."""
    newly = NextToRun(root, profile).newly_true().with_label("newly the next to run")
    return (newly & ~dg.AutomationCondition.in_progress()).with_label("stale, and its turn")


def check_condition(root: Path, profile: str) -> dg.AutomationCondition:  # type: ignore[type-arg]
    """Return the condition that all checks of a profile carry."""
    newly = NextToCheck(root, profile).newly_true().with_label("newly the next to judge")
    return (newly & ~dg.AutomationCondition.in_progress()).with_label("to be judged, and its turn")


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
