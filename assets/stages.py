"""What each stage took: seconds and memory, of this process and of the engines that it started, by the records of the last runs."""

from collections.abc import Iterator

from assets.plan import GROUPS
from puzzle_dag.report.html import Table
from puzzle_dag.report.tables import format_seconds
from resources.shelf import Record
from resources.workspace import Workspace


def _timed_records(workspace: Workspace) -> Iterator[tuple[str, list[Record]]]:
    """Yield each timed asset's records, in the order of the data flow."""
    for name in (n for names in GROUPS.values() for n in names):
        found = [workspace.shelf.find(name, p.stem) for p in sorted(workspace.shelf.path(name).parent.glob("*.json"))]
        records = [r for r in found if r is not None and r.seconds > 0]
        if records:
            yield name, records


def stage_seconds(workspace: Workspace) -> dict[str, float]:
    """Return the seconds that each asset took, all partitions together, in the order of the data flow."""
    return {name: sum(r.seconds for r in records) for name, records in _timed_records(workspace)}


def _gibibytes(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes else ""


def stage_table(workspace: Workspace) -> Table:
    """Return time and peak memory of each stage, over its partitions, and of all; engines have processes, and a column, of their own."""
    rows, most, seconds = [], (0, 0), 0.0
    for name, records in _timed_records(workspace):
        took = sum(r.seconds for r in records)
        peaks = (max(r.peak_memory_bytes for r in records), max(r.engine_peak_bytes for r in records))
        rows.append((name, format_seconds(took), *map(_gibibytes, peaks)))
        most, seconds = (max(most[0], peaks[0]), max(most[1], peaks[1])), seconds + took
    rows.append(("all", format_seconds(seconds), *map(_gibibytes, most)))
    return Table(("stage", "time", "peak memory, engines aside", "peak memory of an engine"), rows)
