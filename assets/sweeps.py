"""Sweeps: write the scenarios of a range into conf/scenarios/, retire those that fell out of it, and refresh; nightly, or by command."""

from dataclasses import dataclass
from pathlib import Path

import dagster as dg
import yaml

from assets.launching import refresh_and_tell
from assets.plan import DEVICE_POOL, Plan, dagster_name
from assets.scenarios import remove_scenario, validate_scenario, write_scenario
from puzzle_dag.config import ConfigError, read_any_profile
from puzzle_dag.config.sweep import Sweep, read_sweep, read_sweeps


@dataclass(frozen=True, slots=True)
class SweptScenarios:
    """What writing a sweep's scenarios did, by name."""

    written: tuple[str, ...]
    """New, or with other content than before."""
    unchanged: tuple[str, ...]
    """There already, just so."""
    retired: tuple[str, ...]
    """Of the sweep's former range."""


def write_sweep(root: Path, sweep: Sweep) -> SweptScenarios:
    """Make conf/scenarios/ and the profile's list what a sweep says; a second time changes nothing.

    Raises:
        ConfigError: one of the scenarios isn't valid, or a file of its name was not written by this sweep; nothing was written.
    """
    folder, texts = root / "conf" / "scenarios", _texts(sweep)
    for name, text in texts.items():
        validate_scenario(root, sweep.profile, name, text, where=f"sweep {sweep.name}, scenario {name}")
        if (folder / f"{name}.yaml").exists() and not _wrote(sweep, folder / f"{name}.yaml"):
            raise ConfigError(f"{folder / name}.yaml was not written by sweep {sweep.name}; rename the file or the sweep")
    listed = read_any_profile(root / "conf", sweep.profile).scenarios
    former = [n for n in listed if n not in texts and (folder / f"{n}.yaml").exists() and _wrote(sweep, folder / f"{n}.yaml")]
    changed = {name: write_scenario(root, sweep.profile, name, text, overwrite=True)[1] for name, text in texts.items()}
    for name in former:
        remove_scenario(root, sweep.profile, name)
    return SweptScenarios(tuple(n for n in changed if changed[n]), tuple(n for n in changed if not changed[n]), tuple(former))


def _mark(sweep: Sweep) -> str:
    return f"# Written by the sweep conf/sweeps/{sweep.name}.yaml, which overwrites what is changed here.\n"


def _wrote(sweep: Sweep, path: Path) -> bool:
    return path.read_text().startswith(_mark(sweep))


def _texts(sweep: Sweep) -> dict[str, str]:
    try:
        scenarios = sweep.scenarios()
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return {name: _mark(sweep) + yaml.safe_dump(fields, sort_keys=False) for name, fields in scenarios.items()}


def sweep_schedules(plan: Plan) -> list[dg.ScheduleDefinition]:
    """Return for each sweep of the profile a schedule, off until it is switched on, with its job. Raises ConfigError."""
    return [_schedule(plan, sweep) for sweep in read_sweeps(plan.root / "conf", plan.profile.name)]


def _schedule(plan: Plan, sweep: Sweep) -> dg.ScheduleDefinition:
    @dg.op(
        name=dagster_name("sweep", sweep.name), pool=DEVICE_POOL, description=f"Write the scenarios of sweep {sweep.name}, then refresh."
    )
    def sweep_op(context: dg.OpExecutionContext) -> None:
        # Read again: the range may have changed since this code location was loaded.
        swept = write_sweep(plan.root, read_sweep(plan.root / "conf", sweep.name))
        context.log.info(f"{len(swept.written)} scenarios written, {len(swept.unchanged)} as before, {len(swept.retired)} retired")
        refresh_and_tell(context, plan)

    @dg.job(
        name=dagster_name("sweep", sweep.name, "job"),
        description=sweep.description or f"Sweep {sweep.sets}.",
        executor_def=dg.in_process_executor,
    )
    def sweep_job() -> None:
        sweep_op()

    return dg.ScheduleDefinition(
        name=dagster_name("sweep", sweep.name, "schedule"),
        job=sweep_job,
        cron_schedule=sweep.cron,
        execution_timezone=sweep.timezone,
        description=f"Sweeps {sweep.sets} from {sweep.values.first} to {sweep.values.last}; runs only what is new or stale.",
    )
