"""The regression from models to costs: known costs come back, outliers and noise included, and the constant is told apart."""

import numpy as np
import pytest

from puzzle_dag.architecture import FFN, Attention, Block
from puzzle_dag.costs.fit import UnidentifiedCostError, fit_costs
from puzzle_dag.costs.probes import count_variants, list_unknowns, plan_probes

ATTENTIONS = [Attention.parse(n) for n in ("kv8", "kv4", "kv1", "linear", "noop")]
FFNS = [FFN.parse(n) for n in ("w768", "w384", "w192", "linear", "noop")]
COSTS = {
    ("attention", "kv8"): 5.0e-3, ("attention", "kv4"): 4.4e-3, ("attention", "kv1"): 3.9e-3, ("attention", "linear"): 1.1e-3,
    ("ffn", "w768"): 7.0e-3, ("ffn", "w384"): 3.8e-3, ("ffn", "w192"): 2.2e-3, ("ffn", "linear"): 1.2e-3,
}  # fmt: skip
CONSTANT_S = 9.0e-3


def plan(engines=2, **options):
    """The design matrix of the planned probes, one row an engine, and the true seconds."""
    probes = plan_probes(Block.parse("kv8/w768"), ATTENTIONS, FFNS, num_layers=6, **options)
    architectures = [p.architecture for p in probes] * engines
    unknowns = list_unknowns(architectures)
    counts = count_variants(architectures, unknowns)
    truth = np.array([COSTS[u] for u in unknowns])
    return counts, truth, CONSTANT_S + counts @ truth


def test_exact_measurements_give_exact_costs():
    counts, truth, seconds = plan()
    fit = fit_costs(counts, seconds)
    np.testing.assert_allclose(fit.seconds, truth, rtol=1e-6)
    assert fit.constant_s == pytest.approx(CONSTANT_S, rel=1e-6)
    assert fit.residual < 1e-6


@pytest.mark.parametrize("seed", range(5))
def test_noise_of_a_percent_moves_predictions_by_about_as_much(seed):
    counts, truth, seconds = plan(engines=3)
    rng = np.random.default_rng(seed)
    fit = fit_costs(counts, seconds * (1 + 0.01 * rng.standard_normal(len(seconds))))
    held_out = rng.multinomial(6, np.full(len(truth), 1 / len(truth)), size=50) * 1.0
    predicted = fit.constant_s + held_out @ fit.seconds
    error = np.abs(predicted / (CONSTANT_S + held_out @ truth) - 1)
    assert np.median(error) < 0.02 and error.max() < 0.08


@pytest.mark.parametrize("row", [0, 2, 5, 9])
def test_an_engine_that_something_slowed_down_hardly_counts(row):
    counts, _truth, seconds = plan()
    rng = np.random.default_rng(row)
    disturbed = seconds * (1 + 0.003 * rng.standard_normal(len(seconds)))
    disturbed[row] *= 1.6
    fit = fit_costs(counts, disturbed)
    predicted = fit.constant_s + counts @ fit.seconds
    assert np.abs(predicted / seconds - 1).max() < 0.03

    full = np.hstack([counts, np.ones((len(counts), 1))])
    plain = full @ np.linalg.lstsq(full / disturbed[:, None], np.ones(len(full)), rcond=None)[0]
    assert np.abs(plain / seconds - 1).max() > 0.04, "the disturbance must be one that plain least squares can't take"


@pytest.mark.parametrize("spread", [0.05, 0.12])
def test_noise_pulls_predictions_to_neither_side(spread):
    """Relative to the measurement itself, 12 % of noise would pull a fit down by 2.9 % (1 / (1 + 2 * 0.12 ** 2))."""
    counts, _truth, seconds = plan(engines=4)
    rng = np.random.default_rng(1)
    off = []
    for _ in range(60):
        fit = fit_costs(counts, seconds * np.exp(spread * rng.standard_normal(len(seconds))))
        off.append(np.mean((fit.constant_s + counts @ fit.seconds) / seconds - 1))
    assert abs(np.mean(off)) < 0.25 * 2 * spread**2


def test_costs_are_never_negative():
    counts, _truth, seconds = plan()
    rng = np.random.default_rng(3)
    fit = fit_costs(counts, np.abs(seconds * (1 + 0.5 * rng.standard_normal(len(seconds)))) + 1e-6)
    assert (fit.seconds >= 0).all() and fit.constant_s >= 0
    assert (fit.errors >= 0).all()


def test_standard_errors_match_the_spread_over_many_fits():
    counts, _truth, seconds = plan(engines=4)
    rng = np.random.default_rng(0)
    fits = [fit_costs(counts, seconds * (1 + 0.01 * rng.standard_normal(len(seconds)))) for _ in range(100)]
    spread = np.std([f.seconds for f in fits], axis=0)
    claimed = np.mean([f.errors for f in fits], axis=0)
    assert (claimed / spread > 0.5).all() and (claimed / spread < 2).all()


def test_equal_depths_are_refused():
    counts = np.array([[2.0, 4.0], [3.0, 3.0], [4.0, 2.0], [1.0, 5.0]])
    with pytest.raises(UnidentifiedCostError, match="2 of 3 unknowns"):
        fit_costs(counts, np.array([1.0, 1.1, 1.2, 0.9]))


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_impossible_seconds_are_refused(bad):
    counts, _, seconds = plan()
    seconds[3] = bad
    with pytest.raises(ValueError, match="positive and finite"):
        fit_costs(counts, seconds)
