"""From measured models to the cost of each variant: one robust, non-negative regression a batch size and phase.

The time of a model is the engine's constant plus the sum of its pieces' times (additivity holds within a few
percent on real engines). Residuals are relative to the fit, since noise grows with the time. Relative to what was
measured they would pull the fit below its data: a fast engine would count for more than a slow one. Huber weights keep
outliers from counting much; those far on the slow side, engines that something disturbed, count less still.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls  # type: ignore[import-untyped]

_HUBER_LIMIT = 1.345
"""Scales beyond which a residual is cut off; the usual choice, which keeps 95 % of least squares' efficiency under normal noise."""
_DISTURBED = 3.0
"""Scales above the fit from which on a measurement loses its weight: of two engines of a model the slow one was disturbed."""
_SMALLEST_SCALE = 1e-3
_SMALLEST_SHARE = 0.25
"""Share of what was measured that a fit counts as at least where something is divided by it, so that no row gets all the weight."""
_ROUNDS = 50
_MAD_TO_SIGMA = 1.4826

Vector = NDArray[np.float64]


class UnidentifiedCostError(ValueError):
    """The measured models don't tell some unknowns apart."""


@dataclass(frozen=True, slots=True)
class Fit:
    """Seconds of each unknown and of the engine's constant, with standard errors."""

    seconds: Vector
    """One an unknown, none negative."""
    constant_s: float
    """The intercept: what a model without any block would take."""
    errors: Vector
    """Standard error of each unknown's seconds; 0 where it was held at zero by the bound."""
    constant_error_s: float
    """Standard error of the constant."""
    residual: float
    """Robust relative spread of the measurements about the fit (1.4826 times the median absolute relative residual)."""


def _solve_weighted(design: Vector, targets: Vector, weights: Vector) -> Vector:
    """Return the non-negative least-squares solution. Columns are scaled to one first, which keeps it well conditioned."""
    root = np.sqrt(weights)
    rows = design * root[:, None]
    scales = np.linalg.norm(rows, axis=0)
    scales[scales == 0] = 1.0
    solution: Vector = nnls(rows / scales, targets * root, maxiter=100 * design.shape[1])[0]
    unscaled: Vector = solution / scales
    return unscaled


def _weigh(residuals: Vector, scale: float) -> Vector:
    """Return Huber weights, alike for slow and fast, since tables are held against medians; beyond `_DISTURBED`, slow ones get less."""
    sizes = np.maximum(np.abs(residuals), 1e-300)
    disturbed = np.where(residuals > 0, np.minimum(1.0, _DISTURBED * scale / sizes), 1.0)
    weights: Vector = np.minimum(1.0, _HUBER_LIMIT * scale / sizes) * disturbed
    return weights


def _standard_errors(design: Vector, solution: Vector, weights: Vector, residuals: Vector) -> Vector:
    """Return standard errors of the entries above zero, from the weighted normal equations."""
    free = solution > 0
    errors = np.zeros(design.shape[1])
    num_spare = weights.sum() - free.sum()
    if free.any() and num_spare > 0:
        rows = design[:, free] * np.sqrt(weights)[:, None]
        variance = float((weights * residuals**2).sum() / num_spare)
        errors[free] = np.sqrt(variance * np.maximum(np.diag(np.linalg.pinv(rows.T @ rows)), 0.0))
    return errors


def fit_costs(counts: Vector, measured_s: Vector) -> Fit:
    """Fit `measured_s ~ constant + counts @ seconds` with non-negative seconds, robustly (iteratively reweighted Huber).

    Args:
        counts: how often each unknown occurs in each measured model, [measurements, unknowns].
        measured_s: seconds of each model, one engine each, [measurements].

    Raises:
        UnidentifiedCostError: the models don't tell the unknowns and the constant apart (say, all equally deep).
        ValueError: a measurement is not positive and finite.
    """
    if not (np.isfinite(measured_s).all() and (measured_s > 0).all()):
        raise ValueError(f"measured seconds must be positive and finite, got {measured_s.tolist()}")
    full = np.hstack([counts, np.ones((len(counts), 1))])
    rank = int(np.linalg.matrix_rank(full))
    if rank < full.shape[1]:
        raise UnidentifiedCostError(
            f"{len(counts)} measurements tell only {rank} of {full.shape[1]} unknowns apart; measure models of other depths and mixes"
        )
    fitted_s, weights = measured_s, np.ones(len(measured_s))
    for _ in range(_ROUNDS):
        design = full / fitted_s[:, None]
        solution = _solve_weighted(design, measured_s / fitted_s, weights)
        before_s, fitted_s = fitted_s, np.maximum(full @ solution, _SMALLEST_SHARE * measured_s)
        residuals = measured_s / fitted_s - 1.0
        scale = max(_MAD_TO_SIGMA * float(np.median(np.abs(residuals))), _SMALLEST_SCALE)
        updated = _weigh(residuals, scale)
        if np.abs(updated - weights).max() < 1e-6 and np.abs(fitted_s / before_s - 1).max() < 1e-6:
            break
        weights = updated
    errors = _standard_errors(design, solution, weights, residuals)
    spread = _MAD_TO_SIGMA * float(np.median(np.abs(residuals)))
    return Fit(solution[:-1], float(solution[-1]), errors[:-1], float(errors[-1]), spread)
