"""What was tried on the engine before anything was trained, as a section of a scenario's page."""

from collections.abc import Mapping, Sequence
from typing import Any

from puzzle_dag.report.html import Section, Table

Row = Mapping[str, Any]

_HEADER = (
    "search",
    "constraint",
    "asked for",
    "solved for",
    "predicted",
    "measured (95 % interval)",
    "turns",
    "measured / asked",
    "",
    "objective",
    "",
)


def trial_section(rows: Sequence[Row], words: str) -> Section:
    """Return what engines said of each child that was tried.

    Args:
        rows: a row a child and bound, as `search.trial.trial_rows` gives them; none where no engine was started.
        words: what came of it, or why nothing was tried; "" where nobody asked.
    """
    cells = [_cells(row) for row in rows]
    caption = "parent and child with dummy weights, in turns; multiples of the parent's where the bound is one"
    tables = [Table(_HEADER, cells, caption=caption)] if cells else []
    return Section("Tried on the engine before training", paragraphs=[words] if words else [], tables=tables)


def _cells(row: Row) -> tuple[object, ...]:
    return (
        "first" if row["round"] == 0 else f"repeated, {row['round']}",
        f"{row['constraint']} on {row['target']}, batch {row['batch']}",
        row["asked"],
        row["solved_for"],
        f"{row['predicted']:.4g}",
        f"{row['measured']:.4g} ({row['low']:.4g} to {row['high']:.4g})",
        row.get("num_turns", ""),  # rows of before turns were told have none
        f"{row['measured_over_asked']:.3f}",
        row["verdict"],
        f"{row['objective']:.4g}",
        "taken" if row["is_answer"] else "",
    )
