"""The one look of all pictures: figures without global state, a small palette, and PNG bytes small enough for an event log."""

import hashlib
import io
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, ParamSpec

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
_MOST_KEPT = 64
_UNSAID = (" at 0x", "array(")
_Arguments = ParamSpec("_Arguments")


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


def set_labels(ax: Axes, *, title: str = "", x: str = "", y: str = "", above_legend: bool = False) -> None:
    """Write the title (left-aligned; where asked for, above a legend of one line) and the names of the axes, units included."""
    ax.set_title(title, loc="left", fontsize=10, color=INK, fontweight="bold", pad=20 if above_legend else None)
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


def drawn_once(draw: Callable[_Arguments, bytes]) -> Callable[_Arguments, bytes]:
    """Keep the last pictures of a function by what they were drawn from: pages show again what an asset's metadata shows.

    A refresh writes every scenario's page anew, most of them from the same numbers as before, and drawing is what takes
    its time. Arguments that don't say all that they hold, iterators and arrays, are drawn each time.
    """
    kept: dict[bytes, bytes] = {}

    @wraps(draw)
    def draw_or_find(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> bytes:
        said = repr((args, sorted(kwargs.items())))
        if any(words in said for words in _UNSAID):
            return draw(*args, **kwargs)
        key = hashlib.sha256(said.encode()).digest()
        if key not in kept:
            while len(kept) >= _MOST_KEPT:
                del kept[next(iter(kept))]
            kept[key] = draw(*args, **kwargs)
        return kept[key]

    return draw_or_find


def to_png(figure: Figure) -> bytes:
    """Return the figure as PNG bytes with a palette, a third of the size that full colour takes."""
    full = io.BytesIO()
    figure.savefig(full, format="png")
    small = io.BytesIO()
    Image.open(full).convert("RGB").quantize(_NUM_COLOURS, dither=Image.Dither.NONE).save(small, format="PNG", optimize=True)
    return small.getvalue()
