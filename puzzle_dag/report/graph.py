"""The asset graph as a picture: rows by the distance from the sources, edges from top to bottom, as SVG."""

import io
from collections.abc import Mapping, Sequence

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from puzzle_dag.report.canvas import BLUE, GREEN, INK, MUTED, ORANGE, PURPLE

_COLUMN_INCHES = 1.75
_ROW_INCHES = 0.78
_NUM_SWEEPS = 24
_COLOURS = (BLUE, GREEN, ORANGE, PURPLE, "#bf3989", "#4d7c8a", "#9a6700", MUTED)

Upstream = Mapping[str, Sequence[str]]
"""Node -> the nodes it reads; nodes that only occur as upstream are sources."""


def rank_nodes(upstream: Upstream) -> dict[str, int]:
    """Return the row of every node: the longest way from a source, a source standing right above its first reader.

    Raises:
        ValueError: the graph has a cycle.
    """
    nodes = list(dict.fromkeys([*upstream, *(u for ups in upstream.values() for u in ups)]))
    row: dict[str, int] = {}
    waiting = list(nodes)
    while waiting:
        ready = [n for n in waiting if all(u in row for u in upstream.get(n, ()))]
        if not ready:
            raise ValueError(f"the graph has a cycle among {', '.join(sorted(waiting))}")
        for node in ready:
            row[node] = max((row[u] + 1 for u in upstream.get(node, ())), default=0)
        waiting = [n for n in waiting if n not in row]
    for node in nodes:
        readers = [row[n] for n, ups in upstream.items() if node in ups]
        if not upstream.get(node) and readers:
            row[node] = min(readers) - 1
    return row


def implied_edges(upstream: Upstream) -> set[tuple[str, str]]:
    """Return the edges (from, to) that a longer way implies: they add nothing to what runs before what."""
    above: dict[str, set[str]] = {}
    for node in sorted(rank_nodes(upstream), key=rank_nodes(upstream).__getitem__):
        above[node] = set().union(*({u} | above[u] for u in upstream.get(node, ())))
    return {(up, node) for node, ups in upstream.items() for up in ups if any(up in above[other] for other in ups if other != up)}


def place_nodes(upstream: Upstream) -> dict[str, tuple[float, int]]:
    """Return (column, row) of every node; in a row no two are closer than 1, and each is near what it is joined to.

    Raises:
        ValueError: the graph has a cycle.
    """
    row = rank_nodes(upstream)
    rows = [[n for n in row if row[n] == r] for r in range(max(row.values(), default=-1) + 1)]
    x = {n: float(i) for members in rows for i, n in enumerate(members)}
    hidden = implied_edges(upstream)
    joined: dict[str, list[str]] = {n: [] for n in row}
    for node, ups in upstream.items():
        for up in ups:
            if (up, node) not in hidden:
                joined[node].append(up)
                joined[up].append(node)
    for _ in range(_NUM_SWEEPS):
        for members in rows:
            wished = {n: sum(x[j] for j in joined[n]) / len(joined[n]) if joined[n] else x[n] for n in members}
            order = sorted(members, key=wished.__getitem__)
            placed: list[float] = []
            for node in order:
                placed.append(max(wished[node], placed[-1] + 1) if placed else wished[node])
            shift = sum(wished[n] - p for n, p in zip(order, placed, strict=True)) / len(order)
            x.update({n: p + shift for n, p in zip(order, placed, strict=True)})
    left = min(x.values(), default=0.0)
    return {n: (x[n] - left, row[n]) for n in row}


def draw_graph(upstream: Upstream, *, groups: Mapping[str, str] | None = None, partitions: Mapping[str, str] | None = None) -> str:
    """Return an SVG of a directed acyclic graph. Edges that longer ways imply are drawn faintly.

    Args:
        upstream: node -> the nodes it reads.
        groups: node -> name of its group, which gives its colour.
        partitions: node -> what it is partitioned by ("layer"), written under its name.

    Raises:
        ValueError: the graph has a cycle.
    """
    figure = plot_graph(upstream, groups=groups, partitions=partitions)
    out = io.StringIO()
    with rc_context({"svg.hashsalt": "puzzle_dag", "svg.fonttype": "none"}):  # the same graph gives the same file
        figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()


def plot_graph(upstream: Upstream, *, groups: Mapping[str, str] | None = None, partitions: Mapping[str, str] | None = None) -> Figure:
    """Return the figure that `draw_graph` saves; the arguments are the same."""
    places = place_nodes(upstream)
    groups = groups or {}
    names = list(dict.fromkeys(groups.values()))
    colours = {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(names)}
    num_columns = max((x for x, _ in places.values()), default=0) + 1
    num_rows = max((y for _, y in places.values()), default=0) + 1
    figure = Figure(figsize=(num_columns * _COLUMN_INCHES + 0.2, (num_rows + 0.7) * _ROW_INCHES), facecolor="white")
    ax = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    ax.set_axis_off()
    ax.set_xlim(-0.55, num_columns - 0.45)
    ax.set_ylim(num_rows - 0.4, -1.1)
    _draw_edges(ax, upstream, places)
    for node, (x, y) in places.items():
        colour = colours.get(groups.get(node, ""), INK)
        style = "round,pad=0,rounding_size=0.06"
        ax.add_patch(FancyBboxPatch((x - 0.45, y - 0.27), 0.9, 0.54, boxstyle=style, facecolor="white", edgecolor=colour, linewidth=1.3))
        part = (partitions or {}).get(node)
        ax.text(x, y - (0.09 if part else 0), node, ha="center", va="center", fontsize=8.5, color=INK)
        if part:
            ax.text(x, y + 0.14, f"per {part}", ha="center", va="center", fontsize=7, color=colour)
    for i, name in enumerate(names):
        ax.text(-0.45 + i * num_columns / len(names), -0.8, name, fontsize=9, color=colours[name], fontweight="bold")
    return figure


def _draw_edges(ax: Axes, upstream: Upstream, places: Mapping[str, tuple[float, int]]) -> None:
    """Draw arrows from every node to its readers, the implied ones behind and faint."""
    hidden = implied_edges(upstream)
    for node, ups in upstream.items():
        x, y = places[node]
        for up in ups:
            x0, y0 = places[up]
            faint = (up, node) in hidden
            bend = 0.18 if y - y0 > 1 else 0.0
            arrow = {
                "arrowstyle": "-|>",
                "color": "#d0d7de" if faint else MUTED,
                "linewidth": 0.8 if faint else 1.1,
                "connectionstyle": f"arc3,rad={bend if x >= x0 else -bend}",
            }
            ax.annotate("", (x, y - 0.28), (x0, y0 + 0.28), arrowprops=arrow, zorder=0 if faint else 1)
