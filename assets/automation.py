"""No click: a sensor that follows conf/, so that a dropped, edited or deleted file is all that it takes."""

from pathlib import Path

import dagster as dg

from assets.plan import Plan, dagster_name
from assets.scenarios import adopt_scenarios
from puzzle_dag.config import ConfigError
from puzzle_dag.store import digest_file, fingerprint


def digest_configuration(conf: Path) -> str:
    """Return the digest of every YAML file under conf/."""
    return fingerprint({str(path.relative_to(conf)): digest_file(path) for path in sorted(conf.rglob("*.yaml"))})


def conf_sensor(plan: Plan, refresh_job: dg.JobDefinition) -> dg.SensorDefinition:
    """Return the sensor that starts `refresh_job` when a file in conf/ changes; off until it is switched on.

    A scenario's file that was dropped into conf/scenarios/ joins the profile, one that was deleted leaves it.
    """
    name = plan.profile.name

    @dg.sensor(
        name=dagster_name("conf", name, "sensor"),
        job=refresh_job,
        minimum_interval_seconds=15,
        description="When a file in conf/ changes: takes new scenarios in and deleted ones out, then refreshes.",
    )
    def sensor(context: dg.SensorEvaluationContext) -> dg.RunRequest | dg.SkipReason:
        if context.cursor == digest_configuration(plan.root / "conf"):
            return dg.SkipReason("no file in conf/ changed")
        try:
            adoption = adopt_scenarios(plan.root, name)
        except ConfigError as error:
            # The cursor stays, so that the next tick looks again.
            return dg.SkipReason(f"nothing runs until this is put right: {error}")
        for problem in adoption.problems:
            context.log.warning(f"left out: {problem}")
        if adoption.added or adoption.retired:
            context.log.info(f"new: {', '.join(adoption.added) or 'none'}; retired: {', '.join(adoption.retired) or 'none'}")
        context.update_cursor(digest_configuration(plan.root / "conf"))
        # Without a run key: Dagster launches one only once, also if that run failed, but conf/ may go back to a state that it had before.
        return dg.RunRequest()

    return sensor
