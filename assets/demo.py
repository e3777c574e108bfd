"""`python -m assets demo`: refresh a profile, then print what came out, on which machine, how long it took, and where to look."""

from collections.abc import Callable
from pathlib import Path

from assets.plan import make_plan
from assets.refresh import Outcome, RefreshRecord, refresh
from assets.reports import results_table, scenario_facts
from assets.stages import stage_table
from puzzle_dag.config import ConfigError, is_foreign
from puzzle_dag.engine.client import VllmMissingError, read_engine_version
from puzzle_dag.engine.hardware import detect_hardware, measure_matmul_rate
from puzzle_dag.report.tables import format_seconds, text_table
from resources.instance import open_instance
from resources.workspace import Workspace

_MATMUL_S = 1.5


def describe_machine() -> dict[str, str]:
    """Return the hardware, its measured matrix-product rate and the engine, by name."""
    try:
        engine = read_engine_version()
    except VllmMissingError:
        engine = "none"
    rate = f"{measure_matmul_rate(seconds=_MATMUL_S) / 1e9:.0f} GFLOP/s (bf16, measured)"
    return {"hardware": detect_hardware().name, "matrix product": rate, "engine": engine}


def run_demo(root: Path, profile: str, say: Callable[[str], None]) -> RefreshRecord:
    """Refresh, then say the results: table, machine, time of each stage, path of the report.

    Raises:
        ConfigError: a configuration file is wrong; nothing ran.
    """

    def tell(outcome: Outcome) -> None:
        why = "" if outcome.state == "ran" else f"  {'; '.join(outcome.reasons)}"
        say(f"{outcome.state:>6}  {outcome.item}  {format_seconds(outcome.seconds)}{why}")

    if is_foreign(root / "conf", profile):
        raise ConfigError(
            f"profile {profile} is a foreign library, without a child to show; run `python -m assets refresh --profile {profile}`"
        )
    with open_instance(root) as instance:
        record = refresh(root, profile, instance, on_outcome=tell)
    plan, workspace = make_plan(root, profile), Workspace(root=str(root), profile=profile)
    facts = [f for f in (scenario_facts(plan, workspace, name) for name in plan.profile.scenarios) if f is not None]
    machine, efforts = describe_machine(), stage_table(workspace)
    results = results_table(plan, workspace, facts)
    say("")
    if facts:
        say(text_table(results.header, results.rows))
        say(f"({results.caption})\n")
    say(text_table(efforts.header, efforts.rows))
    say("\n" + "\n".join(f"{name}: {value}" for name, value in machine.items()))
    if facts:
        say(f"report: {workspace.var / 'reports' / 'index.html'}")
    for check in record.failed_checks:
        say(f"check {check} did not pass")
    say(f"this refresh: {len(record.ran)} materialized, {len(record.of('failed'))} failed, {format_seconds(record.seconds)}")
    return record
