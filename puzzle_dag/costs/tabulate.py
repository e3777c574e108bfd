"""From measured models to a cost table: one fit a batch size and phase, with bytes by arithmetic beside the seconds."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from puzzle_dag.architecture import FFN, Architecture, Attention
from puzzle_dag.config import Target
from puzzle_dag.costs.fit import Vector, fit_costs
from puzzle_dag.costs.probes import Variant, count_variants, list_unknowns
from puzzle_dag.costs.rows import RowTemplate
from puzzle_dag.costs.table import CONSTANT, PHASES, CostRow, CostTable, sort_rows
from puzzle_dag.engine.jobs import EngineResult
from puzzle_dag.model.configuration_puzzle_dag import PuzzleDagConfig
from puzzle_dag.piece_costs import Phase

_CONSTANT: Variant = ("constant", CONSTANT)

Fitted = dict[Variant, tuple[float, float]]
"""Variant -> seconds and their standard error, of one batch size and phase."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """One engine's measurement of one model."""

    architecture: Architecture
    """The model's blocks."""
    result: EngineResult
    """Its times."""


def _pool_noise(measurements: list[Measurement], batch: int, phase: Phase) -> float:
    """Return the relative standard deviation between engines of one model, pooled over the models."""
    groups: dict[Architecture, list[float]] = {}
    for m in measurements:
        groups.setdefault(m.architecture, []).append(m.result.at(batch).median_s(phase))
    squares, spare = 0.0, 0
    for values in groups.values():
        relative = np.array(values) / np.mean(values)
        squares, spare = squares + float(((relative - 1.0) ** 2).sum()), spare + len(values) - 1
    return float(np.sqrt(squares / spare)) if spare else 0.0


def _build_rows(
    shape: PuzzleDagConfig, target: Target, pieces: list[Variant], fits: dict[tuple[int, Phase], Fitted], measured: list[Measurement]
) -> list[CostRow]:
    template, rows = RowTemplate.measured(shape, target, measured[0].result), []
    for (batch, phase), fitted in fits.items():
        noise = _pool_noise(measured, batch, phase)
        for place, name in [*pieces, _CONSTANT]:
            seconds, error = (0.0, 0.0) if name == "noop" else fitted[place, name]
            rows.append(template.fill(place, name, batch, phase, seconds=seconds, error=error, noise=noise))
    return rows


def fit_table(
    shape: PuzzleDagConfig, target: Target, attentions: Iterable[Attention], ffns: Iterable[FFN], measured: list[Measurement]
) -> CostTable:
    """Fit the costs of some variants to measurements of models, one robust regression a batch size and phase.

    Raises:
        UnidentifiedCostError: the measurements don't tell the variants apart.
        UnknownDtypeError: the bytes of the target's number types are not known.
    """
    unknowns = list_unknowns(m.architecture for m in measured)
    counts = count_variants((m.architecture for m in measured), unknowns)
    fits: dict[tuple[int, Phase], Fitted] = {}
    residuals = {}
    for batch in target.batch_sizes:
        for phase in PHASES:
            times: Vector = np.array([m.result.at(batch).median_s(phase) for m in measured])
            fit = fit_costs(counts, times)
            fitted: Fitted = {v: (float(s), float(e)) for v, s, e in zip(unknowns, fit.seconds, fit.errors, strict=True)}
            fitted[_CONSTANT] = (fit.constant_s, fit.constant_error_s)
            fits[batch, phase], residuals[f"{batch}/{phase}"] = fitted, fit.residual
    pieces: list[Variant] = [("attention", a.name) for a in sorted(set(attentions))]
    pieces += [("ffn", f.name) for f in sorted(set(ffns))]
    rows = _build_rows(shape, target, pieces, fits, measured)
    return CostTable(sort_rows(rows), target, len(measured), residuals)
