"""Which constraints can't be met together: a smallest set of them, and how near each of it can come while the others hold.

The structure (fixed, forbidden or counted blocks, difference) may be one of them. What a choice meets can't conflict, so a conflict
has a member outside of whatever any choice meets; only such sets are solved for, the smallest first. That is the duality of
conflicts and corrections (Ignatiev et al., "Smallest MUS Extraction with Minimal Hitting Set Dualization", CP 2015).
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations
from typing import Generic, Protocol, Self, TypeVar

import numpy as np

from puzzle_dag.search.program import Floats, Item, Program
from puzzle_dag.search.solver import minimise

_NEAREST_TIME_LIMIT_S = 5.0
"""For the best value of one quantity. It is there to tell how far off a bound is, which the last digits don't matter for."""
STRUCTURE = "structure"
"""Name of the structure as a member of a conflict."""


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

    @property
    def structure(self) -> str:
        """What a choice must look like whatever it costs, in words; empty where nothing is asked."""
        ...

    def without_structure(self) -> Self:
        """Return all that could be chosen if nothing were asked of the structure."""
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
    is_proven: bool = True  # else time ran out, and a better value may be in reach

    @property
    def shortfall(self) -> float:
        """How far the value is from the bound, as a share of the bound."""
        bounds = [b for b in (self.limit.at_least, self.limit.at_most) if b is not None]
        return min(abs(self.value - float(b)) / (abs(float(b)) or 1.0) for b in bounds)


@dataclass(frozen=True, slots=True)
class Conflict(Generic[LimitT]):
    """A smallest set of limits, the structure perhaps among them, that can't be met together.

    Attributes:
        limits: the limits of the set.
        structure: the structure in words where it is in the set, else empty.
        nearest: how near each limit of the set can come, of those where anything was found in time.
    """

    limits: tuple[LimitT, ...]
    structure: str = ""
    nearest: tuple[Nearest[LimitT], ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """What the members are called, the structure last."""
        return (*(limit.name for limit in self.limits), *([STRUCTURE] if self.structure else []))


class Feasibility(Generic[LimitT]):
    """Says what can be met together; solves only where nothing that was solved before tells.

    It may be asked about several points of one scenario: a choice that was found at one may meet the limits of another.
    Members are counted: i is limit i of a point, and the number of limits stands for the structure.
    """

    def __init__(self, candidates: Searchable[LimitT]) -> None:
        """Start with nothing known."""
        self.structure = candidates.structure
        self._structured = candidates
        self._free = candidates.without_structure() if self.structure else candidates
        self._found: dict[bool, list[tuple[int, ...]]] = {True: [], False: []}
        self._conflicts: set[Hashable] = set()

    def candidates(self, *, structured: bool) -> Searchable[LimitT]:
        """Return what is chosen from, with the structure or without."""
        return self._structured if structured else self._free

    def num_members(self, limits: Sequence[LimitT]) -> int:
        """Return how many members a conflict of these limits and the structure could have."""
        return len(limits) + bool(self.structure)

    def met(self, limits: Sequence[LimitT], members: frozenset[int]) -> frozenset[int] | None:
        """Return all members that one choice meets which meets `members`; None where there is none."""
        structured = len(limits) in members
        asked, others = ([x for i, x in enumerate(limits) if (i in members) is side] for side in (True, False))
        chosen = self._choose(asked, others, structured=structured)
        if not chosen:
            return None
        candidates = self.candidates(structured=structured)
        return members | {i for i, limit in enumerate(limits) if candidates.meets([limit])(chosen)}

    def _choose(self, limits: Sequence[LimitT], others: Sequence[LimitT], *, structured: bool) -> tuple[int, ...]:
        """Return a choice that meets the limits, () where there is none; it tends to what `others` ask for, to meet some as well."""
        key = (structured, frozenset((limit.describe(), limit.at_least, limit.at_most) for limit in limits))
        if key in self._conflicts:
            return ()
        candidates = self.candidates(structured=structured)
        is_met = candidates.meets(limits)
        known = next((chosen for chosen in self._found[structured] if is_met(chosen)), ())
        if known:
            return known
        costs = sum((_pull(candidates, limit) for limit in others), np.zeros(len(candidates.items)))
        chosen = minimise(candidates.program(limits), costs, is_met=is_met, any_choice=True).chosen
        if chosen:
            self._found[structured].append(chosen)
        else:
            self._conflicts.add(key)
        return chosen


def _pull(candidates: Searchable[LimitT], limit: LimitT) -> Floats:
    """Return costs that fall as a limit's sum comes nearer to what is asked; all limits count alike."""
    lower, upper = limit.sum_bounds()
    signed = [(sign, bound) for sign, bound in ((1.0, upper), (-1.0, lower)) if bound is not None]
    return sum((sign * candidates.sums(limit) / abs(float(bound) or 1.0) for sign, bound in signed), np.zeros(len(candidates.items)))


def smallest_conflict(feasibility: Feasibility[LimitT], limits: Sequence[LimitT]) -> Conflict[LimitT] | None:
    """Return a smallest conflict among the limits and the structure; None where all can be met together.

    Sets are gone through by size. One within a set that a choice meets is no conflict and isn't solved for; each solve either
    shows that a set is a conflict, and it is a smallest since all smaller ones were ruled out, or gives one more choice that
    rules sets out. So there are at most as many solves as sets, and mostly a small part of them.
    """
    num_members = feasibility.num_members(limits)
    left_out: list[frozenset[int]] = []  # by the choices that were found
    for size in range(num_members + 1):
        for members in map(frozenset, combinations(range(num_members), size)):
            if any(members.isdisjoint(left) for left in left_out):
                continue
            met = feasibility.met(limits, members)
            if met is None:
                structure = feasibility.structure if len(limits) in members else ""
                return Conflict(tuple(limits[i] for i in sorted(members) if i < len(limits)), structure)
            left_out.append(frozenset(range(num_members)) - met)
    return None


def nearest_value(candidates: Searchable[LimitT], limit: LimitT, others: Sequence[LimitT]) -> tuple[float, bool] | None:
    """Return the value nearest to a limit's bounds that can be reached while `others` are met, and whether that is proven.

    The quantity alone is optimised: towards its one bound, or, with two bounds, from below and from above. None where nothing is found.
    """
    lower, upper = limit.sum_bounds()
    sums, reached, is_proven = candidates.sums(limit), list[Fraction](), True
    for sign, bound, other in ((1, upper, lower), (-1, lower, upper)):
        if bound is None:
            continue
        own = [] if other is None else [limit.with_sum_bounds(lower=sign > 0, upper=sign < 0)]
        asked = [*others, *own]
        outcome = minimise(candidates.program(asked), sign * sums, is_met=candidates.meets(asked), time_limit_s=_NEAREST_TIME_LIMIT_S)
        is_proven = is_proven and outcome.status != "time_limit"
        if outcome.chosen:
            reached.append(candidates.total(limit, outcome.chosen))
    if not reached:
        return None
    nearest = min(reached, key=lambda total: min(abs(total - b) for b in (lower, upper) if b is not None))
    return float(limit.value(nearest)), is_proven


def explain_conflict(feasibility: Feasibility[LimitT], limits: Sequence[LimitT]) -> Conflict[LimitT]:
    """Return a smallest conflict among limits that can't all be met, and how near each of its limits can come.

    Each is optimised with all other limits and the structure met, or, where these conflict as well, with the others of the set.
    """
    conflict = smallest_conflict(feasibility, limits)
    assert conflict is not None, "only what can't be met is explained"
    nearest = []
    for limit in conflict.limits:
        tries = [
            ([other for other in limits if other is not limit], feasibility.structure),
            ([other for other in conflict.limits if other is not limit], conflict.structure),
        ]
        for others, structure in tries:
            found = nearest_value(feasibility.candidates(structured=bool(structure)), limit, others)
            if found is not None:
                names = (*(other.name for other in others), *([STRUCTURE] if structure else []))
                nearest.append(Nearest(limit, found[0], names, found[1]))
                break
    return Conflict(conflict.limits, conflict.structure, tuple(nearest))
