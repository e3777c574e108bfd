"""How many times as fast: the ratio of two models' times that were measured in turns, with its confidence interval."""

import math
import statistics
from collections.abc import Sequence

from scipy.stats import t as student_t  # type: ignore[import-untyped]


def estimate_log_ratio(parent_s: Sequence[float], child_s: Sequence[float]) -> tuple[float, float]:
    """Return the mean over the turns of log(parent / child), and its standard error. Arguments as `estimate_ratio`."""
    logs = [math.log(p / c) for p, c in zip(parent_s, child_s, strict=True)]
    assert len(logs) >= 2
    return statistics.fmean(logs), statistics.stdev(logs) / math.sqrt(len(logs))


def turns_for(turns: int, error: float, wanted: float, most: int) -> int:
    """Return how many turns should bring an error down to what is wanted; as many as there are where it is or no more may be.

    Args:
        turns: as many were measured.
        error: standard error, or half an interval's width, that they leave; it falls with the root of their number, or faster.
        wanted: what it should be, in the same unit; 0 for as little as can be.
        most: turns that there may be. They are not more than doubled at once, for few tell their own noise poorly.
    """
    if error <= wanted or turns >= most:
        return turns
    ratio = min(error / wanted, 2.0) if wanted else 2.0
    return min(most, 2 * turns, max(math.ceil(turns * ratio**2), turns + 1))


def estimate_ratio(parent_s: Sequence[float], child_s: Sequence[float]) -> tuple[float, float, float]:
    """Return parent / child as (geometric mean, low, high): a 95 % interval by Student's t on the logarithms of paired ratios.

    Args:
        parent_s: the parent's seconds, one a turn.
        child_s: the child's, of the same turns; two turns at least.
    """
    mean, error = estimate_log_ratio(parent_s, child_s)
    half = float(student_t.ppf(0.975, len(child_s) - 1)) * error
    return math.exp(mean), math.exp(mean - half), math.exp(mean + half)
