"""Why a scenario can't be met: a smallest set of conflicting constraints, and how near one can come."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations

import numpy as np

from puzzle_dag.search.candidates import Candidates
from puzzle_dag.search.limits import Limit, ScenarioError
from puzzle_dag.search.program import Outcome, minimise


@dataclass(frozen=True, slots=True)
class Nearest:
    """The best value that a constraint's quantity can take while others are met."""

    limit: Limit
    value: float
    others: tuple[str, ...]

    @property
    def shortfall(self) -> float:
        """How far the value is from the bound, as a share of the bound."""
        bounds = [b for b in (self.limit.at_least, self.limit.at_most) if b is not None]
        return min(abs(self.value - float(b)) / (float(b) or 1.0) for b in bounds)


class InfeasibleScenarioError(ScenarioError):
    """No architecture meets a scenario's constraints.

    Attributes:
        constraint: the constraint that comes nearest to being met.
        best_value: the best that it can be while the others are met, in its own unit.
        batch: the batch size at which that is.
        conflicting: a smallest set of constraints that can't be met together at that batch size.
        nearest: best reachable value of each constraint in `conflicting`, the others met.
    """

    def __init__(self, scenario: str, batch: int, conflict: Sequence[Limit], nearest: Sequence[Nearest]) -> None:
        closest = min(nearest, key=lambda n: n.shortfall)
        self.constraint: str = closest.limit.name
        self.best_value = closest.value
        self.batch = batch
        self.conflicting: tuple[str, ...] = tuple(limit.name for limit in conflict)
        self.nearest: Mapping[str, float] = {n.limit.name: n.value for n in nearest}
        lines = [f"scenario {scenario}: no architecture meets it, at any batch size; the nearest is batch {batch}."]
        for n in sorted(nearest, key=lambda n: n.shortfall):
            met = f" with {', '.join(n.others)} met" if n.others else ""
            lines.append(f"{n.limit.describe()} can't be met: the best value{met} is {n.value:.6g}.")
        if len(conflict) > 1:
            lines.append(f"Each of {', '.join(self.conflicting)} could be met without the others; loosen one of them.")
        super().__init__(" ".join(lines))


def _solve(candidates: Candidates, limits: Sequence[Limit], costs: np.ndarray) -> Outcome:
    return minimise(candidates.program(limits), costs, is_met=candidates.meets(limits))


def is_feasible(candidates: Candidates, limits: Sequence[Limit]) -> bool:
    """Say whether any architecture meets the limits."""
    return bool(_solve(candidates, limits, np.zeros(len(candidates.items))).chosen)


def smallest_conflict(candidates: Candidates, limits: Sequence[Limit]) -> tuple[Limit, ...]:
    """Return a smallest subset of the limits that can't be met together; empty where they can."""
    for size in range(1, len(limits) + 1):
        for subset in combinations(limits, size):
            if not is_feasible(candidates, subset):
                return subset
    return ()


def nearest_value(candidates: Candidates, limit: Limit, others: Sequence[Limit]) -> float | None:
    """Return the value nearest to a limit's bounds that can be reached while `others` are met, None where they can't.

    The quantity alone is optimised: towards its one bound, or, with two bounds, from below and from above.
    """
    lower, upper = limit.sum_bounds()
    sums, reached = candidates.sums(limit.measure), list[Fraction]()
    if upper is not None:
        above = Limit(limit.measure, None, None) if lower is None else _bounded(limit, at_least=True)
        reached += _least(candidates, sums, above, others, sign=1)
    if lower is not None:
        below = Limit(limit.measure, None, None) if upper is None else _bounded(limit, at_least=False)
        reached += _least(candidates, sums, below, others, sign=-1)
    if not reached:
        return None
    nearest = min(reached, key=lambda total: min(abs(total - b) for b in (lower, upper) if b is not None))
    return float(limit.measure.value(nearest))


def _bounded(limit: Limit, *, at_least: bool) -> Limit:
    """Keep one of the two bounds of the sum: the lower (`at_least`) or the upper."""
    keeps_lower_value = at_least != limit.measure.is_rate
    return Limit(limit.measure, limit.at_least if keeps_lower_value else None, None if keeps_lower_value else limit.at_most)


def _least(candidates: Candidates, sums: np.ndarray, own: Limit, others: Sequence[Limit], *, sign: int) -> list[Fraction]:
    outcome = _solve(candidates, [*others, own] if own.sum_bounds() != (None, None) else others, sign * sums)
    return [own.measure.total(candidates.architecture(outcome.chosen))] if outcome.chosen else []


def explain(scenario: str, candidates: Candidates, limits: Mapping[int, Sequence[Limit]]) -> InfeasibleScenarioError:
    """Return the error of a scenario that is infeasible at every batch size, told at the batch size that comes nearest.

    Args:
        scenario: its name.
        candidates: what was searched.
        limits: batch size -> the limits there.
    """
    best: tuple[float, int, tuple[Limit, ...], list[Nearest]] | None = None
    for batch, at_batch in limits.items():
        conflict = smallest_conflict(candidates, at_batch)
        nearest = []
        for limit in conflict:
            others = [other for other in at_batch if other is not limit]
            value = nearest_value(candidates, limit, others)
            if value is None:  # another conflict beside this one: within this one the others can be met
                others = [other for other in conflict if other is not limit]
                value = nearest_value(candidates, limit, others)
            assert value is not None, "a smallest conflict without one of its members can be met"
            nearest.append(Nearest(limit, value, tuple(other.name for other in others)))
        shortfall = min(n.shortfall for n in nearest)
        if best is None or shortfall < best[0]:
            best = shortfall, batch, conflict, nearest
    assert best is not None
    return InfeasibleScenarioError(scenario, best[1], best[2], best[3])


