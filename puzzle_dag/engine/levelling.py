"""Whether times are levelled by the machine's pace: told as they would have been at one pace, in whichever minute they were taken.

A reference that goes along with the engines' speed takes the machine's slow minutes out of their times. One that doesn't would only
add its own noise. So the times themselves decide: levelled is what engines of the same model agree better on.
"""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from puzzle_dag.engine.jobs import BatchTimes, EngineResult

_ROUNDING = 1e-9
"""Share by which noise must be smaller: a reference that is always the same changes nothing but last digits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Levelling:
    """At which pace seconds are told, and what engines of the same model differ by with and without."""

    reference_s: float | None = None
    """Seconds of the reference (`engine.pace`) at the pace that levelled times are told at: its median over all that was measured.
    None where an engine has no reference, as in measurements of former versions of this package."""
    noise: float | None = None
    """Relative standard deviation between engines of one model as measured; None where each model was in one engine."""
    levelled_noise: float | None = None
    """The same of levelled times; None where there are none."""

    @property
    def is_used(self) -> bool:
        """Whether times are levelled: only where that lowers the noise."""
        return self.noise is not None and self.levelled_noise is not None and self.levelled_noise < self.noise * (1 - _ROUNDING)

    @property
    def words(self) -> str:
        """What was decided and why, e.g. "levelled: noise 12.1 % as measured, 4.3 % at the machine's pace"."""
        if self.reference_s is None:
            return "as measured: not every engine has a reference"
        if self.noise is None or self.levelled_noise is None:
            return "as measured: with one engine a model nothing tells whether levelling helps"
        told = f"noise {self.noise:.1%} as measured, {self.levelled_noise:.1%} at the machine's pace"
        return f"{'levelled' if self.is_used else 'as measured'}: {told}".replace("%", " %")

    def seconds(self, times: BatchTimes, phase: str) -> float:
        """Return the median seconds of a phase, levelled where this says so.

        Raises:
            ValueError: times are levelled, and these have no reference.
        """
        return _seconds(times, phase, self.reference_s if self.is_used else None)


AS_MEASURED = Levelling()
"""Seconds that nothing was done to."""


def _seconds(times: BatchTimes, phase: str, reference_s: float | None) -> float:
    """Return the median seconds of a phase at the pace that `reference_s` tells; as measured where that is None."""
    if reference_s is None:
        return times.median_s(phase)
    pace = times.median_pace(phase)
    if pace is None:
        raise ValueError(f"times at batch {times.batch} have no reference, and are to be told at the machine's pace; measure them again")
    return pace * reference_s


def pool_noise(groups: Iterable[Sequence[float]]) -> float | None:
    """Return the relative standard deviation within groups, pooled over them; None where each has a single value.

    Args:
        groups: seconds of what should take equally long: engines of one model, at one batch size, in one phase.
    """
    squares, spare = 0.0, 0
    for values in groups:
        mean = statistics.fmean(values)
        squares, spare = squares + sum((v / mean - 1.0) ** 2 for v in values), spare + len(values) - 1
    return math.sqrt(squares / spare) if spare else None


def decide_levelling(models: Iterable[Sequence[EngineResult]], phases: Sequence[str]) -> Levelling:
    """Decide by the noise between engines of the same model, over all batch sizes and phases, whether times are levelled.

    Args:
        models: the engines of each model, all of which were timed at the same batch sizes.
        phases: those that count: "prefill", "decode" or "total".
    """
    engines = [[e.at(times.batch) for e in of_model] for of_model in models for times in of_model[0].times]
    everything = [t for group in engines for t in group]
    references = [r for t in everything for r in t.reference_s]
    reference_s = statistics.median(references) if references and all(t.reference_s for t in everything) else None

    def noise(at: float | None) -> float | None:
        return pool_noise([_seconds(t, phase, at) for t in group] for group in engines for phase in phases)

    return Levelling(reference_s=reference_s, noise=noise(None), levelled_noise=None if reference_s is None else noise(reference_s))
