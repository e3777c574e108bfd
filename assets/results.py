"""The results: the frontier with its reports, and one DuckDB file over all tables."""

from pathlib import Path
from typing import Any

import dagster as dg

from assets.materialise import Stopwatch, materialised, picture, table
from assets.plan import GROUPS, Plan
from assets.watches import watch_frontier
from puzzle_dag.store import fingerprint, write_atomically
from resources.rows import write_rows
from resources.workspace import Workspace

_TABLES = ("library", "scores", "costs", "solutions", "accuracy", "serving", "parent_serving")
_SHOWN = ("scenario", "batch", "predicted_speedup", "measured_speedup", "speedup_low", "speedup_high", "kl", "retention", "retention_stderr")


def report_folder(workspace: Workspace) -> Path:
    """Return where the HTML reports lie."""
    return workspace.var / "report"


def _all_partitions(plan: Plan) -> dict[str, list[str | None]]:
    keys: dict[str, list[str | None]] = {name: [None] for names in GROUPS.values() for name in names}
    layers: list[str | None] = list(plan.partitions.layers.get_partition_keys())
    keys.update(dict.fromkeys(("search_space", "block_library", "block_scores"), layers))
    keys.update(dict.fromkeys(("target_spec", "block_costs", "parent_serving"), list(plan.profile.targets)))
    keys.update(dict.fromkeys(("scenario_spec", "solution", "child", "uptrained_child", "accuracy", "serving"), list(plan.profile.scenarios)))
    return keys


def _machine(workspace: Workspace) -> dict[str, Any]:
    import torch

    from puzzle_dag.engine.hardware import detect_hardware, measure_matmul_rate

    hardware = detect_hardware()
    with workspace.device():
        rates = {f"matmul_{n}_gflop_per_s": measure_matmul_rate(t) / 1e9 for n, t in (("float32", torch.float32), ("bfloat16", torch.bfloat16))}
    return {"hardware": hardware.name, "num_threads": hardware.num_threads, **rates}


def _write_reports(plan: Plan, workspace: Workspace, rows: list[dict[str, Any]], machine: dict[str, Any]) -> list[Path]:
    from assets.facts import frontier_points, read_chain, scenario_facts, stage_seconds
    from puzzle_dag.report.html import Table
    from puzzle_dag.report.scenario import render_overview, render_scenario

    folder, pages = report_folder(workspace), []
    for row in rows:
        name = row["scenario"]
        page = folder / f"{name}.html"
        write_atomically(page, render_scenario(scenario_facts(plan, workspace, read_chain(workspace, name))))
        pages.append((name, page.name))
    header, cells = results_table(rows)
    overview = render_overview(
        plan.profile.name,
        results=Table(header, cells),
        stages=stage_seconds(plan, workspace, _all_partitions(plan)),
        points=frontier_points(rows),
        machine={k: f"{v:.4g}" if isinstance(v, float) else str(v) for k, v in machine.items()},
        pages=pages,
    )
    write_atomically(folder / "index.html", overview)
    return [folder / "index.html", *(folder / page for _, page in pages)]


def results_table(rows: list[dict[str, Any]]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return header and cells of the table of results, with units."""
    from puzzle_dag.report.tables import format_percent, format_quantity

    def quantity(row: dict[str, Any], name: str, key: str) -> str:
        return "-" if row[key] is None else format_quantity(name, row[key])

    def speedup(row: dict[str, Any]) -> str:
        if row["measured_speedup"] is None:
            return "-"
        return f"{row['measured_speedup']:.2f} ({row['speedup_low']:.2f} to {row['speedup_high']:.2f})"

    header = ("scenario", "throughput, predicted", "measured", "latency, predicted", "measured", "speed-up, predicted", "measured (95 %)", "memory")
    header = (*header, "parameters", "KL, nats", "retention", "met")
    cells = []
    for row in rows:
        met = [row["constraints_met"], row["retention_met"]]
        cells.append(
            (
                row["scenario"],
                quantity(row, "throughput_tokens_per_s", "predicted_throughput_tokens_per_s"),
                quantity(row, "throughput_tokens_per_s", "measured_throughput_tokens_per_s"),
                quantity(row, "latency_s", "predicted_latency_s"),
                quantity(row, "latency_s", "measured_latency_s"),
                "-" if row["predicted_speedup"] is None else f"{row['predicted_speedup']:.2f}",
                speedup(row),
                quantity(row, "memory_bytes", "memory_bytes"),
                quantity(row, "parameters", "parameters"),
                "-" if row["kl"] is None else f"{row['kl']:.3f}",
                "-" if row["retention"] is None else format_percent(row["retention"], row["retention_stderr"]),
                "-" if None in met else "yes" if all(met) else "no",
            )
        )
    return header, cells


def _frontier_asset(plan: Plan) -> dg.AssetsDefinition:
    @dg.asset(
        **plan.options(
            "frontier",
            deps=["accuracy", "serving"],
            kinds=("parquet", "html"),
            device=True,
            description="All scenarios side by side: asked for, predicted, measured, graded; with the HTML reports.",
        )
    )
    def frontier(context: dg.AssetExecutionContext, workspace: Workspace) -> dg.MaterializeResult:
        from assets.facts import frontier_points, read_chain, result_row
        from puzzle_dag.report.pictures import frontier as draw_frontier

        time, scenarios = Stopwatch(), workspace.read_profile().scenarios
        rows = [result_row(plan, workspace, read_chain(workspace, name)) for name in scenarios]
        machine = _machine(workspace)
        reports = _write_reports(plan, workspace, rows, machine)
        path = write_rows(workspace.tables / "frontier.parquet", rows)
        drawn = draw_frontier(frontier_points(rows), x="throughput (parent = 1)", y="retention, corrected for chance")
        return materialised(
            context,
            plan,
            workspace,
            {"rows": rows, "machine": machine, "report": str(reports[0].relative_to(workspace.var))},
            data_version=fingerprint({"rows": rows, "from": watch_frontier(plan, workspace)}),
            files=[path, *reports],
            metadata={
                "results": table([{k: r[k] for k in _SHOWN} for r in rows]),
                "picture": picture(drawn, "quality against speed"),
                "report": dg.MetadataValue.path(str(reports[0])),
                **machine,
            },
            seconds=time.seconds,
        )

    return frontier


def _tables_asset(plan: Plan) -> dg.AssetsDefinition:
    @dg.asset(
        **plan.options(
            "tables",
            deps=["score_table", "cost_table", "frontier"],
            stages=[],
            kinds=("duckdb",),
            description="All rows in one DuckDB file, built under another name and renamed; the Parquet files are the truth.",
        )
    )
    def tables(context: dg.AssetExecutionContext, workspace: Workspace) -> dg.MaterializeResult:
        from puzzle_dag.tables import build_tables

        time, known = Stopwatch(), _all_partitions(plan)
        wanted = {k for keys in known.values() for k in keys if k is not None}
        sources = {name: [p for p in sorted((workspace.tables / name).glob("*.parquet")) if p.stem in wanted] for name in _TABLES}
        singles = ("score_table", "frontier", "parent_accuracy")
        sources |= {name: [workspace.tables / f"{name}.parquet"] for name in singles if (workspace.tables / f"{name}.parquet").exists()}
        num_rows = build_tables(sources, workspace.database)
        return materialised(
            context,
            plan,
            workspace,
            {"file": workspace.database.name, "num_rows": num_rows},
            data_version=fingerprint({n: [f.name for f in files] for n, files in sources.items()} | {"num_rows": num_rows}),
            files=[workspace.database],
            metadata={"tables": table([{"table": n, "num_rows": r} for n, r in num_rows.items()]), "file": dg.MetadataValue.path(str(workspace.database))},
            seconds=time.seconds,
        )

    return tables


def result_assets(plan: Plan) -> list[dg.AssetsDefinition]:
    """Return frontier and tables."""
    return [_frontier_asset(plan), _tables_asset(plan)]
