"""The results: the frontier, and one DuckDB file over all tables."""

from pathlib import Path

import dagster as dg

from assets.drawings import page_link
from assets.materialise import Stopwatch, materialised, picture, table
from assets.plan import Plan
from assets.tables import tables_asset
from assets.watches import watch_frontier
from puzzle_dag.store import fingerprint
from resources.rows import write_rows
from resources.workspace import Workspace

_TABLES = ("library", "scores", "costs", "predictions", "solutions", "solution_pools", "accuracy", "serving", "parent_serving")
"""Tables of one file a partition."""
_SINGLE_TABLES = ("score_table", "predicted_frontier", "frontier", "parent_accuracy")
_SHOWN = (
    "scenario",
    "batch",
    "predicted_speedup",
    "measured_speedup",
    "speedup_low",
    "speedup_high",
    "kl",
    "retention",
    "retention_stderr",
)


def _partition_names(plan: Plan) -> set[str]:
    """Return the layers, targets and scenarios of today; files of former ones may still lie about."""
    return {*plan.partitions.layers.get_partition_keys(), *plan.profile.targets, *plan.profile.scenarios}


def _frontier_asset(plan: Plan) -> dg.AssetsDefinition:
    @dg.asset(
        **plan.options(
            "frontier",
            deps=["predicted_frontier", "accuracy", "serving", *plan.opted_in],
            kinds=("parquet",),
            description="All scenarios side by side: asked for, predicted, measured, graded; a page for each, and one for all.",
        )
    )
    def frontier(context: dg.AssetExecutionContext, workspace: Workspace) -> dg.MaterializeResult:
        from assets.facts import read_chain, result_row
        from assets.reports import frontier_pictures, write_pages

        time, scenarios = Stopwatch(), workspace.read_profile().scenarios
        rows = [result_row(workspace, read_chain(plan, workspace, name)) for name in scenarios]
        path = write_rows(workspace.tables / "frontier.parquet", rows)
        pages = write_pages(plan, workspace, scenarios)
        return materialised(
            context,
            plan,
            workspace,
            {"rows": rows},
            data_version=fingerprint({"rows": rows, "from": watch_frontier(plan, workspace)}),
            files=[path, *pages],
            metadata={
                "page": page_link(plan, "index"),
                "results": table([{k: r[k] for k in _SHOWN} for r in rows]),
                **{name: picture(drawn, name.replace("_", " ")) for name, drawn in frontier_pictures(rows).items()},
                **{f"page_{p.stem}": page_link(plan, p.stem) for p in pages[1:]},
            },
            time=time,
        )

    return frontier


def _tables_asset(plan: Plan) -> dg.AssetsDefinition:
    def sources(workspace: Workspace) -> dict[str, list[Path]]:
        wanted, singles = _partition_names(plan), [workspace.tables / f"{name}.parquet" for name in _SINGLE_TABLES]
        folders = [workspace.tables / name for name in (*_TABLES, *plan.further_scores, *plan.opted_in)]
        found = {folder.name: [p for p in sorted(folder.glob("*.parquet")) if p.stem in wanted] for folder in folders}
        return found | {path.stem: [path] for path in singles if path.exists()}

    description = "All rows in one DuckDB file, built under another name and renamed; the Parquet files are the truth."
    deps = ["score_table", "cost_table", "predicted_frontier", "frontier", *plan.opted_in]
    return tables_asset(plan, sources, deps=deps, description=description)


def result_assets(plan: Plan) -> list[dg.AssetsDefinition]:
    """Return frontier and tables."""
    return [_frontier_asset(plan), _tables_asset(plan)]
