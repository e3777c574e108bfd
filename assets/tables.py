"""The asset `tables`: all rows of a profile in one DuckDB file. The Parquet files stay the truth."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import dagster as dg

from assets.materialise import Stopwatch, materialised, table
from assets.plan import Naming
from puzzle_dag.store import fingerprint
from resources.workspace import Workspace

Sources = Callable[[Workspace], Mapping[str, list[Path]]]
"""Returns table -> its Parquet files."""


def tables_asset(plan: Naming, sources: Sources, *, deps: Sequence[str], description: str) -> dg.AssetsDefinition:
    """Return the asset that builds the DuckDB file from what `sources` returns when it runs."""

    @dg.asset(**plan.options("tables", deps=deps, kinds=("duckdb",), description=description))
    def tables(context: dg.AssetExecutionContext, workspace: Workspace) -> dg.MaterializeResult:
        from puzzle_dag.tables import build_tables

        time, files = Stopwatch(), sources(workspace)
        num_rows = build_tables(files, workspace.database)
        return materialised(
            context,
            plan,
            workspace,
            {"file": workspace.database.name, "num_rows": num_rows},
            data_version=fingerprint({name: [f.name for f in found] for name, found in files.items()} | {"num_rows": num_rows}),
            files=[workspace.database],
            metadata={
                "tables": table([{"table": n, "num_rows": r} for n, r in num_rows.items()]),
                "file": dg.MetadataValue.path(str(workspace.database)),
            },
            time=time,
        )

    return tables
