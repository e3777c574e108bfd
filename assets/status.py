"""`python -m assets status`: what is stale, why, and how long it will take, without running anything."""

from collections.abc import Sequence
from pathlib import Path

import dagster as dg

from assets.definitions import build_definitions
from assets.estimates import PastRuns
from assets.plan import make_plan
from assets.refresh import Refresh
from puzzle_dag.report.tables import format_seconds, text_table

_LINE = 140
"""Characters of reasons that fit beside an item and its time in a terminal."""


def _shortened(reasons: Sequence[str]) -> str:
    """Return reasons in one line: as many as fit, and how many more there are."""
    shown = [r for i, r in enumerate(reasons) if i == 0 or len("; ".join(reasons[: i + 1])) <= _LINE]
    hidden = len(reasons) - len(shown)
    return "; ".join([*shown, f"{hidden} more"] if hidden else shown)


def describe_status(root: Path, profile: str, instance: dg.DagsterInstance) -> list[str]:
    """Return lines to print: a table of what a refresh would run, checks that did not pass, and a sum.

    Raises:
        ConfigError: a configuration file is wrong.
    """
    plan = make_plan(root, profile)
    record = Refresh(plan, build_definitions(plan), instance).run(dry=True)
    past, unchecked = PastRuns(plan, instance), record.of("unchecked")
    stale = [o for o in record.outcomes if o.state not in ("fresh", "unchecked")]
    seconds = [past.seconds(o.item) for o in stale]
    times = ["unknown" if s is None else format_seconds(s) for s in seconds] + ["checks only"] * len(unchecked)
    lines = []
    if times:
        rows = [(str(o.item), _shortened(o.reasons), time) for o, time in zip([*stale, *unchecked], times, strict=True)]
        lines += [text_table(("to bring up to date", "why", "up to"), rows), ""]
    lines += [f"check {check} did not pass" for check in record.failed_checks]
    known, num_unknown = sum(s for s in seconds if s is not None), seconds.count(None)
    summary = f"{len(stale)} of {len(record.outcomes)} to bring up to date"
    if num_unknown < len(stale):
        summary += f": up to {format_seconds(known)} by past runs" + (f", {num_unknown} of them unknown" if num_unknown else "")
    elif stale:
        summary += "; no past runs to tell the time from"
    return [*lines, summary]
