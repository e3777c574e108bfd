"""How long what is stale will take: what the same asset took before, by Dagster's own history of runs."""

import dagster as dg

from assets.plan import Plan
from assets.staleness import Item

_NUM_RUNS = 5


class PastRuns:
    """The history of one profile's assets on one instance.

    An item counts as long as the longest of its last five runs: a run that found everything in the store takes no time
    and says nothing. A partition that never ran is estimated from the asset's other partitions.
    """

    def __init__(self, plan: Plan, instance: dg.DagsterInstance) -> None:
        """Ask about the assets of `plan`."""
        self._plan, self._instance = plan, instance
        self._by_asset: dict[str, float | None] = {}

    def seconds(self, item: Item) -> float | None:
        """Return the seconds that an item will take at most, going by its past; None where it has none."""
        if item.partition is not None:
            own = self._longest(item.asset, [item.partition], _NUM_RUNS)
            if own is not None:
                return own
        if item.asset not in self._by_asset:
            self._by_asset[item.asset] = self._longest(item.asset, None, _NUM_RUNS)
        return self._by_asset[item.asset]

    def _longest(self, asset: str, partitions: list[str] | None, limit: int) -> float | None:
        wanted = dg.AssetRecordsFilter(asset_key=self._plan.key(asset), asset_partitions=partitions)
        records = self._instance.fetch_materializations(wanted, limit=limit).records
        took = [s for record in records if (s := self._took(record)) is not None]
        return max(took, default=None)

    def _took(self, record: dg.EventLogRecord) -> float | None:
        """Return what one materialisation took: its own stopwatch, which leaves the wait for the device out, or else its step."""
        materialization, entry = record.asset_materialization, record.event_log_entry
        stopwatch = None if materialization is None else materialization.metadata.get("seconds")
        if stopwatch is not None and isinstance(stopwatch.value, (int, float)):
            return float(stopwatch.value)
        for step in self._instance.get_run_step_stats(entry.run_id, [entry.step_key] if entry.step_key else None):
            if step.start_time is not None and step.end_time is not None:
                return float(step.end_time - step.start_time)
        return None
