"""The one look of all pictures: figures without global state, a small palette, and PNG bytes small enough for an event log."""

import io
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox
from PIL import Image

INK = "#24292f"
MUTED = "#8c959f"
GRID = "#e6e9ec"
BLUE = "#0969da"
GREEN = "#1a7f37"
ORANGE = "#d4670a"
PURPLE = "#8250df"
LINES = (BLUE, ORANGE, GREEN, PURPLE, "#bf3989", "#4d7c8a", "#9a6700", MUTED)
"""Colours of lines and bars, in the order of use."""

DASHES = ("-", "--", ":", "-.")
"""Line styles: one a round through `LINES`, so that no two lines differ in nothing but a shade."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
"""Marks of points, in the order of use: lines can be told apart without their colours."""

_DOTS_PER_INCH = 110
_PLACES = ((7, 6, "left"), (7, -13, "left"), (-7, 6, "right"), (-7, -13, "right"), (7, 20, "left"), (7, -27, "left"), (-7, 20, "right"))
_NUM_COLOURS = 160


def new_figure(width_inches: float, height_inches: float, num_columns: int = 1) -> tuple[Figure, list[Axes]]:
    """Return a figure and its axes, side by side. The figure belongs to nobody else: no pyplot, so threads don't meet."""
    figure = Figure(figsize=(width_inches, height_inches), dpi=_DOTS_PER_INCH, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = [figure.add_subplot(1, num_columns, i + 1) for i in range(num_columns)]
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.spines[["left", "bottom"]].set_color(MUTED)
        ax.tick_params(colors=INK, labelsize=8)
        ax.grid(True, color=GRID, linewidth=0.8)
        ax.set_axisbelow(True)
    return figure, axes


def set_labels(ax: Axes, *, title: str = "", x: str = "", y: str = "") -> None:
    """Write the title (left-aligned) and the names of the axes, units included."""
    ax.set_title(title, loc="left", fontsize=10, color=INK, fontweight="bold")
    ax.set_xlabel(x, fontsize=9, color=INK)
    ax.set_ylabel(y, fontsize=9, color=INK)


def line_look(index: int) -> dict[str, Any]:
    """Return colour, marker and dashes of the line of this index; no two of the first 32 lines look alike."""
    round_ = index // len(LINES)
    return {"color": LINES[index % len(LINES)], "marker": MARKERS[index % len(MARKERS)], "linestyle": DASHES[round_ % len(DASHES)]}


def name_points(ax: Axes, points: Sequence[tuple[str, float, float]]) -> None:
    """Write each point's name beside it, where it covers no other name and no other point, and stays inside of the axes.

    Call it last: where a name fits hangs on the limits of the axes.

    Args:
        ax: the axes that the points are drawn on.
        points: (name, x, y).
    """
    figure = ax.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()
    inside = ax.get_window_extent()
    marks = [ax.transData.transform((x, y)) for _, x, y in points]
    taken: list[Bbox] = []
    for (name, x, y), mark in zip(points, marks, strict=True):
        others = [m for m in marks if m is not mark]
        best: tuple[int, Annotation, Bbox] | None = None
        for right, up, side in _PLACES:
            text = ax.annotate(name, (x, y), xytext=(right, up), textcoords="offset points", fontsize=7.5, color=INK, ha=side)
            box = text.get_window_extent().padded(1.0)
            # Error bars run below the name, not through it.
            text.set_bbox({"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 0.6})
            faults = sum(box.overlaps(t) for t in taken) + sum(box.contains(*m) for m in others)
            faults += not (inside.x0 <= box.x0 and box.x1 <= inside.x1 and inside.y0 <= box.y0 and box.y1 <= inside.y1)
            if best is not None and faults >= best[0]:
                text.remove()
                continue
            if best is not None:
                best[1].remove()
            best = (faults, text, box)
            if not faults:
                break
        assert best is not None
        taken.append(best[2])


def to_png(figure: Figure) -> bytes:
    """Return the figure as PNG bytes with a palette, a third of the size that full colour takes."""
    full = io.BytesIO()
    figure.savefig(full, format="png")
    small = io.BytesIO()
    Image.open(full).convert("RGB").quantize(_NUM_COLOURS, dither=Image.Dither.NONE).save(small, format="PNG", optimize=True)
    return small.getvalue()
