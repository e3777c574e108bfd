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


def estimate_ratio(parent_s: Sequence[float], child_s: Sequence[float]) -> tuple[float, float, float]:
    """Return parent / child as (geometric mean, low, high): a 95 % interval by Student's t on the logarithms of paired ratios.

    Args:
        parent_s: the parent's seconds, one a turn.
        child_s: the child's, of the same turns; two turns at least.
    """
    mean, error = estimate_log_ratio(parent_s, child_s)
    half = float(student_t.ppf(0.975, len(child_s) - 1)) * error
    return math.exp(mean), math.exp(mean - half), math.exp(mean + half)
