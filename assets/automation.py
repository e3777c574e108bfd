"""One click and no click: the refresh as a job of the UI, and a sensor that asks for it when a file in conf/ changes."""

from pathlib import Path

import dagster as dg
from pydantic import Field

from assets.plan import DEVICE_POOL, Plan
from puzzle_dag.store import digest_file, fingerprint


def digest_configuration(conf: Path) -> str:
    """Return the digest of every YAML file under conf/."""
    return fingerprint({str(path.relative_to(conf)): digest_file(path) for path in sorted(conf.rglob("*.yaml"))})


class RefreshConfig(dg.Config):
    """What to refresh."""

    select: list[str] = Field(default_factory=list)
    """Assets that may run, as "asset" or "asset[partition]"; empty for all."""
    remake: list[str] = Field(default_factory=list)
    """Assets that run even where they are fresh."""


def automation(plan: Plan) -> tuple[dg.JobDefinition, dg.SensorDefinition]:
    """Return the profile's refresh job and the sensor on conf/ that starts it (off until it is switched on)."""
    name = plan.profile.name.replace("-", "_").replace(".", "_")

    @dg.op(name=f"refresh_{name}", pool=DEVICE_POOL, description="Bring everything that is stale up to date, and nothing else.")
    def refresh_op(context: dg.OpExecutionContext, config: RefreshConfig) -> None:
        from assets.refresh import refresh

        def tell(outcome) -> None:
            context.log.info(f"{outcome.item}: {outcome.state} ({'; '.join(outcome.reasons)}), {outcome.seconds:.1f} s")

        record = refresh(plan.root, plan.profile.name, context.instance, select=config.select, remake=config.remake, on_outcome=tell)
        context.add_output_metadata({"ran": len(record.ran), "seconds": record.seconds, "items": dg.MetadataValue.json(record.ran)})
        if not record.ok:
            unsettled = [f"{o.item}: {o.reasons[0]}" for o in (*record.of("failed"), *record.of("waits"))]
            raise dg.Failure(
                f"{len(unsettled)} items are not up to date: {unsettled[0]}", metadata={"items": dg.MetadataValue.json(unsettled)}
            )

    @dg.job(name=f"refresh_{name}_job", description=f"Refresh the profile {plan.profile.name}.", executor_def=dg.in_process_executor)
    def refresh_job() -> None:
        refresh_op()

    @dg.sensor(
        name=f"conf_{name}_sensor", job=refresh_job, minimum_interval_seconds=15, description="Refreshes when a file in conf/ changes."
    )
    def conf_sensor(context: dg.SensorEvaluationContext) -> dg.RunRequest | dg.SkipReason:
        digest = digest_configuration(plan.root / "conf")
        if context.cursor == digest:
            return dg.SkipReason("no file in conf/ changed")
        context.update_cursor(digest)
        return dg.RunRequest(run_key=f"{plan.profile.name}:{digest}")

    return refresh_job, conf_sensor
