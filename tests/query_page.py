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
_ROW = re.compile(r"\| `(\w+)` \| (\w+(?:\[\])?|\?) \| (.*) \|")

UNKNOWN = "?"
OPTIONAL = ("load_curve", "speculation", "trial")
"""Tables that only those profiles have that ask for them."""

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
        found.setdefault(table, {})[column] = UNKNOWN if kind == '"NULL"' else kind
    return found


def complete(found: Schema, told: Schema) -> Schema:
    """Return a schema with the types that a file can't tell (of columns that are NULL in every row) taken from the page."""
    return {
        table: {c: told.get(table, {}).get(c, kind) if kind == UNKNOWN else kind for c, kind in columns.items()}
        for table, columns in found.items()
    }


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
    told, words = read_page(text)
    found = complete(read_database(database), told)
    # Tables that only some profiles have stay as they are told of where this file has none.
    kept = {name: columns for name, columns in told.items() if name in OPTIONAL and name not in found}
    PAGE.write_text(head + HEADING + intro + render(dict(sorted((found | kept).items())), words, said))


if __name__ == "__main__":
    write_page(Path(sys.argv[1]))
