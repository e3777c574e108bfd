"""What is stale, and why: Dagster's own check a partition, plus what Dagster can't see.

Dagster compares DataVersions and code versions along the edges; files, deleted artifacts and wide fan-ins it doesn't
see. `CachingStaleStatusResolver` is private, which is why Dagster is pinned; it caches, so a new one is made
whenever something may have been materialised since.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import dagster as dg
from dagster._core.definitions.data_version import (
    CODE_VERSION_TAG,
    CachingStaleStatusResolver,
    StaleCause,
    StaleCauseCategory,
    StaleStatus,
)
from dagster._core.definitions.partitions.context import partition_loading_context
from dagster._core.event_api import PartitionKeyFilter
from dagster._core.loader import LoadingContext
from dagster._core.storage.asset_check_execution_record import AssetCheckExecutionRecord, AssetCheckExecutionRecordStatus

from assets.plan import Plan
from assets.watches import CHECKS_READ, watch, watched_words
from puzzle_dag.store import fingerprint
from resources.workspace import Workspace

NEVER_RUN = "never run"
"""The reason of an item that nobody ever made."""
_ENDED = {AssetCheckExecutionRecordStatus.SUCCEEDED, AssetCheckExecutionRecordStatus.FAILED}


@dataclass(frozen=True, slots=True)
class Item:
    """One thing that can be stale: an asset, or one partition of it."""

    asset: str
    """Name without the profile's prefix."""
    partition: str | None = None
    """Partition key, or None for an unpartitioned asset."""

    def __str__(self) -> str:
        return self.asset if self.partition is None else f"{self.asset}[{self.partition}]"


class _Loading(LoadingContext):
    """What Dagster's resolver loads records through; its cache lives as long as one resolver."""

    def __init__(self, instance: dg.DagsterInstance) -> None:
        self._instance = instance
        self._loaders: dict = {}

    @property
    def instance(self) -> dg.DagsterInstance:
        return self._instance

    @property
    def loaders(self) -> dict:
        return self._loaders


class Staleness:
    """Questions about one profile's assets on one instance."""

    def __init__(self, plan: Plan, job: dg.JobDefinition, instance: dg.DagsterInstance, workspace: Workspace) -> None:
        """Ask about the assets of `job`, the implicit job of the profile's definitions."""
        self._plan, self._instance, self._workspace = plan, instance, workspace
        self._graph = job.asset_layer.asset_graph
        self._checks: dict[dg.AssetKey, list[dg.AssetCheckKey]] = {}
        for check in self._graph.asset_check_keys:
            self._checks.setdefault(check.asset_key, []).append(check)

    def assets(self) -> list[str]:
        """Return the assets' names, each after those that it depends on."""
        return [key.path[-1] for key in self._graph.toposorted_asset_keys if self._graph.get(key).is_materializable]

    def items(self, asset: str) -> list[Item]:
        """Return an asset's partitions of today, those that the profile asks for."""
        partitions = self._graph.get(self._plan.key(asset)).partitions_def
        if partitions is None:
            return [Item(asset)]
        keys = partitions.get_partition_keys(dynamic_partitions_store=self._instance)
        return [Item(asset, key) for key in keys if self._plan.asks_for(asset, key)]

    def parents(self, item: Item) -> list[Item]:
        """Return what an item is made from, by partition."""
        with partition_loading_context(dynamic_partitions_store=self._instance):
            found = self._graph.get_parents_partitions(self._plan.key(item.asset), item.partition).parent_partitions
        return [Item(p.asset_key.path[-1], p.partition_key) for p in found]

    def reasons(self, items: Sequence[Item]) -> dict[Item, list[str]]:
        """Return for each item why it must run; an empty list says that it needn't. Raises ConfigError."""
        resolver = CachingStaleStatusResolver(self._instance, self._graph, _Loading(self._instance))
        return {item: self._reasons(resolver, item) for item in items}

    def _reasons(self, resolver: CachingStaleStatusResolver, item: Item) -> list[str]:
        key = self._plan.key(item.asset)
        status = resolver.get_status(key, item.partition)
        if status == StaleStatus.MISSING:
            return [NEVER_RUN]
        causes = resolver.get_stale_causes(key, item.partition) if status == StaleStatus.STALE else []
        reasons = list(dict.fromkeys(self._words(item, cause) for cause in causes))
        record = self._workspace.shelf.find(item.asset, item.partition)
        if record is None:
            return [*reasons, "its record is gone"]
        if record.data_version != resolver.get_current_data_version(key, item.partition).value:
            reasons.append("its record is not of the latest materialization")
        gone = self._workspace.shelf.gone(record)
        if gone is not None:
            reasons.append(f"{gone} is gone or was changed")
        watched = watch(self._plan, self._workspace, item.asset, item.partition)
        if watched is not None and fingerprint(watched) != record.watched:
            reasons.append(watched_words(self._plan, item.asset, item.partition))
        return reasons

    def _words(self, item: Item, cause: StaleCause) -> str:
        if cause.category == StaleCauseCategory.CODE:
            return self._code_words(item)
        if cause.dependency is None:
            return cause.reason
        source = Item(cause.dependency.asset_key.path[-1], cause.dependency.partition_key)
        if cause.category == StaleCauseCategory.DATA:
            return f"{source} changed"
        return f"{source} is {'no more' if 'removed' in cause.reason else 'newly'} read"

    def _code_words(self, item: Item) -> str:
        """Return "code" where a stage's VERSION changed, "settings" where only the profile's settings of the asset did."""
        key = self._plan.key(item.asset)
        made = self._instance.get_latest_data_version_record(key, False, item.partition)
        tags = (made.asset_materialization.tags if made is not None and made.asset_materialization else None) or {}
        stages = [(version or "").rpartition(".")[0] for version in (tags.get(CODE_VERSION_TAG), self._graph.get(key).code_version)]
        return "code" if stages[0] != stages[1] else "settings"

    def outdated_checks(self, item: Item) -> dict[dg.AssetCheckKey, str]:
        """Return the checks whose verdict is older than what they judge or go by, or missing, and in words why."""
        made = self._materialized_s(item)
        outdated: dict[dg.AssetCheckKey, str] = {}
        for check in self._checks.get(self._plan.key(item.asset), []):
            judged = self._last_verdict(check, item)
            if judged is None or judged.event is None:
                outdated[check] = NEVER_RUN
                continue
            parents = [Item(asset, item.partition) for asset in CHECKS_READ.get((item.asset, check.name), ())]
            newer = [str(p) for p in parents if self._materialized_s(p) > judged.event.timestamp]
            if newer or made > judged.event.timestamp:
                outdated[check] = f"{newer[0]} changed" if newer else "not run since"
        return outdated

    def is_blocking(self, check: dg.AssetCheckKey) -> bool:
        """Say whether what follows must wait for a check to pass."""
        return self._graph.get(check).blocking

    def _materialized_s(self, item: Item) -> float:
        record = self._instance.get_latest_data_version_record(self._plan.key(item.asset), False, item.partition)
        return 0.0 if record is None else float(record.timestamp)

    def _last_verdict(self, check: dg.AssetCheckKey, item: Item) -> AssetCheckExecutionRecord | None:
        history = self._instance.event_log_storage.get_asset_check_execution_history(
            check, limit=1, status=_ENDED, partition_filter=PartitionKeyFilter(key=item.partition)
        )
        return next(iter(history), None)

    def failed_checks(self, item: Item) -> dict[str, bool]:
        """Return the checks whose latest run on this item did not pass, and whether each is blocking."""
        checks = self._checks.get(self._plan.key(item.asset), [])
        if not checks:
            return {}
        latest = self._instance.event_log_storage.get_latest_asset_check_execution_by_key(checks, PartitionKeyFilter(key=item.partition))
        return {key.name: self._graph.get(key).blocking for key, record in latest.items() if not self._passed(item, record)}

    def _passed(self, item: Item, record: AssetCheckExecutionRecord) -> bool:
        if record.status == AssetCheckExecutionRecordStatus.PLANNED:
            made = self._instance.get_latest_data_version_record(self._plan.key(item.asset), False, item.partition)
            if made is None or made.event_log_entry.run_id != record.run_id:
                # That run failed before it made anything. What there is was judged by the run that made it.
                record = self._last_verdict(record.key, item) or record
        return bool(record.status == AssetCheckExecutionRecordStatus.SUCCEEDED)
