"""Why a scenario can't be met: a smallest set of conflicting constraints, and how near one can come."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations
from typing import Generic, Protocol, Self, TypeVar

import numpy as np

from puzzle_dag.search.limits import ScenarioError
from puzzle_dag.search.program import Floats, Item, Outcome, Program
from puzzle_dag.search.solver import minimise


class Bounded(Protocol):
    """A quantity with bounds, as `limits.Limit` is one: the quantity follows from a sum over the chosen items."""

    @property
    def name(self) -> str:
        """The constraint's name."""
        ...

    @property
    def at_least(self) -> Fraction | None:
        """Lower bound of the quantity."""
        ...

    @property
    def at_most(self) -> Fraction | None:
        """Upper bound of the quantity."""
        ...

    def sum_bounds(self) -> tuple[Fraction | None, Fraction | None]:
        """Return the bounds of the sum."""
        ...

    def with_sum_bounds(self, *, lower: bool, upper: bool) -> Self:
        """Keep only the named bounds of the sum."""
        ...

    def value(self, total: Fraction) -> Fraction | float:
        """Return the quantity that a sum stands for."""
        ...

    def describe(self) -> str:
        """Return the constraint in words."""
        ...


LimitT = TypeVar("LimitT", bound=Bounded)
_LimitIn = TypeVar("_LimitIn", bound=Bounded, contravariant=True)


class Searchable(Protocol[_LimitIn]):
    """What is searched, as `candidates.Candidates` is one."""

    @property
    def items(self) -> Sequence[Item]:
        """The choices."""
        ...

    def program(self, limits: Sequence[_LimitIn]) -> Program:
        """Return the program that these limits make."""
        ...

    def meets(self, limits: Sequence[_LimitIn]) -> Callable[[tuple[int, ...]], bool]:
        """Return the exact check of a choice."""
        ...

    def sums(self, limit: _LimitIn) -> Floats:
        """Return what each item adds to the sum behind a limit."""
        ...

    def total(self, limit: _LimitIn, chosen: Sequence[int]) -> Fraction:
        """Return the exact sum of a choice."""
        ...


@dataclass(frozen=True, slots=True)
class Nearest(Generic[LimitT]):
    """The best value that a constraint's quantity can take while others are met."""

    limit: LimitT
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
        constraint: the constraint that comes nearest to being met; None where the structure alone allows nothing.
        best_value: the best that it can be while the others are met, in its own unit.
        batch: the batch size at which that is, on the scenario's own target.
        batches: the batch sizes on all targets, the scenario's own first.
        conflicting: a smallest set of constraints that can't be met together at these batch sizes.
        nearest: best reachable value of each constraint in `conflicting`, the others met.
        rows: the same as rows for people: constraint, what is asked, the best that can be had, what is met then.
    """

    def __init__(self, scenario: str, batches: Mapping[str, int], conflict: Sequence[LimitT], nearest: Sequence[Nearest[LimitT]]) -> None:
        closest = min(nearest, key=lambda n: n.shortfall, default=None)
        self.constraint: str | None = None if closest is None else closest.limit.name
        self.best_value: float | None = None if closest is None else closest.value
        self.batches = dict(batches)
        self.batch = next(iter(self.batches.values()))
        self.conflicting: tuple[str, ...] = tuple(limit.name for limit in conflict)
        self.nearest: Mapping[str, float] = {n.limit.name: n.value for n in nearest}
        self.rows = tuple(
            {"constraint": n.limit.name, "asked": n.limit.describe(), "best": n.value, "while met": ", ".join(n.others)} for n in nearest
        )
        elsewhere = "".join(f", {b} on {target}" for target, b in list(self.batches.items())[1:])
        lines = [f"scenario {scenario}: no architecture meets it, at any batch size; the nearest is batch {self.batch}{elsewhere}."]
        if not nearest:
            lines = [f"scenario {scenario}: its structure (fixed, forbidden or counted blocks, difference) allows no architecture."]
        for n in sorted(nearest, key=lambda n: n.shortfall):
            met = f" with {', '.join(n.others)} met" if n.others else ""
            lines.append(f"{n.limit.describe()} can't be met: the best value{met} is {n.value:.6g}.")
        if len(conflict) > 1:
            lines.append(f"Each of {', '.join(self.conflicting)} could be met without the others; loosen one of them.")
        super().__init__(" ".join(lines))


def _solve(candidates: Searchable[LimitT], limits: Sequence[LimitT], costs: Floats) -> Outcome:
    return minimise(candidates.program(limits), costs, is_met=candidates.meets(limits))


def is_feasible(candidates: Searchable[LimitT], limits: Sequence[LimitT]) -> bool:
    """Say whether any choice meets the limits."""
    return bool(_solve(candidates, limits, np.zeros(len(candidates.items))).chosen)


def smallest_conflict(
    candidates: Searchable[LimitT], limits: Sequence[LimitT], known: dict[Hashable, bool] | None = None
) -> tuple[LimitT, ...]:
    """Return a smallest subset of the limits that can't be met together; empty where they can, or where even none can.

    `known` remembers which sets of limits can be met, for callers that ask again with some of the same limits.
    """
    known = {} if known is None else known
    for size in range(len(limits) + 1):
        for subset in combinations(limits, size):
            key = frozenset((limit.describe(), limit.at_least, limit.at_most) for limit in subset)
            if key not in known:
                known[key] = is_feasible(candidates, subset)
            if not known[key]:
                return subset
    return ()


def nearest_value(candidates: Searchable[LimitT], limit: LimitT, others: Sequence[LimitT]) -> float | None:
    """Return the value nearest to a limit's bounds that can be reached while `others` are met, None where they can't.

    The quantity alone is optimised: towards its one bound, or, with two bounds, from below and from above.
    """
    lower, upper = limit.sum_bounds()
    sums, reached = candidates.sums(limit), list[Fraction]()
    for sign, bound, other in ((1, upper, lower), (-1, lower, upper)):
        if bound is None:
            continue
        own = [] if other is None else [limit.with_sum_bounds(lower=sign > 0, upper=sign < 0)]
        if chosen := _solve(candidates, [*others, *own], sign * sums).chosen:
            reached.append(candidates.total(limit, chosen))
    if not reached:
        return None
    nearest = min(reached, key=lambda total: min(abs(total - b) for b in (lower, upper) if b is not None))
    return float(limit.value(nearest))


def explain_conflict(
    candidates: Searchable[LimitT], limits: Sequence[LimitT], known: dict[Hashable, bool] | None = None
) -> tuple[tuple[LimitT, ...], list[Nearest[LimitT]]]:
    """Return a smallest conflicting set of limits that can't all be met, and how near each of its members can come.

    Each member is optimised with all other limits met, or, where these conflict as well, with the others of the set.
    """
    conflict = smallest_conflict(candidates, limits, known)
    nearest = []
    for limit in conflict:
        others = [other for other in limits if other is not limit]
        value = nearest_value(candidates, limit, others)
        if value is None:
            others = [other for other in conflict if other is not limit]
            value = nearest_value(candidates, limit, others)
        assert value is not None, "a smallest conflict without one of its members can be met"
        nearest.append(Nearest(limit, value, tuple(other.name for other in others)))
    return conflict, nearest


def explain(
    scenario: str, candidates: Searchable[LimitT], points: Sequence[tuple[Mapping[str, int], Sequence[LimitT]]]
) -> InfeasibleScenarioError:
    """Return the error of a scenario that is infeasible at every point, told at the one that comes nearest.

    Args:
        scenario: its name.
        candidates: what was searched.
        points: batch sizes by target, and the limits there.
    """
    known: dict[Hashable, bool] = {}
    explained = [(batches, *explain_conflict(candidates, limits, known)) for batches, limits in points]
    return InfeasibleScenarioError(scenario, *min(explained, key=lambda e: min((n.shortfall for n in e[2]), default=np.inf)))
