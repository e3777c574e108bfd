"""Predicted against measured, a row for each model, batch size and phase: how far a cost table can be trusted.

Where the table's seconds are levelled, so are those that were measured: both are at the same of the machine's paces.
"""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

from puzzle_dag.architecture import Architecture
from puzzle_dag.costs.probes import name_architecture
from puzzle_dag.costs.table import CostTable
from puzzle_dag.costs.tabulate import Measurement, group_engines

Kind = Literal["probe", "held out"]
TimedPhase = Literal["prefill", "decode", "total"]
TIMED_PHASES: tuple[TimedPhase, ...] = ("prefill", "decode", "total")


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One model at one batch size in one phase, as the table predicts it and as engines measured it."""

    target: str
    """Name of the target."""
    kind: Kind
    """A probe, which the table was fitted to (its error is a residual), or a model that was held out of the fit."""
    model: str
    """Blocks of the model, layer by layer, with spaces between."""
    num_layers: int
    """Depth of the model."""
    batch: int
    """Concurrent requests."""
    phase: TimedPhase
    """"prefill", "decode", or "total", the two together."""
    predicted_s: float
    """Seconds by the table."""
    measured_s: float
    """Median over the engines of each engine's median, at the pace of the table that it is held against (`CostTable.levelling`)."""
    error: float
    """predicted / measured - 1."""
    noise: float | None
    """Mean difference between two engines of this same model, levelled like `measured_s`, as a share of the median; None for a
    single engine."""
    num_engines: int
    """Engines that measured it."""


def predict(table: CostTable, architecture: Architecture, batch: int, phase: TimedPhase) -> float:
    """Return the seconds that a table predicts. Raises CostTableError for a variant that it lacks."""
    if phase == "total":
        return table.seconds(architecture, batch, "prefill") + table.seconds(architecture, batch, "decode")
    return table.seconds(architecture, batch, phase)


def measure_noise(seconds: Sequence[float]) -> float | None:
    """Return the mean difference between two engines over all pairs, as a share of the median; None for a single one.

    Its expectation doesn't depend on the number of engines, as that of largest minus smallest would.
    """
    pairs = list(combinations(seconds, 2))
    return statistics.fmean(abs(a - b) for a, b in pairs) / statistics.median(seconds) if pairs else None


def compare(table: CostTable, measured: Iterable[Measurement], kind: Kind) -> list[Comparison]:
    """Hold a table against measurements of models, one row a model, batch size of the table, and phase.

    Raises:
        CostTableError: a model has a variant that the table lacks.
        ValueError: the table is levelled, and a measurement has no reference of the machine's pace.
    """
    rows = []
    for architecture, engines in group_engines(measured).items():
        for batch in table.batch_sizes:
            for phase in TIMED_PHASES:
                times = [table.levelling.seconds(e.at(batch), phase) for e in engines]
                predicted_s, measured_s = predict(table, architecture, batch, phase), statistics.median(times)
                rows.append(
                    Comparison(
                        target=table.target.name,
                        kind=kind,
                        model=" ".join(name_architecture(architecture)),
                        num_layers=len(architecture),
                        batch=batch,
                        phase=phase,
                        predicted_s=predicted_s,
                        measured_s=measured_s,
                        error=predicted_s / measured_s - 1,
                        noise=measure_noise(times),
                        num_engines=len(times),
                    )
                )
    return rows
