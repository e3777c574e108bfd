"""From measured models to a cost table: one fit a batch size and phase, with bytes by arithmetic beside the seconds.

Engines ran at different times, and the machine at different paces. Where that lowers the noise, their seconds are levelled first.

Mixtures have one unknown more: what each piece that isn't the parent's own takes longer among unlike layers. In the table
it is part of each such piece's seconds, so that costs still add up, and are right for children.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from puzzle_dag.architecture import FFN, Architecture, Attention, Block
from puzzle_dag.config import Target
from puzzle_dag.costs.fit import Vector, fit_costs
from puzzle_dag.costs.probes import Variant, count_unlike, count_variants, list_unknowns
from puzzle_dag.costs.rows import RowTemplate
from puzzle_dag.costs.table import CONSTANT, PHASES, CostRow, CostTable, sort_rows
from puzzle_dag.engine.jobs import EngineResult
from puzzle_dag.engine.levelling import Levelling, decide_levelling, pool_noise
from puzzle_dag.model.configuration_puzzle_dag import PuzzleDagConfig
from puzzle_dag.piece_costs import Phase
from puzzle_dag.shrinkage import shrunk_share

VERSION = 3
_CONSTANT: Variant = ("constant", CONSTANT)
_MIXING: Variant = ("constant", "mixing")
_SMALLEST_SHARE = 0.1

Fitted = dict[Variant, tuple[float, float]]
"""Variant -> seconds and their standard error, of one batch size and phase."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """One engine's measurement of one model."""

    architecture: Architecture
    """The model's blocks."""
    result: EngineResult
    """Its times."""


def group_engines(measured: Iterable[Measurement]) -> dict[Architecture, list[EngineResult]]:
    """Return the engines of each model, in the order of measurement."""
    groups: dict[Architecture, list[EngineResult]] = {}
    for m in measured:
        groups.setdefault(m.architecture, []).append(m.result)
    return groups


def _measure_noise(models: Iterable[list[EngineResult]], batch: int, phase: Phase, levelling: Levelling) -> float:
    """Return the relative standard deviation between engines of one model, pooled over the models; 0 for single engines."""
    return pool_noise([levelling.seconds(e.at(batch), phase) for e in engines] for engines in models) or 0.0


def _build_rows(
    template: RowTemplate,
    parent: Block,
    pieces: list[Variant],
    fits: dict[tuple[int, Phase], Fitted],
    noises: dict[tuple[int, Phase], float],
) -> list[CostRow]:
    spared, rows = {("attention", parent.attention.name), ("ffn", parent.ffn.name), _CONSTANT}, []
    for (batch, phase), fitted in fits.items():
        noise, (mixing_s, mixing_error) = noises[batch, phase], fitted[_MIXING]
        for piece in [*pieces, _CONSTANT]:
            seconds, error = (0.0, 0.0) if piece[1] == "noop" else fitted[piece]
            own_s, own_error = (0.0, 0.0) if piece[1] == "noop" or piece in spared else (mixing_s, mixing_error)
            error = float(np.hypot(error, own_error))
            rows.append(template.fill(*piece, batch, phase, seconds=seconds + own_s, error=error, noise=noise, mixing_s=own_s))
    return rows


def _find_mixing(counts: Vector, unlike: Vector, times: Vector) -> tuple[float, float]:
    """Return what a piece takes longer among unlike layers, and its standard error, in seconds; zeros without mixtures.

    It is in every prediction of a child, and a few mixtures tell it poorly. So it counts by as much as it stands out of its own noise
    (`shrunk_share`).
    """
    if not unlike.any():
        return 0.0, 0.0
    fit = fit_costs(np.hstack([counts, unlike[:, None]]), times)
    found_s, error_s = float(fit.seconds[-1]), float(fit.errors[-1])
    share = shrunk_share(found_s, error_s)
    return share * found_s, share * error_s


def fit_table(
    shape: PuzzleDagConfig,
    parent: Block,
    target: Target,
    attentions: Iterable[Attention],
    ffns: Iterable[FFN],
    measured: list[Measurement],
) -> CostTable:
    """Fit the costs of some variants to measurements of models, one robust regression a batch size and phase.

    The table's `levelling` says whether its seconds are as measured or at the machine's pace; the measurements decide.

    Args:
        shape: the parent's configuration.
        parent: the parent's own block, which pays nothing for unlike layers.
        target: what was measured.
        attentions: attention variants whose rows are wanted; each is in a model that was measured, or a no-op.
        ffns: FFN variants, likewise.
        measured: engines, several of one model among them.

    Raises:
        UnidentifiedCostError: the measurements don't tell the variants apart.
        UnknownDtypeError: the bytes of the target's number types are not known.
    """
    architectures = [m.architecture for m in measured]
    unknowns = list_unknowns(architectures)
    counts, unlike = count_variants(architectures, unknowns), count_unlike(architectures, parent)
    models = list(group_engines(measured).values())
    levelling = decide_levelling(models, PHASES)
    fits: dict[tuple[int, Phase], Fitted] = {}
    noises, residuals = {}, {}
    for batch in target.batch_sizes:
        for phase in PHASES:
            times: Vector = np.array([levelling.seconds(m.result.at(batch), phase) for m in measured])
            mixing_s, mixing_error_s = _find_mixing(counts, unlike, times)
            # Where noise is all there is, a mixture may have run in less time than mixing is said to take.
            fit = fit_costs(counts, np.maximum(times - mixing_s * unlike, _SMALLEST_SHARE * times))
            fitted: Fitted = {v: (float(s), float(e)) for v, s, e in zip(unknowns, fit.seconds, fit.errors, strict=True)}
            fitted |= {_CONSTANT: (fit.constant_s, fit.constant_error_s), _MIXING: (mixing_s, mixing_error_s)}
            fits[batch, phase], residuals[f"{batch}/{phase}"] = fitted, fit.residual
            noises[batch, phase] = _measure_noise(models, batch, phase, levelling)
    pieces: list[Variant] = [("attention", a.name) for a in sorted(set(attentions))]
    pieces += [("ffn", f.name) for f in sorted(set(ffns))]
    rows = _build_rows(RowTemplate.measured(shape, target, measured[0].result), parent, pieces, fits, noises)
    return CostTable(sort_rows(rows), target, len(measured), residuals, levelling=levelling)
