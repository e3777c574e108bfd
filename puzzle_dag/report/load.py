"""Throughput against latency under load, as measured over HTTP, with what the cost table predicted."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from puzzle_dag.report.canvas import LINES, drawn_once, new_figure, set_labels, to_png


@dataclass(frozen=True, slots=True)
class LoadMark:
    """One model at one concurrency."""

    concurrency: int
    """Requests under way; written beside the mark."""
    latency_s: float
    """Median seconds of a whole answer."""
    throughput_tokens_per_s: float
    """Input and output tokens a second."""
    predicted_latency_s: float | None = None
    """What the cost table says; None where it says nothing."""
    predicted_throughput_tokens_per_s: float | None = None
    """What the cost table says."""


@drawn_once
def load_curves(curves: Mapping[str, Sequence[LoadMark]], *, title: str = "") -> bytes:
    """Draw a line a model through its concurrencies: latency to the right, throughput upwards; predictions hollow and dashed.

    Args:
        curves: model -> its marks; up and to the left is better.
        title: written above.

    Returns:
        PNG bytes.
    """
    figure, (ax,) = new_figure(6.8, 4.0)
    for colour, (name, marks) in zip(LINES, curves.items(), strict=False):
        ordered = sorted(marks, key=lambda m: m.concurrency)
        xs, ys = [m.latency_s * 1e3 for m in ordered], [m.throughput_tokens_per_s for m in ordered]
        ax.plot(xs, ys, color=colour, marker="o", linewidth=1.5, markersize=5, label=f"{name} (measured)")
        for mark, x, y in zip(ordered, xs, ys, strict=True):
            ax.annotate(str(mark.concurrency), (x, y), xytext=(5, -9), textcoords="offset points", fontsize=7, color=colour)
        foreseen = [
            (m.predicted_latency_s * 1e3, m.predicted_throughput_tokens_per_s)
            for m in ordered
            if m.predicted_latency_s is not None and m.predicted_throughput_tokens_per_s is not None
        ]
        if foreseen:
            line: dict[str, Any] = {"linestyle": "--", "linewidth": 1, "marker": "o", "markerfacecolor": "white", "markersize": 5}
            ax.plot(*zip(*foreseen, strict=True), color=colour, label=f"{name} (predicted)", **line)
    ax.margins(0.1)
    ax.legend(fontsize=7, frameon=False)
    set_labels(ax, title=title, x="median latency of an answer (ms)", y="tokens/s, input and output")
    return to_png(figure)
