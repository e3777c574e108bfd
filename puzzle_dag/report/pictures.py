"""Pictures of what the stages found, each a function from plain numbers to PNG bytes.

Block and variant names are canonical ("kv4/w384", see puzzle_dag/architecture.py); the pictures order variants from
the heaviest to the lightest. Everything is drawn with matplotlib's Agg backend and needs no display.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.patches import Rectangle

from puzzle_dag.architecture import Block, Run
from puzzle_dag.report.canvas import (
    BLUE,
    GREEN,
    INK,
    MUTED,
    ORANGE,
    drawn_once,
    line_look,
    name_points,
    new_figure,
    set_labels,
    to_png,
)

_MAX_ANNOTATED_CELLS = 200
DISTILLATION_LOSSES = "cosine: 1 - cos, all layers; kl: nats a token"
"""Names and units of what global distillation minimises, for the axis."""


@dataclass(frozen=True, slots=True)
class FrontierPoint:
    """One model on the picture of quality against speed (or memory)."""

    name: str
    """What is written beside the point."""
    x: float
    """Value on the horizontal axis, in the axis's unit."""
    y: float
    """Value on the vertical axis, in the axis's unit."""
    kind: Literal["parent", "child", "searched", "solution"] = "child"
    """The parent, a scenario's child, what its search found where that is no child's, or a solution of a curve, which is only predicted."""
    x_error: float = 0.0
    """Half the width of the confidence interval of x."""
    y_error: float = 0.0
    """Standard error of y."""


def _heaviness(name: str) -> tuple[int, int]:
    """Sort key of a variant's name: live ones by size, then linear, then no-op."""
    order = {"linear": 1, "noop": 2}
    return order.get(name, 0), -int("".join(c for c in name if c.isdigit()) or 0)


def _short(value: float) -> str:
    """Return a number in four characters or so, for a cell."""
    if value == 0:
        return "0"
    return f"{value:.0e}".replace("e-0", "e-") if abs(value) < 0.001 else f"{value:.3f}".lstrip("0") if abs(value) < 1 else f"{value:.2g}"


@drawn_once
def architecture_map(
    blocks: Sequence[str],
    *,
    attentions: Sequence[str] = (),
    ffns: Sequence[str] = (),
    parent_block: str = "",
    runs: Sequence[str] = (),
    title: str = "",
) -> bytes:
    """Draw which variant every layer of a model took: a column a layer, a row a variant, attention above the FFN.

    Args:
        blocks: the block's name of each layer, from the first layer on.
        attentions: names of the attention variants that might have been taken; those in `blocks` are added.
        ffns: the same for the FFN.
        parent_block: the parent's own block; its variants are marked by their colour.
        runs: names of the runs of layers that were replaced at once ("fuse_3-5"); each is framed and named.
        title: written above.
    """
    parsed = [Block.parse(name) for name in blocks]
    parent = Block.parse(parent_block) if parent_block else None
    rows_attention = sorted({*attentions, *(b.attention.name for b in parsed)}, key=_heaviness)
    rows_ffn = sorted({*ffns, *(b.ffn.name for b in parsed)}, key=_heaviness)
    labels = [*rows_attention, "", *rows_ffn]
    own = {len(rows_attention) + 1 + rows_ffn.index(parent.ffn.name)} if parent and parent.ffn.name in rows_ffn else set()
    own |= {rows_attention.index(parent.attention.name)} if parent and parent.attention.name in rows_attention else set()
    cell = min(0.42, 11 / max(1, len(blocks)))
    figure, (ax,) = new_figure(max(4.2, 1.6 + cell * len(blocks)), 1.1 + 0.24 * len(labels))
    for layer, block in enumerate(parsed):
        attention_row = rows_attention.index(block.attention.name)
        ffn_row = len(rows_attention) + 1 + rows_ffn.index(block.ffn.name)
        attention_colour = INK if parent and block.attention == parent.attention else BLUE
        ffn_colour = INK if parent and block.ffn == parent.ffn else GREEN
        for row, colour in ((attention_row, attention_colour), (ffn_row, ffn_colour)):
            ax.add_patch(Rectangle((layer - 0.46, row - 0.42), 0.92, 0.84, color=colour, linewidth=0))
    for run in map(Run.parse, runs):
        ax.add_patch(Rectangle((run.first - 0.5, -0.5), len(run.layers), len(labels), fill=False, edgecolor=ORANGE, linewidth=1.4))
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        ax.text((run.first + run.last) / 2, len(rows_attention), run.kind, ha="center", va="center", fontsize=7, color=ORANGE, bbox=box)
    ax.set_xlim(-0.6, len(blocks) - 0.4)
    ax.set_ylim(len(labels) - 0.4, -0.6)
    named = {i: f"{label} (parent)" if i in own else label for i, label in enumerate(labels) if label}
    ax.set_yticks(list(named), list(named.values()))
    step = max(1, len(blocks) // 16)
    ax.set_xticks(range(0, len(blocks), step))
    ax.axhline(len(rows_attention), color=MUTED, linewidth=0.8)
    for place, middle, colour in (("attention", len(rows_attention) / 2, BLUE), ("FFN", len(labels) - len(rows_ffn) / 2, GREEN)):
        ax.text(1.01, 1 - middle / len(labels), place, transform=ax.transAxes, rotation=270, va="center", fontsize=8, color=colour)
    set_labels(ax, title=title, x="layer" + (" (black: as in the parent)" if parent else ""))
    return to_png(figure)


@drawn_once
def score_heat_map(scores: Sequence[Mapping[str, float]], *, title: str = "", label: str = "KL divergence (nats a token)") -> bytes:
    """Draw what every block costs in quality: a row a layer, a column a block, colour on a logarithmic scale.

    Args:
        scores: for each layer, block name -> score; a block that a layer doesn't have stays empty, and so does a score of
            0 or below, which a logarithm can't show.
        title: written above.
        label: name and unit of the score.
    """
    names = sorted({n for layer in scores for n in layer}, key=lambda n: tuple(map(_heaviness, n.split("/"))))
    grid = np.array([[layer.get(n, np.nan) for n in names] for layer in scores], dtype=float)
    shown = np.where(grid > 0, grid, np.nan)
    annotated = grid.size <= _MAX_ANNOTATED_CELLS
    figure, (ax,) = new_figure(max(5, 1.5 + (0.36 if annotated else 0.22) * len(names)), 1.9 + min(0.3, 7 / len(scores)) * len(scores))
    ax.grid(False)
    if np.isfinite(shown).any():
        largest = float(np.nanmax(shown))
        norm = LogNorm(vmin=max(float(np.nanmin(shown)), largest * 1e-5), vmax=largest * 1.0001)
        image = ax.imshow(shown, aspect="auto", cmap="YlOrRd", norm=norm, interpolation="nearest")
        bar = figure.colorbar(image, ax=ax, pad=0.01)
        bar.set_label(label, fontsize=8)
        bar.ax.tick_params(labelsize=7)
        if annotated:
            for (i, j), value in np.ndenumerate(grid):
                if np.isfinite(value):
                    dark = value > 0 and norm(value) > 0.6
                    ax.text(j, i, _short(value), ha="center", va="center", fontsize=6.5, color="white" if dark else INK)
    ax.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
    step = max(1, len(scores) // 20)
    ax.set_yticks(range(0, len(scores), step))
    set_labels(ax, title=title, x="block (attention / FFN); white: 0, or not in this layer", y="layer")
    return to_png(figure)


@drawn_once
def loss_bars(losses: Mapping[str, tuple[float, float]], *, title: str = "", x: str = "loss (share of the output's energy)") -> bytes:
    """Draw the loss of every variant as initialised and after training, one pair of bars each, on a logarithmic axis.

    Args:
        losses: variant -> (before, after).
        title: written above.
        x: name and unit of the loss.
    """
    names = list(losses)
    figure, (ax,) = new_figure(6.4, 1.1 + 0.3 * len(names))
    rows = np.arange(len(names))
    ax.barh(rows - 0.19, [losses[n][0] for n in names], height=0.36, color=MUTED, label="as initialised")
    ax.barh(rows + 0.19, [losses[n][1] for n in names], height=0.36, color=BLUE, label="after training")
    positive = [v for pair in losses.values() for v in pair if v > 0]
    if positive:
        ax.set_xscale("log")
        ax.set_xlim(min(positive) / 2, max(positive) * 1.5)
    ax.set_yticks(rows, names)
    ax.invert_yaxis()
    ax.legend(fontsize=7, frameon=False, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2, borderaxespad=0.2)
    set_labels(ax, title=title, x=x)
    return to_png(figure)


@drawn_once
def loss_curve(curves: Mapping[str, Sequence[tuple[float, float]]], *, title: str = "", x: str = "tokens", y: str = "loss") -> bytes:
    """Draw losses over training.

    Args:
        curves: name -> (position, loss) pairs in order.
        title: written above.
        x: name and unit of the position.
        y: name and unit of the loss.
    """
    figure, (ax,) = new_figure(7.2, 3.2)
    for i, (name, points) in enumerate(curves.items()):
        if points:
            every = max(1, len(points) // 8)
            ax.plot(*zip(*points, strict=True), linewidth=1.4, label=name, markersize=3.5, markevery=(i % every, every), **line_look(i))
    if all(v > 0 for points in curves.values() for _, v in points) and any(curves.values()):
        ax.set_yscale("log")
    if len(ax.get_lines()) > 1:
        ax.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    set_labels(ax, title=title, x=x, y=y)
    return to_png(figure)


@drawn_once
def retention_bars(retention: Mapping[str, tuple[float, float]], *, floor: float | None = None, title: str = "") -> bytes:
    """Draw the share of the parent's accuracy that a child keeps, a bar a task, with its standard error.

    Args:
        retention: task -> (retention, standard error), both as shares of 1.
        floor: drawn as a line: what the scenario asks for.
        title: written above.
    """
    names = list(retention)
    figure, (ax,) = new_figure(6.4, 1.1 + 0.27 * len(names))
    values = [retention[n][0] for n in names]
    colours = [ORANGE if floor is not None and v < floor else BLUE for v in values]
    ax.barh(range(len(names)), values, xerr=[retention[n][1] for n in names], color=colours, height=0.66, error_kw={"ecolor": INK, "lw": 1})
    ax.set_xlim(min([0.0, *(v - e for v, e in retention.values())]) * 1.05, max([1.0, *(v + e for v, e in retention.values())]) * 1.02)
    for row, name in enumerate(names):
        value, error = retention[name]
        below = " (below the floor)" if floor is not None and value < floor else ""
        # On the bar where it is long enough to be read on, else right of bar and error.
        at, colour = (0.01, "white") if value - error > 0.45 else (max(value + error, 0.0) + 0.01, INK)
        ax.text(at, row, f"{100 * value:.1f} ± {100 * error:.1f} %{below}", va="center", fontsize=7, color=colour)
    ax.axvline(1, color=MUTED, linewidth=1)
    if floor is not None:
        ax.axvline(floor, color=ORANGE, linewidth=1, linestyle="--")
    ax.set_yticks(range(len(names)), names)
    ax.invert_yaxis()
    set_labels(ax, title=title, x="retention (1 = the parent)" + ("; dashed: the scenario's floor" if floor is not None else ""))
    return to_png(figure)


@drawn_once
def frontier(
    points: Sequence[FrontierPoint], *, x: str, y: str, title: str = "", children: str = "children (measured)", is_loss: bool = False
) -> bytes:
    """Draw quality against what it costs: the parent, the children, and predicted solutions joined by a line.

    Args:
        points: the models; at least one.
        x: name and unit of the horizontal axis.
        y: name and unit of the vertical axis.
        title: written above.
        children: what the children are called.
        is_loss: whether y is a loss, 0 for the parent, over orders of magnitude; its axis is then logarithmic but around 0.
    """
    figure, (ax,) = new_figure(6.8, 4.0)
    predicted = sorted((p.x, p.y) for p in points if p.kind == "solution")
    if predicted:
        ax.plot(*zip(*predicted, strict=True), color=MUTED, linewidth=1.2, marker=".", label="solutions (predicted)")
    _draw_models(ax, [p for p in points if p.kind == "searched"], ORANGE, "s", "as first found")
    _draw_models(ax, [p for p in points if p.kind == "child"], BLUE, "o", children)
    _draw_models(ax, [p for p in points if p.kind == "parent"], INK, "*", "parent")
    losses = [p.y for p in points if p.y > 0]
    if is_loss and losses:
        ax.set_yscale("symlog", linthresh=max(min(losses), 1e-3 * max(losses)))
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.margins(0.14)
    ax.legend(fontsize=7, frameon=False, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=4, borderaxespad=0.2)
    set_labels(ax, title=title, x=x, y=y, above_legend=True)
    name_points(ax, [(p.name, p.x, p.y) for p in points if p.kind != "solution"])
    return to_png(figure)


def _draw_models(ax: Axes, points: Sequence[FrontierPoint], colour: str, marker: str, label: str) -> None:
    """Draw named points with their error bars."""
    if not points:
        return
    ax.errorbar(
        [p.x for p in points],
        [p.y for p in points],
        xerr=[p.x_error for p in points],
        yerr=[p.y_error for p in points],
        fmt=marker,
        color=colour,
        markersize=11 if marker == "*" else 6,
        elinewidth=1,
        label=label,
    )
