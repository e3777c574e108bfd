"""How far a bound is moved when it is loosened: by a share of it, or by what means something where a share doesn't.

A count of layers moves by whole layers; a bound of 0, of which every share is 0, by a share of the range that the quantity
has over all choices; and memory by one GiB as well, where that is less than the bound itself.
"""

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Literal, TypeVar

from puzzle_dag.search.conflict import Searchable
from puzzle_dag.search.limits import Limit, Side, SumLimit, as_written
from puzzle_dag.search.program import GAP, Floats, Program
from puzzle_dag.search.solution import Loosened
from puzzle_dag.search.solver import least_total

StepKind = Literal["share", "layers", "range", "gib"]
_LimitT = TypeVar("_LimitT", Limit, SumLimit, Limit | SumLimit)
_UNITS_A_GIB = {"_bytes": 2**30, "_kib": 2**20, "_mib": 2**10, "_gib": 1}
"""How the name of an amount of memory ends, and how many of its units are one GiB."""


def _quantity(limit: Limit | SumLimit) -> str:
    return limit.measure.name if isinstance(limit, Limit) else limit.name


def _bound(limit: Limit | SumLimit, side: Side) -> Fraction:
    bound = limit.at_least if side == "at_least" else limit.at_most
    assert bound is not None, "only bounds that there are get loosened"
    return bound


def _units_a_gib(limit: Limit | SumLimit) -> int | None:
    return next((units for end, units in _UNITS_A_GIB.items() if _quantity(limit).endswith(end)), None)


def step_kinds(limit: Limit | SumLimit, side: Side) -> tuple[StepKind, ...]:
    """Return the steps by which a bound is loosened, each on its own."""
    bound, units_a_gib = _bound(limit, side), _units_a_gib(limit)
    if _quantity(limit) == "num_attention_layers":
        return ("layers",)
    if bound == 0:
        return ("range",)
    if side == "at_most" and units_a_gib is not None and units_a_gib < bound:
        return ("share", "gib")
    return ("share",)


def moved_bound(limit: Limit | SumLimit, side: Side, kind: StepKind, share: Fraction, spread: Callable[[], Fraction]) -> Fraction:
    """Return a bound of a limit, moved outwards; a cost's lower bound to 0 at most, for no cost is less.

    Args:
        limit: of a cost, or of a sum that may be negative.
        side: which bound.
        kind: one of `step_kinds`.
        share: of the bound, or of `spread`.
        spread: returns how far the quantity's largest value is from its least.
    """
    bound = _bound(limit, side)
    if kind == "gib":
        change = Fraction(_units_a_gib(limit) or 0)
    elif kind == "range":
        change = spread() * share
    else:
        change = abs(bound) * share
        change = Fraction(max(1, math.ceil(change))) if kind == "layers" else change
    if side == "at_most":
        return bound + change
    return max(Fraction(0), bound - change) if isinstance(limit, Limit) else bound - change


def step_words(kind: StepKind, side: Side, share: Fraction, change: float) -> str:
    """Return a step in words: "5 % more", "1 GiB more", "2 layers less", "5 % of its range more"."""
    direction = "more" if side == "at_most" else "less"
    if kind == "gib":
        return f"1 GiB {direction}"
    if kind == "layers":
        return f"{change:g} layer{'' if change == 1 else 's'} {direction}"
    return f"{float(100 * share):g} %{' of its range' if kind == 'range' else ''} {direction}"


def loosened_limit(candidates: Searchable[_LimitT], limit: _LimitT, side: Side, kind: StepKind, share: Fraction) -> _LimitT:
    """Return a limit with one of its bounds loosened by one of its `step_kinds`; `candidates` tell the range of a quantity."""

    def spread() -> Fraction:
        return spread_of(candidates.program(()), candidates.sums(limit))

    return limit.with_bound(side, moved_bound(limit, side, kind, share, spread))


def tell_loosened(
    before: Limit | SumLimit,
    after: Limit | SumLimit,
    side: Side,
    kind: StepKind,
    share: Fraction,
    *,
    value: float,
    reached: float,
    gain: float,
) -> Loosened:
    """Return what loosening `before` to `after` buys: the objective was `value`, and is `reached` then, better by `gain`."""
    bound, loosened = float(_bound(before, side)), float(_bound(after, side))
    change = abs(loosened - bound)
    return Loosened(
        constraint=before.name,
        side=side,
        bound=bound,
        loosened=loosened,
        change=change,
        value=reached,
        gain=gain,
        is_binding=gain > GAP * max(abs(value), abs(reached)),
        step=step_words(kind, side, share, change),
    )


def spread_of(program: Program, sums: Floats) -> Fraction:
    """Return how far the largest total of what each item adds is from the least, whatever the rows ask for.

    Exact where every item covers one layer, else an upper bound of it.
    """
    return as_written(-least_total(program, -sums) - least_total(program, sums))
