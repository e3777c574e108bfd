"""What no measurement should say: that a larger batch takes less time. Drops beyond the noise point at a disturbed machine."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from puzzle_dag.costs.table import CostRow

_Z = 3.0
_ROUNDING = 1e-3
"""Share of the time within which a drop is rounding, whatever the noise claims."""


@dataclass(frozen=True, slots=True)
class Drop:
    """One variant whose time falls from one batch size to the next by more than the noise explains."""

    place: str
    """Where the variant stands."""
    variant: str
    """Its name."""
    phase: str
    """"prefill" or "decode"."""
    batch: int
    """The smaller batch size."""
    next_batch: int
    """The larger one."""
    seconds: float
    """Seconds at the smaller batch size."""
    next_seconds: float
    """Seconds at the larger one, which are less."""
    noise_s: float
    """Drop that noise explains: three standard errors of the difference, and the repeat noise of a whole model on the larger time."""


def find_drops(rows: Iterable[CostRow]) -> list[Drop]:
    """Return every pair of neighbouring batch sizes at which a cost falls beyond the noise; the engine's constant is a cost, too.

    Args:
        rows: rows of one target's cost table.
    """
    curves: dict[tuple[str, str, str], list[CostRow]] = {}
    for row in rows:
        curves.setdefault((row.place, row.variant, row.phase), []).append(row)
    drops = []
    for (place, variant, phase), curve in curves.items():
        curve.sort(key=lambda r: r.batch)
        for low, high in pairwise(curve):
            spread = _Z * math.hypot(low.seconds_error, high.seconds_error)
            noise_s = spread + max(low.repeat_noise, high.repeat_noise, _ROUNDING) * low.seconds
            if low.seconds - high.seconds > noise_s:
                drops.append(Drop(place, variant, phase, low.batch, high.batch, low.seconds, high.seconds, noise_s))
    return drops
