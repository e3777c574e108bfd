"""The DuckDB file for people who ask questions: rebuilt from the Parquet files, which are the truth, and never written in place."""

import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import duckdb

_TABLE_NAME = re.compile(r"[a-z][a-z0-9_]*")


class TablesError(ValueError):
    """A table that can't be built; names the table and the file."""


def _load(connection: duckdb.DuckDBPyConnection, name: str, files: Sequence[Path]) -> int:
    """Create one table of all rows of some Parquet files; columns that a file lacks are NULL. Return the number of rows."""
    missing = [f for f in files if not f.is_file()]
    if missing:
        raise TablesError(f"table {name!r}: {missing[0]} is gone; materialize the asset that writes it again")
    try:
        query = f'CREATE TABLE "{name}" AS SELECT * FROM read_parquet($files, union_by_name = true)'
        connection.execute(query, {"files": [str(f) for f in files]})
    except duckdb.Error as error:
        names = ", ".join(f.name for f in files)
        raise TablesError(f"table {name!r}: {error}; one of {names} is damaged: materialize its asset again") from error
    counted = connection.execute(f'SELECT count(*) FROM "{name}"').fetchone()
    assert counted is not None
    return int(counted[0])


def build_tables(sources: Mapping[str, Sequence[Path]], path: Path) -> dict[str, int]:
    """Build a DuckDB file with one table for each entry, under a temporary name, and rename it over `path`.

    Readers that have the old file open keep reading it; there is never a half-built file under `path`.

    Args:
        sources: table name -> its Parquet files, in order; a table without files is left out.
        path: the DuckDB file.

    Returns:
        Table name -> number of rows.

    Raises:
        TablesError: a name is no plain lower-case name, or a file is missing or damaged. `path` stays as it was.
    """
    for name in sources:
        if not _TABLE_NAME.fullmatch(name):
            raise TablesError(f"table name {name!r} must be lower-case letters, digits and '_', starting with a letter")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as folder:
        temporary = Path(folder) / path.name
        with duckdb.connect(str(temporary)) as connection:
            num_rows = {name: _load(connection, name, files) for name, files in sources.items() if files}
        temporary.replace(path)
    return num_rows
