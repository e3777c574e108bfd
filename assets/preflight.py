"""What a refresh checks before any compute: the configuration, the disk, the engine, and that there is enough text."""

from collections.abc import Callable

from assets.disk import require_disk_for_all
from assets.foreign.library import check_foreign_profile
from assets.foreign.plan import ForeignPlan
from assets.plan import Plan
from assets.shortage import check_items, check_text
from puzzle_dag.preflight import check_profile
from resources.workspace import Workspace

_ENGINE = ("block_costs", "trial", "parent_serving", "serving")


def check_before(plan: Plan | ForeignPlan, workspace: Workspace, *, may_run: Callable[[str], bool], dry: bool) -> None:
    """Find before any compute what would fail in the middle of it.

    Args:
        plan: the profile's plan.
        workspace: the profile's folders.
        may_run: says of an asset whether this refresh may run it.
        dry: nothing will run, so that the configuration alone counts.

    Raises:
        ConfigError: files don't fit each other or the parent, or ask for items that there aren't.
        VllmMissingError: something is to be measured, and there is no engine.
        DiskFullError: what is still to be written doesn't fit on the disk.
        CorpusTooShortError: there is too little text for a budget.
    """
    if isinstance(plan, ForeignPlan):
        check_foreign_profile(workspace)
        return
    check_profile(workspace.conf, plan.profile, plan.shape)
    if dry:
        return
    require_disk_for_all(plan, workspace, may_run)
    if any(may_run(asset) for asset in _ENGINE):
        from puzzle_dag.engine.client import read_engine_version

        read_engine_version()
    check_text(plan, workspace, may_run)
    check_items(plan, workspace, may_run)
