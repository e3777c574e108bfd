"""The asset graph as a picture: nodes in columns by their distance from the sources, edges from left to right, as SVG."""

import io
from collections.abc import Mapping, Sequence

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from puzzle_dag.report.canvas import BLUE, GREEN, GRID, INK, MUTED, ORANGE, PURPLE

_COLUMN_INCHES = 1.75
_ROW_INCHES = 0.62
_COLOURS = (BLUE, GREEN, ORANGE, PURPLE, "#bf3989", "#4d7c8a", "#9a6700", MUTED)


def place_nodes(upstream: Mapping[str, Sequence[str]]) -> dict[str, tuple[int, float]]:
    """Return (column, row) of every node: the column is the longest way from a source; rows follow the parents' mean row.

    Args:
        upstream: node -> the nodes it reads; nodes that only occur as upstream are sources.

    Raises:
        ValueError: the graph has a cycle.
    """
    nodes = list(dict.fromkeys([*upstream, *(u for ups in upstream.values() for u in ups)]))
    column: dict[str, int] = {}
    waiting = list(nodes)
    while waiting:
        ready = [n for n in waiting if all(u in column for u in upstream.get(n, ()))]
        if not ready:
            raise ValueError(f"the graph has a cycle among {', '.join(sorted(waiting))}")
        for node in ready:
            column[node] = max((column[u] + 1 for u in upstream.get(node, ())), default=0)
        waiting = [n for n in waiting if n not in column]
    for node in nodes:  # a source stands right before the first node that reads it, so that its edge is short
        readers = [column[n] for n, ups in upstream.items() if node in ups]
        if not upstream.get(node) and readers:
            column[node] = min(readers) - 1
    row: dict[str, float] = {}
    for c in range(max(column.values(), default=-1) + 1):
        members = [n for n in nodes if column[n] == c]
        wished = {n: _mean([row[u] for u in upstream.get(n, ()) if u in row], float(i)) for i, n in enumerate(members)}
        members.sort(key=lambda n: wished[n])
        for i, node in enumerate(members):
            row[node] = i - (len(members) - 1) / 2
    return {n: (column[n], row[n]) for n in nodes}


def _mean(values: Sequence[float], default: float) -> float:
    return sum(values) / len(values) if values else default


def draw_graph(
    upstream: Mapping[str, Sequence[str]], *, groups: Mapping[str, str] | None = None, partitions: Mapping[str, str] | None = None
) -> str:
    """Return an SVG of a directed acyclic graph.

    Args:
        upstream: node -> the nodes it reads.
        groups: node -> name of its group, which gives its colour.
        partitions: node -> what it is partitioned by ("layer"), written under its name.

    Raises:
        ValueError: the graph has a cycle.
    """
    places = place_nodes(upstream)
    names = list(dict.fromkeys((groups or {}).values()))
    colours = {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(names)}
    columns = max(c for c, _ in places.values()) + 1
    rows = max(abs(r) for _, r in places.values()) * 2 + 1
    figure = Figure(figsize=(columns * _COLUMN_INCHES + 0.2, rows * _ROW_INCHES + 0.6))
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set_axis_off()
    ax.set_xlim(-0.55, columns - 0.45)
    ax.set_ylim(rows / 2 + 0.6, -rows / 2 - 0.1)
    for node, ups in upstream.items():
        x, y = places[node]
        for up in ups:
            x0, y0 = places[up]
            arrow = {"arrowstyle": "-|>", "color": MUTED, "linewidth": 0.9, "connectionstyle": f"arc3,rad={0.12 if x - x0 > 1 else 0}"}
            ax.annotate("", (x - 0.44, y), (x0 + 0.44, y0), arrowprops=arrow, zorder=1)
    for node, (x, y) in places.items():
        colour = colours.get((groups or {}).get(node, ""), INK)
        box = FancyBboxPatch((x - 0.43, y - 0.3), 0.86, 0.6, boxstyle="round,pad=0,rounding_size=0.06", facecolor="white", edgecolor=colour)
        ax.add_patch(box)
        part = (partitions or {}).get(node)
        ax.text(x, y - (0.1 if part else 0), node, ha="center", va="center", fontsize=8, color=INK)
        if part:
            ax.text(x, y + 0.15, f"per {part}", ha="center", va="center", fontsize=6.5, color=colour)
    for i, name in enumerate(names):
        ax.text(-0.5 + i * columns / max(1, len(names)), rows / 2 + 0.4, name, fontsize=8, color=colours[name], fontweight="bold")
    ax.axhline(rows / 2 + 0.12, color=GRID, linewidth=0.8)
    out = io.StringIO()
    with rc_context({"svg.hashsalt": "puzzle_dag", "svg.fonttype": "none"}):  # the same graph gives the same file
        figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()
