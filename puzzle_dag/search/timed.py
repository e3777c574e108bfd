"""A scenario's bounds on time, and what an engine says of them: which seconds each is of, and how far these are from bound and costs."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from puzzle_dag.architecture import Architecture
from puzzle_dag.config import Bound, ConstraintName, Scenario
from puzzle_dag.config.scenario import TIMED
from puzzle_dag.paired_ratio import estimate_log_ratio, estimate_ratio, turns_for
from puzzle_dag.piece_costs import PieceCosts
from puzzle_dag.search.limits import Measure
from puzzle_dag.search.points import parent_measure, scenario_limits
from puzzle_dag.search.solution import Solution

_PHASES: Mapping[str, Literal["prefill", "decode", "total"]] = {"ttft_s": "prefill", "tpot_s": "decode"}


@dataclass(frozen=True, slots=True, kw_only=True)
class TimedBound:
    """A bound on time, for one child.

    Attributes:
        index: place in `Scenario.bounds`.
        name: the constraint's name.
        target: where it holds.
        bound: as the user wrote it.
        batch: the child's batch size.
        parent_batch: the batch size of the parent that it is relative to; None where it is absolute.
        phase: which seconds of a batch it is of.
        scale: the quantity is this times the speed (throughput), or over it; the speed is the parent's seconds over the child's, or,
            where the bound is absolute, one over the child's.
        predicted: the child's value by the costs, in the unit of the bound: a multiple of the parent's where that is relative.
        slack: distance from the bound that was solved for, as a share of it.
    """

    index: int
    name: ConstraintName
    target: str
    bound: Bound
    batch: int
    parent_batch: int | None
    phase: Literal["prefill", "decode", "total"]
    scale: float
    predicted: float
    slack: float

    @property
    def is_rate(self) -> bool:
        """Whether the quantity falls as the time grows."""
        return self.name == "throughput_tokens_per_s"

    @property
    def is_one_sided(self) -> bool:
        """Whether there is a better than what was asked."""
        return self.bound.equals is None and None in (self.bound.at_least, self.bound.at_most)

    def is_tightened(self, slowdown: float) -> bool:
        """Say whether the bound allows less when it is moved by a slowdown; one with two sides always allows something else."""
        asks_for_speed = self.is_rate == (self.bound.at_least is not None)
        return not self.is_one_sided or (slowdown > 0) == asks_for_speed

    def miss(self, value: float) -> tuple[float, float]:
        """Return by which share a value misses the nearer side of the bound (below 0: by how much it is better), and value / that side."""
        low, high = self.bound.lowest, self.bound.highest
        found = [] if low is None else [(1.0 - value / low, value / low)]
        return max(found if high is None else [*found, (value / high - 1.0, value / high)])


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredBound:
    """The same as an engine measured it.

    Attributes:
        asked: the bound.
        measured: the child's value, in the unit of the bound.
        low: lower end of its 95 % confidence interval.
        high: upper end.
        slowdown: logarithm of the time measured over the time that the costs predict, both over the parent's where the bound is relative.
        error: its standard error.
        num_turns: engines of each model that it is from.
    """

    asked: TimedBound
    measured: float
    low: float
    high: float
    slowdown: float
    error: float
    num_turns: int

    @property
    def shortfall(self) -> float:
        """Share by which the bound is missed; below 0 it is met."""
        return self.asked.miss(self.measured)[0]

    @property
    def over_asked(self) -> float:
        """The measured value over the nearer side of the bound."""
        return self.asked.miss(self.measured)[1]

    def is_met(self, tolerance: float) -> bool:
        """Say whether the bound is missed by no more than a share."""
        return self.shortfall <= tolerance

    def is_told(self, tolerance: float) -> bool:
        """Say whether the engines settle it: to half the tolerance, or the whole interval misses one side, is met, or may loosen."""
        verdicts = {self._verdict(value, tolerance) for value in (self.low, self.measured, self.high)}
        return self.error <= tolerance / 2 or len(verdicts) == 1

    def _verdict(self, value: float, tolerance: float) -> Literal["too low", "too high", "met", "better"]:
        share, over = self.asked.miss(value)
        if share > tolerance:
            return "too low" if over < 1 else "too high"
        return "better" if share < -tolerance and self._is_loosable(tolerance) else "met"

    def _is_loosable(self, tolerance: float) -> bool:
        return self.asked.is_one_sided and self.asked.slack <= tolerance

    def may_loosen(self, tolerance: float) -> bool:
        """Say whether the child is better than asked by more than a share, and would be another if the bound were looser."""
        return -self.shortfall > tolerance and self._is_loosable(tolerance)


def timed_bounds(
    scenario: Scenario, solution: Solution, costs: Mapping[str, PieceCosts], parent: Architecture, targets: Collection[str]
) -> tuple[TimedBound, ...]:
    """Return a scenario's bounds on time on some targets, for a solution's child.

    Args:
        scenario: as the user wrote it.
        solution: of it, or of the same with other bounds on time.
        costs: target name -> costs of the pieces.
        parent: the parent's blocks.
        targets: those that can be measured.
    """
    limits, found = scenario_limits(scenario, costs, solution.batch_sizes, parent), []
    for index, ((name, bound), limit, solved) in enumerate(zip(scenario.bounds, limits, solution.limits, strict=True)):
        measure = limit.measure
        if name not in TIMED or measure.costs.target not in targets:
            continue
        own, reference = measure.of(solution.architecture), None
        if bound.relative_to == "parent":
            reference = parent_measure(measure, bound, parent, scenario)
            own /= reference.of(parent)
        found.append(
            TimedBound(
                index=index,
                name=name,
                target=measure.costs.target,
                bound=bound,
                batch=measure.batch,
                parent_batch=None if reference is None else reference.batch,
                phase=_PHASES.get(name, "total"),
                scale=_scale(measure, reference),
                predicted=own,
                slack=solved.slack,
            )
        )
    return tuple(found)


def _scale(measure: Measure, reference: Measure | None) -> float:
    if measure.is_rate:
        return measure.work / (1 if reference is None else reference.work)
    return 1.0 / (measure.costs.output_length - 1) if measure.name == "tpot_s" and reference is None else 1.0


def measure_bound(asked: TimedBound, child_s: Sequence[float], parent_s: Sequence[float] | None) -> MeasuredBound:
    """Return what engines say of a bound.

    Args:
        asked: the bound.
        child_s: the child's seconds of the phase, one a turn.
        parent_s: the parent's, of the same turns; None where the bound is absolute.
    """
    reference = [1.0] * len(child_s) if parent_s is None else parent_s
    speed, slowest, fastest = estimate_ratio(reference, child_s)
    _, error = estimate_log_ratio(reference, child_s)
    if asked.is_rate:
        value, low, high = asked.scale * speed, asked.scale * slowest, asked.scale * fastest
        slowdown = math.log(asked.predicted / value)
    else:
        value, low, high = asked.scale / speed, asked.scale / fastest, asked.scale / slowest
        slowdown = math.log(value / asked.predicted)
    return MeasuredBound(asked=asked, measured=value, low=low, high=high, slowdown=slowdown, error=error, num_turns=len(child_s))


def turns_wanted(bounds: Sequence[MeasuredBound], tolerance: float, most: int) -> int:
    """Return how many turns should settle bounds that were measured together; as many as there are where they do or may not be more.

    Args:
        bounds: one at least, of the same turns.
        tolerance: share by which a measured quantity may miss its bound.
        most: turns that there may be.
    """
    error = max((b.error for b in bounds if not b.is_told(tolerance)), default=0.0)
    return turns_for(bounds[0].num_turns, error, tolerance / 2, most)
