"""What the assets that an engine measures for read beside their upstream assets: its version, what was imported, and what is asked."""

from typing import Any

from assets.plan import Plan
from assets.served import asked_serving
from puzzle_dag.config.scenario import TIMED
from puzzle_dag.store import fingerprint
from resources.workspace import Workspace


def watch_block_costs(plan: Plan, workspace: Workspace, partition: str | None) -> dict[str, Any]:
    """Return whether a target's costs have to be analytic, and which were imported for it, so that another file is used at once."""
    from puzzle_dag.costs.imports import find_import_digest

    assert partition is not None
    digest = find_import_digest(plan.shape, workspace.read_target(partition), workspace.store)
    imported = {} if digest is None else {"imported": digest}
    return {"analytic": digest is None and _has_to_be_analytic(workspace, partition), **imported}


def _has_to_be_analytic(workspace: Workspace, partition: str) -> bool:
    """Say whether a scenario accepts analytic costs of a target that nobody measured; asked where no costs of it are imported."""
    scenarios = [workspace.read_scenario(name) for name in workspace.read_profile().scenarios]
    if not any(partition in s.targets and s.costs == "analytic" for s in scenarios):
        return False
    from puzzle_dag.costs.obtain import is_measurable

    record, target = workspace.shelf.find("block_costs", partition), workspace.read_target(partition)
    of_today = record is not None and record.value["target_spec"] == fingerprint(target.model_dump(mode="json"))
    # Imported costs on record are of an import that is gone.
    measured = of_today and record is not None and record.value.get("source", "measured") == "measured"
    return not (measured or is_measurable(target))


def watch_engine(plan: Plan, workspace: Workspace, _: str | None = None) -> dict[str, Any] | None:
    """Return the engine's version: what another one measured is not what this one takes. None where none is installed to compare with."""
    from puzzle_dag.engine.client import VllmMissingError, read_engine_version

    try:
        return {"engine_version": read_engine_version()}
    except VllmMissingError:
        return None


def watch_costs_and_engine(plan: Plan, workspace: Workspace, partition: str | None) -> dict[str, Any] | None:
    """Return whether a target's costs have to be analytic and, where not, the version of the engine that measures them."""
    wanted = watch_block_costs(plan, workspace, partition)
    engine = {} if wanted["analytic"] else watch_engine(plan, workspace)
    return None if engine is None else {**wanted, **engine}


def watch_serving(plan: Plan, workspace: Workspace, partition: str | None) -> dict[str, Any] | None:
    """Return on which target and for which bounds on time a scenario's child is measured, and the engine's version."""
    assert partition is not None
    engine, scenario = watch_engine(plan, workspace), workspace.read_scenario(partition)
    return None if engine is None else {"target": scenario.target, **asked_serving(scenario), **engine}


def watch_trial(plan: Plan, workspace: Workspace, partition: str | None) -> dict[str, Any] | None:
    """Return the engine's version where a scenario bounds time; None where it doesn't, since then nothing is tried."""
    assert partition is not None
    is_timed = any(name in TIMED for name, _ in workspace.read_scenario(partition).bounds)
    return watch_engine(plan, workspace) if is_timed else None
