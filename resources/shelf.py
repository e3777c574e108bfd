"""The shelf: what an asset wrote for the assets that follow, one small JSON record an (asset, partition).

A record holds the value (small: names, numbers, digests), the DataVersion that Dagster was told, and the files that
the value speaks of, so that a deleted or truncated file is found before someone needs it. Dagster's event log
says when and why; the record says what.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from puzzle_dag.store import fingerprint, write_atomically

_WHOLE = "all"


class RecordMissingError(ValueError):
    """A value that was never materialised, or whose record was deleted."""


@dataclass(frozen=True, slots=True)
class Record:
    """What one materialisation left behind."""

    value: dict[str, Any]
    """What the asset hands on."""
    data_version: str
    """The DataVersion that Dagster was told."""
    watched: str
    """Fingerprint of what the asset read beside its upstream assets (configuration, fan-ins), or ""."""
    files: dict[str, int]
    """Files the value speaks of: path relative to the shelf's folder -> size in bytes."""
    seconds: float = 0.0
    """What it took, the wait for the device not counted."""
    peak_memory_bytes: int = 0
    """Most memory that the process held meanwhile."""
    engine_peak_bytes: int = 0
    """Most memory that one of the engines held that it started, each in a process of its own; 0 where there was none."""

    @property
    def value_digest(self) -> str:
        """Fingerprint of the whole value, which may say more than the DataVersion (a solution's predictions, say), times aside."""
        return fingerprint(_without_times(self.value))


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_times(v) for k, v in value.items() if k != "seconds"}
    return [_without_times(v) for v in value] if isinstance(value, list) else value


class Shelf:
    """The records of one profile, under `<folder>/records/<asset>/<partition>.json`."""

    def __init__(self, folder: Path) -> None:
        """Use `folder`, which need not exist yet."""
        self.folder = folder

    def path(self, asset: str, partition: str | None = None) -> Path:
        """Return where a record lies or would lie."""
        return self.folder / "records" / asset / f"{partition or _WHOLE}.json"

    def find(self, asset: str, partition: str | None = None) -> Record | None:
        """Return a record, or None where there is none."""
        try:
            content = json.loads(self.path(asset, partition).read_text())
        except FileNotFoundError:
            return None
        return Record(**content)

    def value(self, asset: str, partition: str | None = None) -> dict[str, Any]:
        """Return what an asset handed on. Raises RecordMissingError."""
        record = self.find(asset, partition)
        if record is None:
            what = asset if partition is None else f"{asset}[{partition}]"
            raise RecordMissingError(f"{what} was never materialised; run `python -m assets refresh`")
        return record.value

    def put(
        self,
        asset: str,
        partition: str | None,
        value: dict[str, Any],
        *,
        data_version: str,
        files: Iterable[Path] = (),
        watched: Any = None,
        seconds: float = 0.0,
        peak_memory_bytes: int = 0,
        engine_peak_bytes: int = 0,
    ) -> Record:
        """Write a record; `files` must exist. `watched` is any JSON value, of which the fingerprint is kept."""
        sizes = {self._relative(path): path.stat().st_size for path in files}
        seen = "" if watched is None else fingerprint(watched)
        record = Record(value, data_version, seen, sizes, seconds, peak_memory_bytes, engine_peak_bytes)
        write_atomically(self.path(asset, partition), json.dumps(asdict(record), indent=1, sort_keys=True))
        return record

    def gone(self, record: Record) -> str | None:
        """Return the first file of a record that is missing or has another size, or None if all are there."""
        for name, size in record.files.items():
            path = self.folder / name
            if not path.is_file() or path.stat().st_size != size:
                return name
        return None

    def _relative(self, path: Path) -> str:
        # The store lies beside the profile's folder, so the way to it goes up first.
        return os.path.relpath(path.resolve(), self.folder.resolve())
