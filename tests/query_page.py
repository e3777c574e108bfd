"""The schema section of docs/queries.md: read it, compare it with a DuckDB file, write it anew.

`python tests/query_page.py FILE.duckdb` rewrites the section from a file, keeps every description that is there, and marks what
has none with "?".
"""

import re
import sys
from pathlib import Path

import duckdb

PAGE = Path(__file__).parents[1] / "docs" / "queries.md"
HEADING = "## The schema\n"
_ROW = re.compile(r"\| `(\w+)` \| (\w+(?:\[\])?) \| (.*) \|")

Schema = dict[str, dict[str, str]]
"""Table -> column -> type."""


def read_database(path: Path) -> Schema:
    """Return the schema of a DuckDB file."""
    with duckdb.connect(str(path), read_only=True) as connection:
        rows = connection.execute(
            "SELECT table_name, column_name, data_type FROM information_schema.columns ORDER BY table_name, ordinal_position"
        ).fetchall()
    found: Schema = {}
    for table, column, kind in rows:
        found.setdefault(table, {})[column] = kind
    return found


def read_page(text: str) -> tuple[Schema, dict[tuple[str, str], str]]:
    """Return the schema that the page tells of, and the description of each (table, column)."""
    schema: Schema = {}
    words: dict[tuple[str, str], str] = {}
    table = ""
    for line in text.partition(HEADING)[2].splitlines():
        if line.startswith("### "):
            table = line.strip("# `")
            schema[table] = {}
        elif match := _ROW.fullmatch(line):
            column, kind, description = match.groups()
            schema[table][column], words[table, column] = kind, description
    return schema, words


def read_queries(text: str) -> list[str]:
    """Return the SQL of the page."""
    return re.findall(r"```sql\n(.*?)```", text, re.DOTALL)


def render(schema: Schema, words: dict[tuple[str, str], str], said: dict[str, str]) -> str:
    """Return the section's tables; `said` is what stands under each table's heading."""
    parts = []
    for table, columns in schema.items():
        lines = [f"### `{table}`", "", *([said[table], ""] if said.get(table) else []), "| column | type | what it is |", "|---|---|---|"]
        parts.append("\n".join([*lines, *(f"| `{c}` | {kind} | {words.get((table, c), '?')} |" for c, kind in columns.items())]))
    return "\n\n".join(parts) + "\n"


def write_page(database: Path) -> None:
    """Rewrite the section."""
    text = PAGE.read_text()
    head, _, section = text.partition(HEADING)
    intro = section.partition("### ")[0]
    said = {m[1]: m[2].strip() for m in re.finditer(r"### `(\w+)`\n\n([^|\n][^\n]*)\n", section)}
    PAGE.write_text(head + HEADING + intro + render(read_database(database), read_page(text)[1], said))


if __name__ == "__main__":
    write_page(Path(sys.argv[1]))
