"""The one look of all pictures: figures without global state, a small palette, and PNG bytes small enough for an event log."""

import io

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
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

_DOTS_PER_INCH = 110
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


def to_png(figure: Figure) -> bytes:
    """Return the figure as PNG bytes with a palette, a third of the size that full colour takes."""
    full = io.BytesIO()
    figure.savefig(full, format="png")
    small = io.BytesIO()
    Image.open(full).convert("RGB").quantize(_NUM_COLOURS, dither=Image.Dither.NONE).save(small, format="PNG", optimize=True)
    return small.getvalue()
