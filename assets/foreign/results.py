"""The results on a foreign library: all scenarios side by side, what each bound costs, one page each, one DuckDB file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import dagster as dg

from assets.foreign.library import constraint_table, metric_rows, read_library
from assets.foreign.plan import ForeignPlan
from assets.foreign.search import chosen_rows, loosened_table, solution_rows
from assets.foreign.watches import watch_foreign_frontier
from assets.materialise import Stopwatch, materialised, picture, table
from assets.tables import tables_asset
from puzzle_dag.config import ForeignScenario
from puzzle_dag.report.html import Picture, Table
from puzzle_dag.search.foreign_candidates import ForeignLibrary
from puzzle_dag.search.foreign_scenario import grid_of, sweep_foreign_library
from puzzle_dag.store import fingerprint, write_atomically
from resources.pages import page_url
from resources.rows import write_rows
from resources.workspace import Workspace

Solved = dict[str, tuple[ForeignScenario, list[dict[str, Any]]]]
"""Scenario -> its file as solved, and its answers."""
SolutionRows = dict[str, list[dict[str, Any]]]
"""Scenario -> a row for each of its answers."""


def read_solved(workspace: Workspace) -> Solved:
    """Return the scenarios that the profile names and that are solved as their files and the library are today."""
    solved, library = {}, workspace.shelf.find("library_file")
    for name in workspace.read_foreign_profile().scenarios:
        spec, found = workspace.shelf.find("scenario_spec", name), workspace.shelf.find("solution", name)
        if spec is None or found is None or library is None:
            continue
        if found.value["scenario_spec"] == fingerprint(spec.value) and found.value["library"] == library.data_version:
            solved[name] = (ForeignScenario.model_validate(spec.value), found.value["answers"])
    return solved


def _draw_trade_offs(library: ForeignLibrary, solved: Solved, rows: SolutionRows) -> dict[str, bytes]:
    """Return a picture for each pair of what is minimised and what is bounded by any scenario."""
    from puzzle_dag.report.foreign import trade_off

    pairs = dict.fromkeys((s.minimize, bounded) for s, _ in solved.values() for bounded in s.constraints)
    drawn = {}
    for minimize, bounded in pairs:
        best = [rows[name][0] for name, (scenario, _) in solved.items() if scenario.minimize == minimize]
        points = {r["scenario"]: (r[bounded], r[minimize]) for r in best}
        sweep = sweep_foreign_library(library, minimize, bounded)
        drawn[f"{minimize} against {bounded}"] = trade_off(sweep, points, x=bounded, y=minimize)
    return drawn


def _to_table(rows: list[dict[str, Any]], caption: str = "") -> Table:
    header = list(rows[0]) if rows else ["(nothing)"]
    cells = [[f"{v:.6g}" if isinstance(v, float) else "" if v is None else v for v in row.values()] for row in rows]
    return Table(header, cells, caption=caption)


def write_pages(
    plan: ForeignPlan, workspace: Workspace, library: ForeignLibrary, solved: Solved, rows: SolutionRows, drawn: Mapping[str, bytes]
) -> list[Path]:
    """Write a page a scenario and one for all; return their paths, the latter's first."""
    from puzzle_dag.report.foreign import render_foreign_page, variant_map

    folder, value = workspace.var / "reports", workspace.shelf.value("library_file")
    footer = f"library {value['file']}, SHA-256 {value['digest'][:16]}, source: {', '.join(value['source']) or 'not said'}"
    paths = [folder / "index.html"]
    for name, (scenario, answers) in solved.items():
        loosened = loosened_table(scenario, answers)
        png = variant_map(grid_of(library, scenario.minimize), chosen=answers[0]["choices"], label=scenario.minimize)
        page = render_foreign_page(
            name,
            subtitle=" · ".join(p for p in (scenario.description, f"profile {plan.profile.name}", f"least {scenario.minimize}") if p),
            tables=[
                *([_to_table(constraint_table(scenario), "what was asked for")] if scenario.constraints else []),
                *([_to_table(loosened, "what loosening each bound alone would buy, by solving again")] if loosened else []),
                _to_table(rows[name], "the solutions: proof, and the sum of every number"),
                _to_table(chosen_rows(library, answers), "the chosen variants"),
            ],
            pictures=[Picture(png, f"{scenario.minimize} of every variant; the chosen ones are framed")],
            footer=footer,
        )
        paths.append(folder / f"{name}.html")
        write_atomically(paths[-1], page)
    index = render_foreign_page(
        f"puzzle_dag: {plan.profile.name}",
        subtitle=plan.profile.description,
        tables=[
            _to_table([row for several in rows.values() for row in several], "all solutions"),
            _to_table(metric_rows(library), "the library's numbers, over all variants of all layers"),
        ],
        pictures=[Picture(png, caption) for caption, png in drawn.items()],
        links=[(name, f"{name}.html") for name in solved],
        footer=footer,
    )
    write_atomically(paths[0], index)
    return paths


def _frontier_asset(plan: ForeignPlan) -> dg.AssetsDefinition:
    @dg.asset(
        **plan.options(
            "frontier",
            deps=["library_file", "solution"],
            kinds=("parquet",),
            description="All scenarios side by side, what each bound costs, and a page for each scenario and for all.",
        )
    )
    def frontier(context: dg.AssetExecutionContext, workspace: Workspace) -> dg.MaterializeResult:
        time, library, solved = Stopwatch(), read_library(workspace), read_solved(workspace)
        by_scenario = {name: solution_rows(library, scenario, answers) for name, (scenario, answers) in solved.items()}
        rows = [row for several in by_scenario.values() for row in several]
        timeless = [{k: v for k, v in row.items() if k != "seconds"} for row in rows]
        drawn = _draw_trade_offs(library, solved, by_scenario)
        files = write_pages(plan, workspace, library, solved, by_scenario, drawn)
        if rows:
            files.append(write_rows(workspace.tables / "frontier.parquet", rows))
        links = {f"page_{name}": dg.MetadataValue.url(page_url(plan.profile.name, name)) for name in solved}
        return materialised(
            context,
            plan,
            workspace,
            {"rows": rows},
            data_version=fingerprint({"rows": timeless, "from": watch_foreign_frontier(plan, workspace)}),
            files=files,
            metadata={
                "page": dg.MetadataValue.url(page_url(plan.profile.name, "index")),
                "solutions": table(rows),
                **{f"picture_{i}": picture(png, caption) for i, (caption, png) in enumerate(drawn.items())},
                **links,
            },
            time=time,
        )

    return frontier


def _tables_asset(plan: ForeignPlan) -> dg.AssetsDefinition:
    def sources(workspace: Workspace) -> dict[str, list[Path]]:
        library, solved = read_library(workspace), read_solved(workspace)
        rows = [
            {"layer": layer, "variant": variant, "metric": name, "value": value}
            for name in workspace.shelf.value("library_file")["numbers"]
            for layer, variants in grid_of(library, name).items()
            for variant, value in variants.items()
        ]
        found = {name: [workspace.tables / name / f"{s}.parquet" for s in solved] for name in ("solutions", "choices")}
        loosened = [workspace.tables / "loosening" / f"{s}.parquet" for s, (_, answers) in solved.items() if answers[0].get("loosening")]
        return {"library": [write_rows(workspace.tables / "library.parquet", rows)], **found, "loosening": loosened}

    description = "The library, its solutions, their choices and what loosening buys in one DuckDB file; the Parquet files are the truth."
    return tables_asset(plan, sources, deps=["library_file", "frontier"], description=description)


def foreign_result_assets(plan: ForeignPlan) -> list[dg.AssetsDefinition]:
    """Return frontier and tables."""
    return [_frontier_asset(plan), _tables_asset(plan)]
