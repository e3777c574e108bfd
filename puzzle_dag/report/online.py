"""What a child does beyond its constraints, as sections of its page: under load over HTTP, and as a draft model of its parent."""

from collections.abc import Mapping, Sequence
from typing import Any

from puzzle_dag.report.html import Picture, Section, Table
from puzzle_dag.report.load import LoadMark, load_curves
from puzzle_dag.report.tables import format_quantity, format_seconds

Row = Mapping[str, Any]


def _ratio(row: Row, name: str) -> str:
    """Return a ratio with its 95 % interval, "" where there is none."""
    if row[name] is None:
        return ""
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return f"{row[name]:.3f}" if low is None or high is None else f"{row[name]:.3f} ({low:.3f} to {high:.3f})"


def load_marks(levels: Sequence[Row], output_length: int) -> dict[str, list[LoadMark]]:
    """Return model -> its marks on the load curve.

    Args:
        levels: a row a model and concurrency, fields as `serving.curve.LoadLevel`.
        output_length: generated tokens a request; the predicted latency is TTFT + (output_length - 1) TPOT.
    """
    curves: dict[str, list[LoadMark]] = {}
    for level in levels:
        ttft_s, tpot_s = level["predicted_ttft_s"], level["predicted_tpot_s"]
        mark = LoadMark(
            concurrency=level["concurrency"],
            latency_s=level["latency_median_s"],
            throughput_tokens_per_s=level["throughput_tokens_per_s"],
            predicted_latency_s=None if ttft_s is None or tpot_s is None else ttft_s + tpot_s * (output_length - 1),
            predicted_throughput_tokens_per_s=level["predicted_throughput_tokens_per_s"],
        )
        curves.setdefault(level["model"], []).append(mark)
    return curves


def load_section(levels: Sequence[Row], output_length: int) -> Section:
    """Return the load curve as a table and a picture; empty where nothing was put under load. Arguments as `load_marks`."""
    if not levels:
        return Section("Under load")
    header = ("model", "concurrent requests", "throughput", "predicted", "TTFT, median and p99", "TPOT, median and p99", "speed-up (95 %)")

    def cells(x: Row) -> tuple[object, ...]:
        foreseen = x["predicted_throughput_tokens_per_s"]
        return (
            x["model"],
            x["concurrency"],
            format_quantity("throughput_tokens_per_s", x["throughput_tokens_per_s"]),
            "" if foreseen is None else format_quantity("throughput_tokens_per_s", foreseen),
            *(f"{format_seconds(x[f'{name}_median_s'])}, {format_seconds(x[f'{name}_p99_s'])}" for name in ("ttft", "tpot")),
            _ratio(x, "speedup"),
        )

    caption = "parent and child behind the engine's HTTP server, in turns; predicted by the cost table at its batch sizes"
    png = load_curves(load_marks(levels, output_length))
    picture = Picture(png, "throughput against latency; the numbers are concurrent requests")
    return Section("Under load", tables=[Table(header, [cells(x) for x in levels], caption=caption)], pictures=[picture])


def speculation_section(batches: Sequence[Row], *, drafted_at_a_time: int = 0, unsupported: str = "") -> Section:
    """Return what the child buys as a draft model of its parent, or why the engine can't run it as one.

    Args:
        batches: a row a batch size, fields as `serving.speculate.Speculation`.
        drafted_at_a_time: tokens proposed at a time.
        unsupported: the engine's message where it can't.
    """
    title = "As a draft model of its parent"
    if unsupported:
        return Section(title, paragraphs=[f"The engine can't run this child as a draft model: {unsupported}"])
    header = ("batch", "parent alone", "with the child", "speed-up (95 %)", "accepted", "tokens a step", "same tokens")
    rows = [
        (
            b["batch"],
            format_seconds(b["parent_s"]),
            format_seconds(b["speculative_s"]),
            _ratio(b, "speedup"),
            f"{b['acceptance_rate']:.1%}",
            f"{b['tokens_per_step']:.2f}",
            f"{b['same_tokens']:.1%}",
        )
        for b in batches
    ]
    return Section(title, tables=[Table(header, rows, caption=f"{drafted_at_a_time} tokens drafted at a time")] if rows else [])
