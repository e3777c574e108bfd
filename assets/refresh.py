"""The refresh: bring everything that is stale up to date, and nothing else.

One pass over the assets in topological order. When an asset's turn comes, all that it depends on is final, so each of
its partitions is judged exactly once: it waits if something it is made from is not up to date (failed, waiting, not
selected, or a blocking check did not pass), it runs if it is stale, it is left alone otherwise.
"""

import logging
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import dagster as dg
from dagster._core.errors import DagsterAssetCheckFailedError
from dagster._core.storage.tags import PARTITION_NAME_TAG

from assets.disk import require_disk_for
from assets.plan import OPT_IN_SCORES, OPT_IN_SEARCH, Plan
from assets.preflight import check_before
from assets.roots import CONFIGURATION, Roots
from assets.staleness import Item, Staleness
from assets.watches import GATHERERS
from puzzle_dag.engine.standby import find_standby
from puzzle_dag.preflight import DiskFullError
from resources.workspace import Workspace

_LOG = logging.getLogger(__name__)
_QUIET = {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}

State = Literal["fresh", "ran", "checked", "stale", "unchecked", "failed", "waits"]

ANEW = {
    "retrain": ("block_library", "uptrained_child"),
    "rescore": ("block_scores", "run_scores", "task_scores", "refinement"),
    "remeasure": ("block_costs", "trial", "parent_serving", "serving"),
    "regrade": ("parent_accuracy", "accuracy"),
}
"""What a person may ask to be made anew though the store has it: option -> assets. A re-run alone takes what is stored."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a refresh found of one item, and did."""

    item: Item
    """The asset or partition."""
    state: State
    """`checked`: up to date, only its checks ran. `stale` and `unchecked` are only seen in a dry run or outside the selection."""
    reasons: tuple[str, ...] = ()
    """Why it ran, failed or waits."""
    seconds: float = 0.0
    """Time it took."""
    waits_for: tuple[Item, ...] = ()
    """What it is made from and is not up to date, or has a blocking check to come."""
    checks: tuple[str, ...] = ()
    """Of `unchecked`: the checks whose verdict is missing or older than what they go by."""


@dataclass(slots=True)
class RefreshRecord:
    """What a refresh did, in order."""

    outcomes: list[Outcome] = field(default_factory=list)
    """One entry an item."""
    seconds: float = 0.0
    """Time of the whole refresh."""
    failed_checks: list[str] = field(default_factory=list)
    """Checks that did not pass, blocking or not: "accuracy[fast]: retention"."""

    def of(self, state: State) -> list[Outcome]:
        """Return the outcomes of one state."""
        return [o for o in self.outcomes if o.state == state]

    @property
    def ran(self) -> list[str]:
        """Names of the items that ran: "block_library[L03]"."""
        return [str(o.item) for o in self.of("ran")]

    @property
    def ok(self) -> bool:
        """Say whether nothing failed and nothing waits; checks that block nothing don't count."""
        return not (self.of("failed") or self.of("waits"))


def sync_partitions(plan: Plan, instance: dg.DagsterInstance) -> None:
    """Make the dynamic partition sets what the profile names: new targets and scenarios in, former ones out."""
    for definition, names in ((plan.partitions.targets, plan.profile.targets), (plan.partitions.scenarios, plan.profile.scenarios)):
        assert definition.name is not None
        there = set(instance.get_dynamic_partitions(definition.name))
        instance.add_dynamic_partitions(definition.name, [n for n in names if n not in there])
        for name in there - set(names):
            instance.delete_dynamic_partition(definition.name, name)


class Refresh:
    """One refresh of one profile."""

    def __init__(
        self,
        plan: Plan,
        definitions: dg.Definitions,
        instance: dg.DagsterInstance,
        *,
        select: Collection[str] = (),
        remake: Collection[str] = (),
        anew: Collection[str] = (),
        max_attempts: int = 2,
        on_outcome: Callable[[Outcome], None] = lambda _: None,
    ) -> None:
        """Prepare.

        Args:
            plan: the profile's plan, from which `definitions` were made.
            definitions: the profile's assets.
            instance: the Dagster instance that knows what was materialised.
            select: names of assets that may run, "asset[partition]", or "*[partition]"; all if empty.
            remake: items that run even where they are fresh; what the store has, they take from there.
            anew: items that run, and replace what the store has of them; see `ANEW` for those that have something there.
            max_attempts: runs of an item before it counts as failed; a ValueError (bad input, no solution) is not retried.
            on_outcome: called with each item that ran, failed or waits, as it happens.

        Raises:
            ValueError: `select`, `remake` or `anew` names no asset.
        """
        self._plan, self._instance = plan, instance
        self._workspace = Workspace(root=str(plan.root), profile=plan.profile.name)
        self._job = definitions.resolve_implicit_global_asset_job_def()
        self._staleness = Staleness(plan, self._job, instance, self._workspace)
        self._select, self._anew, self._max_attempts, self._on_outcome = set(select), set(anew), max_attempts, on_outcome
        assets = self._staleness.assets()
        # `--rescore` names all scores that there may be; those that the profile doesn't ask for are no mistake.
        self._anew -= {*OPT_IN_SCORES, *OPT_IN_SEARCH} - set(assets)
        self._remake = {*remake, *self._anew}
        for name in (*self._select, *self._remake):
            if name.partition("[")[0] not in (*assets, "*"):
                raise ValueError(f"there is no asset {name!r}; there are: {', '.join(assets)}")
        self._record = RefreshRecord()
        self._unsettled: dict[Item, str] = {}
        self._roots = Roots(plan.groups[CONFIGURATION])
        self._unjudged: set[Item] = set()
        self._disk_full = ""

    def run(self, *, dry: bool = False) -> RefreshRecord:
        """Refresh, or with `dry` only say what is stale.

        Raises:
            ConfigError, VllmMissingError, DiskFullError, CorpusTooShortError: what would fail later; nothing ran.
        """
        start_s = time.perf_counter()
        check_before(self._plan, self._workspace, may_run=self._may_run, dry=dry)
        sync_partitions(self._plan, self._instance)
        for asset in self._staleness.assets():
            found = self._staleness.reasons(self._staleness.items(asset))
            self._disk_full = "" if dry else self._find_full_disk(found)
            for item, reasons in found.items():
                self._settle(item, reasons, dry)
        self._record.seconds = time.perf_counter() - start_s
        return self._record

    def _may_run(self, asset: str) -> bool:
        """Say whether an asset, or a partition of it, is selected."""
        return not self._select or bool({name.partition("[")[0] for name in self._select} & {asset, "*"})

    def _is_selected(self, item: Item) -> bool:
        return not self._select or self._among(item, self._select)

    def _find_full_disk(self, found: dict[Item, list[str]]) -> str:
        """Return why what an asset's stale partitions make can't be written, "" where it can."""
        stale = [item for item, reasons in found.items() if (reasons or self._among(item, self._remake)) and self._is_selected(item)]
        try:
            if isinstance(self._plan, Plan):
                require_disk_for(self._plan, self._workspace, stale)
        except DiskFullError as error:
            return f"{type(error).__name__}: {error}"
        return ""

    def _settle(self, item: Item, reasons: list[str], dry: bool) -> None:
        parents = self._staleness.parents(item)
        waits_for = [p for p in parents if p in self._unsettled]
        if self._among(item, self._remake):
            reasons = [*reasons, "asked for"]
        if waits_for and not self._may_gather(item, waits_for):
            if dry and all(self._unsettled[p] == "stale" for p in waits_for):
                self._note(Outcome(item, "stale", self._roots.add(item, reasons, parents), waits_for=tuple(waits_for)))
                return
            because = tuple(f"waits for {p} ({self._unsettled[p]})" for p in waits_for[:3])
            self._note(Outcome(item, "waits", because, waits_for=tuple(waits_for)))
            return
        may_run = not dry and self._is_selected(item)
        if not reasons:
            self._note(self._look_again(item, may_run))
        elif not may_run:
            unjudged = tuple(p for p in parents if p in self._unjudged)
            self._note(Outcome(item, "stale", self._roots.add(item, reasons, parents), waits_for=unjudged))
        else:
            self._note(self._make(item, reasons))
        if item not in self._unsettled:
            self._heed_checks(item)

    def _look_again(self, item: Item, may_run: bool) -> Outcome:
        """Evaluate the checks of an item that is up to date where what they go by is newer than their verdict."""
        outdated = self._staleness.outdated_checks(item)
        reasons = tuple(f"check {key.name}: {reason}" for key, reason in outdated.items())
        if not outdated:
            return Outcome(item, "fresh")
        if not may_run:
            if any(self._staleness.is_blocking(key) for key in outdated):
                self._unjudged.add(item)
            return Outcome(item, "unchecked", reasons, checks=tuple(key.name for key in outdated))
        checks = self._job.get_subset(asset_selection=set(), asset_check_selection=set(outdated))
        return self._execute(item, list(reasons), "checked", checks)

    def _heed_checks(self, item: Item) -> None:
        failed = self._staleness.failed_checks(item)
        self._record.failed_checks += [f"{item}: {name}" for name in failed]
        if any(failed.values()):
            self._unsettled[item] = f"check {', '.join(n for n, blocking in failed.items() if blocking)} did not pass"

    def _may_gather(self, item: Item, waits_for: list[Item]) -> bool:
        # What failed stays failed, so a gatherer takes what there is; what is merely not selected, it waits for.
        return item.asset in GATHERERS and all(self._unsettled[p] != "stale" for p in waits_for)

    def _among(self, item: Item, names: set[str]) -> bool:
        return bool({item.asset, str(item), f"*[{item.partition}]"} & names)

    def _note(self, outcome: Outcome) -> None:
        self._record.outcomes.append(outcome)
        if outcome.state in ("failed", "waits", "stale"):
            self._unsettled[outcome.item] = outcome.state
        if outcome.state != "fresh":
            self._on_outcome(outcome)

    def _make(self, item: Item, reasons: list[str]) -> Outcome:
        record = self._workspace.shelf.find(item.asset, item.partition)
        if record is not None:
            self._workspace.discard_damaged(record)
        if self._disk_full:
            return Outcome(item, "failed", (self._disk_full,))
        return self._execute(item, reasons, "ran", self._job, [self._plan.key(item.asset)])

    def _execute(
        self, item: Item, reasons: list[str], done: State, job: dg.JobDefinition, assets: list[dg.AssetKey] | None = None
    ) -> Outcome:
        start_s = time.perf_counter()
        config: dict[str, Any] = dict(_QUIET)
        if self._among(item, self._anew):
            workspace = {"root": self._workspace.root, "profile": self._workspace.profile, "anew": True}
            config["resources"] = {"workspace": {"config": workspace}}
        tags = {"puzzle_dag/refresh": self._plan.profile.name}
        if assets is None and item.partition is not None:
            # A run of checks alone has no assets by which Dagster could look the partition up; the tag is all that it needs.
            tags[PARTITION_NAME_TAG] = item.partition
        for attempt in range(1, self._max_attempts + 1):
            try:
                job.execute_in_process(
                    instance=self._instance,
                    asset_selection=assets,
                    partition_key=item.partition if assets else None,
                    run_config=config,
                    raise_on_error=True,
                    tags=tags,
                )
                return Outcome(item, done, tuple(reasons), time.perf_counter() - start_s)
            except DagsterAssetCheckFailedError:
                # It was materialized; what the check that did not pass keeps from running, `_heed_checks` sees to.
                return Outcome(item, done, tuple(reasons), time.perf_counter() - start_s)
            except Exception as error:
                _LOG.warning("%s failed (attempt %d of %d)", item, attempt, self._max_attempts, exc_info=not isinstance(error, ValueError))
                problem = f"{type(error).__name__}: {error}"
                if isinstance(error, ValueError):
                    break
        return Outcome(item, "failed", (problem,), time.perf_counter() - start_s)


def refresh(
    root: Path,
    profile: str,
    instance: dg.DagsterInstance,
    *,
    select: Collection[str] = (),
    remake: Collection[str] = (),
    anew: Collection[str] = (),
    dry: bool = False,
    on_outcome: Callable[[Outcome], None] = lambda _: None,
) -> RefreshRecord:
    """Bring a profile up to date on an instance; see `Refresh`.

    Raises:
        ConfigError, VllmMissingError, DiskFullError, CorpusTooShortError: something is wrong with the configuration, the machine or
            the text; nothing ran.
    """
    from assets.definitions import build_definitions
    from assets.plan import make_plan

    plan = make_plan(root, profile)
    wanted = Refresh(plan, build_definitions(plan), instance, select=select, remake=remake, anew=anew, on_outcome=on_outcome)
    with find_standby().keep():
        return wanted.run(dry=dry)
