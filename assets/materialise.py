"""What every asset does last: put its record on the shelf and tell Dagster the DataVersion and the metadata."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import dagster as dg

from assets.plan import Naming
from assets.watches import watch
from puzzle_dag.peak_memory import peak_memory_bytes, reset_peak_memory
from puzzle_dag.store import fingerprint
from resources.workspace import Workspace


def partition_of(context: dg.AssetExecutionContext | dg.AssetCheckExecutionContext) -> str | None:
    """Return the partition that runs, or None for an unpartitioned asset."""
    return context.partition_key if context.has_partition_key else None


def materialised(
    context: dg.AssetExecutionContext,
    plan: Naming,
    workspace: Workspace,
    value: dict[str, Any],
    *,
    data_version: str | None = None,
    files: Iterable[Path] = (),
    metadata: Mapping[str, Any] | None = None,
    time: "Stopwatch | None" = None,
    engine_peak_bytes: int | None = None,
) -> dg.MaterializeResult:
    """Put `value` on the shelf and return what Dagster is told.

    Args:
        context: of the running asset.
        plan: the profile's plan.
        workspace: the profile's folders.
        value: what the assets that follow read; JSON.
        data_version: digest of what was made; by default the fingerprint of `value`.
        files: files that the value speaks of.
        metadata: shown in the UI.
        time: started when the work began, the wait for the device not counted; for work worth timing.
        engine_peak_bytes: most memory that one engine held, where the work ran engines.
    """
    name, partition = context.asset_key.path[-1], partition_of(context)
    version = data_version or fingerprint(value)
    watched = watch(plan, workspace, name, partition)
    effort: dict[str, Any] = {} if time is None else {"seconds": time.seconds, "peak_memory_bytes": time.peak_memory_bytes}
    if engine_peak_bytes:
        effort["engine_peak_bytes"] = engine_peak_bytes
    workspace.shelf.put(name, partition, value, data_version=version, files=files, watched=watched, **effort)
    shown = {**(metadata or {}), **effort}
    return dg.MaterializeResult(data_version=dg.DataVersion(version), metadata=shown)


class Stopwatch:
    """Seconds since it was made, and the most memory that this process held since then."""

    def __init__(self) -> None:
        """Start."""
        reset_peak_memory()
        self._start_s = perf_counter()

    @property
    def seconds(self) -> float:
        """Seconds so far."""
        return perf_counter() - self._start_s

    @property
    def peak_memory_bytes(self) -> int:
        """Largest resident size so far; vLLM's engines run in processes of their own and are not in it (`engine_peak_bytes`)."""
        return peak_memory_bytes()


def picture(png: bytes, caption: str) -> dg.MetadataValue:
    """Return a picture as Markdown that carries it along; it lies in the event log, so keep it small."""
    from puzzle_dag.report.html import markdown_image

    return dg.MetadataValue.md(markdown_image(png, caption))


def files_below(folder: Path) -> list[Path]:
    """Return all files of a folder."""
    return sorted(p for p in folder.rglob("*") if p.is_file())


def table(rows: Sequence[Mapping[str, Any]]) -> dg.MetadataValue:
    """Return rows as a Markdown table; numbers with four digits."""
    if not rows:
        return dg.MetadataValue.md("(no rows)")
    columns = list(rows[0])
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(_cell(row.get(c)) for c in columns) + " |" for row in rows]
    return dg.MetadataValue.md("\n".join(lines))


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value).replace("|", "\\|").replace("\n", " ")
