"""Bounds moved by what engines say of the costs: where children are slower than these say, the search must ask for more.

Of many architectures a search takes those whose costs were measured too low, so what it takes is slower than it seems (the
optimiser's curse), and what the additive model of costs leaves out comes on top. How much that is, the children tell.
"""

import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from puzzle_dag.config import Bound, Scenario
from puzzle_dag.search.timed import MeasuredBound
from puzzle_dag.shrinkage import shrunk_share

_DIGITS = 6

Corrections = Mapping[int, float]
"""Place in `Scenario.bounds` -> how many times as long children take as their costs say; 1 for those that are left out."""


def find_corrections(measured: Sequence[Sequence[MeasuredBound]], *, may_loosen: Collection[int]) -> dict[int, float]:
    """Return the corrections that children ask for, the mean of their logarithms.

    A few engines tell it poorly, so it counts by as much as it stands out of its own noise (`shrunk_share`).

    Args:
        measured: of each child its bounds.
        may_loosen: bounds that may become looser than they were asked for.
    """
    by_bound: dict[int, list[MeasuredBound]] = {}
    for one in (m for child in measured for m in child):
        by_bound.setdefault(one.asked.index, []).append(one)
    corrections = {}
    for index, found in by_bound.items():
        mean = statistics.fmean(m.slowdown for m in found)
        effect = mean * shrunk_share(mean, math.hypot(*(m.error for m in found)) / len(found))
        if effect and (index in may_loosen or found[0].asked.is_tightened(effect)):
            corrections[index] = math.exp(effect)
    return corrections


def corrected_scenario(scenario: Scenario, corrections: Corrections) -> Scenario:
    """Return a scenario with other bounds: rates times their correction, times over it; what is not corrected stays as it was written.

    Args:
        scenario: as the user wrote it.
        corrections: bound -> how many times as long children take as their costs say.
    """
    bounds: dict[str, list[Bound]] = {}
    for index, (name, bound) in enumerate(scenario.bounds):
        factor = corrections.get(index, 1.0)
        bounds.setdefault(name, []).append(_moved(bound, factor if name == "throughput_tokens_per_s" else 1.0 / factor))
    kept: dict[Any, Bound | tuple[Bound, ...]] = {}
    for constraint, before in scenario.constraints.items():
        kept[constraint] = bounds[constraint][0] if isinstance(before, Bound) else tuple(bounds[constraint])
    return scenario.model_copy(update={"constraints": kept})


def _moved(bound: Bound, factor: float) -> Bound:
    if factor == 1.0:
        return bound
    sides = {side: value for side in ("at_least", "at_most", "equals") if (value := getattr(bound, side)) is not None}
    # As many digits as words show, so that what is told is what was solved.
    return bound.model_copy(update={side: float(f"{value * factor:.{_DIGITS}g}") for side, value in sides.items()})


def correction_words(scenario: Scenario, corrections: Corrections) -> str:
    """Return e.g. "solved for throughput at least 1.57 x the parent's, for children are 4.5 % slower than their costs say"; "" for none."""
    solved, parts = corrected_scenario(scenario, corrections), []
    for index, ((name, bound), (_, before)) in enumerate(zip(solved.bounds, scenario.bounds, strict=True)):
        if bound != before:
            change = 100 * (corrections[index] - 1)
            where = "" if bound.target in (None, scenario.target) else f" on {bound.target}"
            short = name.removesuffix("_tokens_per_s").removesuffix("_s")
            parts.append(f"{short}{where} {bound.words}, for children are {abs(change):.1f} % {'slower' if change > 0 else 'faster'}")
    return f"solved for {'; '.join(parts)} than their costs say" if parts else ""


def corrections_to_json(corrections: Corrections) -> dict[str, float]:
    """Return corrections as JSON."""
    return {str(index): factor for index, factor in sorted(corrections.items())}


def corrections_of_json(content: Mapping[str, float]) -> dict[int, float]:
    """Read what `corrections_to_json` wrote."""
    return {int(index): factor for index, factor in content.items()}
