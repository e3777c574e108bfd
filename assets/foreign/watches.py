"""What the assets of a foreign library read that no Dagster edge tells of; see assets/watches.py."""

from typing import Any

from assets.foreign.plan import ForeignPlan
from puzzle_dag.config import misfit, read_foreign_scenario
from puzzle_dag.store import digest_file
from resources.workspace import Workspace


def watch_library_file(plan: ForeignPlan, workspace: Workspace, _: str | None = None) -> dict[str, Any]:
    """Return the library's file and its digest. Raises ConfigError where it isn't there."""
    profile = workspace.read_foreign_profile()
    path = workspace.root_folder / profile.library_file
    if not path.is_file():
        why = f"is {profile.library_file}, which is not a file below the project's root"
        raise misfit(workspace.profile_file, ("library_file",), why, owner=f"profile {profile.name}")
    return {"file": profile.library_file, "digest": digest_file(path)}


def watch_foreign_scenario(plan: ForeignPlan, workspace: Workspace, partition: str | None) -> dict[str, Any]:
    """Return one scenario, validated."""
    assert partition is not None
    return read_foreign_scenario(workspace.conf, partition).model_dump(mode="json")


def watch_foreign_frontier(plan: ForeignPlan, workspace: Workspace, _: str | None = None) -> dict[str, Any]:
    """Return the scenarios that the profile names today, and what is known of each."""
    names, shelf = workspace.read_foreign_profile().scenarios, workspace.shelf
    found = {f"{asset}/{n}": shelf.find(asset, n) for asset in ("scenario_spec", "solution") for n in names}
    return {"scenarios": list(names), "records": {name: r.value_digest for name, r in found.items() if r is not None}}
