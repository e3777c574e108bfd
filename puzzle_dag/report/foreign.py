"""Pictures and pages of a foreign library: layers and variants of any name, and what the solutions chose among them."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.colors import LogNorm, Normalize
from matplotlib.patches import Rectangle

from puzzle_dag.report.canvas import BLUE, INK, MUTED, drawn_once, name_points, new_figure, set_labels, to_png
from puzzle_dag.report.html import Picture, Section, Table, render_page

_MAX_LABELS = 60
_LONGEST_LABEL = 28


def _label(name: str) -> str:
    return name if len(name) <= _LONGEST_LABEL else f"{name[: _LONGEST_LABEL - 1]}…"


@drawn_once
def variant_map(
    grid: Mapping[str, Mapping[str, float]], *, chosen: Mapping[str, str] | None = None, label: str = "", title: str = ""
) -> bytes:
    """Draw a number of every variant: a row a layer, a column a variant, colour by value, a framed dot where one was chosen.

    Args:
        grid: layer -> variant -> value; a layer may lack variants that others have, which stay white.
        chosen: layer -> variant.
        label: name (and unit) of the number.
        title: written above.
    """
    layers, variants = list(grid), list(dict.fromkeys(v for row in grid.values() for v in row))
    values = np.array([[row.get(v, np.nan) for v in variants] for row in grid.values()], dtype=float)
    width, height = min(0.34, 14 / len(variants)), min(0.24, 9 / len(layers))
    figure, (ax,) = new_figure(max(5.0, 2.4 + width * len(variants)), max(2.6, 1.9 + height * len(layers)))
    ax.grid(False)
    ax.set_facecolor("white")
    positive = values[np.isfinite(values) & (values > 0)]
    finite = values[np.isfinite(values)]
    is_wide = positive.size and finite.min() >= 0 and positive.max() / positive.min() > 50
    low = max(positive.min(), positive.max() * 1e-4) if is_wide else finite.min()
    norm = LogNorm(low, positive.max() * 1.0001) if is_wide else Normalize(low, finite.max())
    # A logarithm has no 0: what is free takes the lightest colour, white is what isn't there.
    shown = np.where(values <= 0, positive.min() if positive.size else 0, values) if is_wide else values
    image = ax.imshow(shown, aspect="auto", cmap="YlOrRd", norm=norm, interpolation="nearest")
    bar = figure.colorbar(image, ax=ax, pad=0.01)
    bar.set_label(label + (" (log scale)" if is_wide else ""), fontsize=8)
    bar.ax.tick_params(labelsize=7)
    for row, layer in enumerate(layers):
        if chosen and chosen.get(layer) in variants:
            column = variants.index(chosen[layer])
            ax.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor=BLUE, linewidth=1.8, clip_on=False))
            ax.plot(column, row, marker="o", markersize=3, color=INK)
    step_x, step_y = -(-len(variants) // _MAX_LABELS), -(-len(layers) // 32)
    ax.set_xticks(range(0, len(variants), step_x), [_label(v) for v in variants[::step_x]], rotation=90, fontsize=7)
    ax.set_yticks(range(0, len(layers), step_y), [_label(name) for name in layers[::step_y]], fontsize=7)
    set_labels(ax, title=title, x="variant" + ("; a dot in a frame: chosen" if chosen else ""))
    return to_png(figure)


@drawn_once
def trade_off(sweep: Sequence[tuple[float, float]], points: Mapping[str, tuple[float, float]], *, x: str, y: str, title: str = "") -> bytes:
    """Draw what a bound costs: the least sum of y at each bound of x as a line, each scenario's solution as a named point.

    Args:
        sweep: (sum of x, least sum of y), in the order of x.
        points: name -> (sum of x, sum of y).
        x: name of the horizontal number.
        y: name of the vertical number.
        title: written above.
    """
    figure, (ax,) = new_figure(6.8, 4.0)
    if sweep:
        ax.plot(*zip(*sweep, strict=True), color=MUTED, marker=".", linewidth=1.2, label=f"least {y} with only {x} bounded")
    if points:
        ax.plot(*zip(*points.values(), strict=True), color=BLUE, marker="D", markersize=6, linestyle="", label="solutions of the scenarios")
    ax.margins(0.1)
    ax.legend(fontsize=7, frameon=False, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2, borderaxespad=0.2)
    set_labels(ax, title=title, x=f"sum of {x}", y=f"sum of {y}")
    name_points(ax, [(name, px, py) for name, (px, py) in points.items()])
    return to_png(figure)


def render_foreign_page(
    title: str,
    *,
    subtitle: str,
    tables: Sequence[Table],
    pictures: Sequence[Picture],
    links: Sequence[tuple[str, str]] = (),
    footer: str = "",
) -> str:
    """Return a self-contained HTML page of a foreign library or of one of its scenarios."""
    return render_page(title, [Section("What was found", tables=tables, pictures=pictures, links=links)], subtitle=subtitle, footer=footer)
