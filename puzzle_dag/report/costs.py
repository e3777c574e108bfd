"""Pictures of costs: what each variant takes at each batch size, and how far the fit is from what was measured."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from puzzle_dag.report.canvas import BLUE, GREEN, GRID, INK, MUTED, ORANGE, drawn_once, new_figure, set_labels, to_png


class CostPoint(Protocol):
    """One variant's cost at one batch size in one phase, as a row of a cost table has it."""

    @property
    def place(self) -> str:
        """Return "attention", "ffn" or "constant"."""

    @property
    def variant(self) -> str:
        """Return its name."""

    @property
    def phase(self) -> str:
        """Return "prefill" or "decode"."""

    @property
    def batch(self) -> int:
        """Return the concurrent requests."""

    @property
    def seconds(self) -> float:
        """Return the seconds a layer."""

    @property
    def seconds_error(self) -> float:
        """Return the standard error of the seconds."""


class PredictionPoint(Protocol):
    """One model, predicted and measured."""

    @property
    def kind(self) -> str:
        """Return "probe" or "held out"."""

    @property
    def phase(self) -> str:
        """Return "prefill", "decode" or "total"."""

    @property
    def measured_s(self) -> float:
        """Return the seconds measured."""

    @property
    def error(self) -> float:
        """Return predicted / measured - 1."""


_PHASES = ("prefill", "decode")
_COLOURS: Mapping[str, str] = {"prefill": BLUE, "decode": GREEN}
_PLACES = ("attention", "ffn", "constant")
_PANEL_WIDTH = 1.25
_PANEL_HEIGHT = 1.05


def _order(name: str) -> tuple[int, int]:
    """Sort key of a variant: live ones by size, then linear."""
    return int(not name[-1].isdigit()), -int("".join(c for c in name if c.isdigit()) or 0)


def _draw_panel(ax: Axes, rows: Sequence[CostPoint], phase: str, batches: Sequence[int]) -> None:
    """Draw one variant in one phase: seconds against batch size, with the fit's standard error."""
    ordered = sorted((r for r in rows if r.seconds > 0), key=lambda r: r.batch)
    ax.errorbar(
        [r.batch for r in ordered],
        [r.seconds for r in ordered],
        yerr=[min(r.seconds_error, 0.99 * r.seconds) for r in ordered],
        color=_COLOURS[phase],
        marker="o",
        markersize=2.5,
        linewidth=1.2,
        elinewidth=0.8,
    )
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xticks([batches[0], batches[-1]], [str(batches[0]), str(batches[-1])])
    ax.minorticks_off()
    ax.tick_params(colors=INK, labelsize=6)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(MUTED)
    ax.grid(True, color=GRID, linewidth=0.6)


@drawn_once
def cost_panels(rows: Sequence[CostPoint], *, title: str) -> bytes:
    """Draw the seconds a layer against the batch size: a panel a variant, prefill above decode, one scale a phase.

    No-ops, which cost nothing, are left out. The title should say where the seconds come from.
    """
    groups: dict[tuple[str, str], list[CostPoint]] = {}
    for row in rows:
        if row.variant != "noop":
            groups.setdefault((row.place, row.variant), []).append(row)
    batches = sorted({r.batch for r in rows})
    columns = sorted(groups, key=lambda g: (_PLACES.index(g[0]), _order(g[1])))
    figure = Figure(figsize=(0.9 + _PANEL_WIDTH * len(columns), 0.8 + 2 * _PANEL_HEIGHT), dpi=100, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(columns), sharex=True, sharey="row", squeeze=False)
    for line, phase in zip(axes, _PHASES, strict=True):
        for ax, (place, variant) in zip(line, columns, strict=True):
            _draw_panel(ax, [r for r in groups[place, variant] if r.phase == phase], phase, batches)
            if phase == _PHASES[0]:
                ax.set_title("engine and head" if place == "constant" else f"{place} {variant}", fontsize=7, color=INK)
        line[0].set_ylabel(f"{phase}, s", fontsize=7, color=INK)
    figure.supxlabel("batch (requests)", fontsize=7, color=INK)
    figure.suptitle(title, fontsize=9, color=INK, fontweight="bold", x=0.01, ha="left")
    return to_png(figure)


@drawn_once
def residual_plot(comparisons: Sequence[PredictionPoint], *, title: str = "") -> bytes:
    """Draw the prediction's error against the seconds measured, a point a model and batch size, prefill beside the total.

    Args:
        comparisons: of probes, whose errors are residuals of the fit, and of held-out models.
        title: written above.
    """
    figure, axes = new_figure(8.4, 3.0, 2)
    for ax, phase in zip(axes, ("prefill", "total"), strict=True):
        for kind, colour in (("probe", BLUE), ("held out", ORANGE)):
            points = [(c.measured_s, 100 * c.error) for c in comparisons if (c.kind, c.phase) == (kind, phase)]
            if points:
                ax.scatter([x for x, _ in points], [y for _, y in points], s=12, color=colour, alpha=0.75, linewidths=0, label=kind)
        ax.axhline(0, color=MUTED, linewidth=1)
        ax.set_xscale("log")
        set_labels(ax, title=f"{title}: {phase}" if title else phase, x="measured (s)", y="predicted - measured (%)")
        if ax.get_legend_handles_labels()[0]:
            ax.legend(fontsize=7, frameon=False)
    return to_png(figure)
