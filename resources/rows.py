"""Rows of results as Parquet: the truth, one atomic file a partition, so that writers never wait for each other."""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write rows (all of the same columns) to a Parquet file and return its path; readers see the old file or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".writing-") as folder:
        temporary = Path(folder) / path.name
        pq.write_table(pa.Table.from_pylist([dict(r) for r in rows]), temporary)
        temporary.replace(path)
    return path


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a Parquet file."""
    rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    return rows
