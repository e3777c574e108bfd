"""Jobs that a person starts in the UI: the refresh, and the form that adds a scenario. A sensor does both when a file in conf/ changes."""

from collections.abc import Collection
from typing import Any

import dagster as dg
import yaml
from pydantic import Field

from assets.form import form_fields
from assets.plan import DEVICE_POOL, Plan, dagster_name, make_plan
from assets.scenarios import write_scenario
from puzzle_dag.config import ForeignProfile, ForeignScenario, Scenario


class RefreshConfig(dg.Config):
    """What to refresh."""

    select: list[str] = Field(
        default_factory=list, description='Assets that may run: "asset", "asset[partition]" or "*[partition]"; all if empty.'
    )
    remake: list[str] = Field(default_factory=list, description="Assets that run even where they are fresh; what the store has, they take.")
    anew: list[str] = Field(
        default_factory=list, description="Assets that run and replace what the store has of them: train or measure anew."
    )


def refresh_and_tell(context: dg.OpExecutionContext, plan: Plan, *, only: str | None = None, **options: Collection[str]) -> None:
    """Refresh the plan's profile as it is on disk now, and tell the run's log.

    Args:
        context: of the running op.
        plan: says which profile.
        only: one scenario; the op then fails for that scenario's items alone.
        options: of `refresh`.

    Raises:
        dagster.Failure: an item failed or waits.
    """
    from assets.refresh import refresh

    def tell(outcome: Any) -> None:
        context.log.info(f"{outcome.item}: {outcome.state} ({'; '.join(outcome.reasons)}), {outcome.seconds:.1f} s")

    record = refresh(plan.root, plan.profile.name, context.instance, on_outcome=tell, **options)
    context.add_output_metadata({"ran": len(record.ran), "seconds": record.seconds, "items": dg.MetadataValue.json(record.ran)})
    unsettled = [o for o in (*record.of("failed"), *record.of("waits")) if only is None or o.item.partition == only]
    if unsettled:
        lines = [f"{o.item}: {o.reasons[0]}" for o in unsettled]
        raise dg.Failure(f"{len(lines)} items are not up to date: {lines[0]}", metadata={"items": dg.MetadataValue.json(lines)})


def refresh_job(plan: Plan) -> dg.JobDefinition:
    """Return the job that brings the profile up to date."""
    profile = plan.profile.name

    @dg.op(
        name=dagster_name("refresh", profile), pool=DEVICE_POOL, description="Bring everything that is stale up to date, and nothing else."
    )
    def refresh_op(context: dg.OpExecutionContext, config: RefreshConfig) -> None:
        refresh_and_tell(context, plan, select=config.select, remake=config.remake, anew=config.anew)

    @dg.job(
        name=dagster_name("refresh", profile, "job"), description=f"Refresh the profile {profile}.", executor_def=dg.in_process_executor
    )
    def job() -> None:
        refresh_op()

    return job


def add_scenario_job(plan: Plan) -> dg.JobDefinition:
    """Return the job whose Launchpad is the form of a scenario's file."""
    profile = plan.profile.name
    own = {
        "overwrite": dg.Field(bool, default_value=False, description="Replace a scenario of the same name."),
        "refresh": dg.Field(bool, default_value=True, description="Find and train its child at once; nothing else runs."),
    }
    is_foreign = isinstance(plan.profile, ForeignProfile)
    choices = {"library": (plan.profile.name,)} if is_foreign else {"target": plan.profile.targets}
    form = form_fields(ForeignScenario if is_foreign else Scenario, without=("version",), choices=choices)

    @dg.op(
        name=dagster_name("add_scenario", profile),
        pool=DEVICE_POOL,
        config_schema={**form, **own},
        description="Add a scenario, then solve it.",
    )
    def add_op(context: dg.OpExecutionContext) -> None:
        from assets.refresh import sync_partitions

        fields = {key: value for key, value in context.op_config.items() if key not in own}
        text = yaml.safe_dump({"version": 1, **{k: v for k, v in fields.items() if k != "name"}}, sort_keys=False)
        scenario, _ = write_scenario(plan.root, plan.profile.name, fields["name"], text, overwrite=context.op_config["overwrite"])
        sync_partitions(make_plan(plan.root, plan.profile.name), context.instance)
        context.log.info(f"scenario {scenario.name} is in conf/scenarios and in profile {plan.profile.name}")
        if context.op_config["refresh"]:
            refresh_and_tell(context, plan, only=scenario.name, select=[f"*[{scenario.name}]", "predicted_frontier", "frontier", "tables"])

    @dg.job(
        name=dagster_name("add_scenario", profile, "job"),
        description="Add a scenario: fill in the form in the Launchpad (Scaffold missing config), then launch.",
        executor_def=dg.in_process_executor,
    )
    def job() -> None:
        add_op()

    return job
