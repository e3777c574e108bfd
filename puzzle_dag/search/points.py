"""Where a scenario is solved: every combination of batch sizes, one a target, with the scenario's limits there.

A deployment on a target runs at one batch size, which the search chooses: a bound without `at` holds there. Where a
scenario bounds other targets, too, every combination of batch sizes is a program of its own, and the best is kept.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import product

from puzzle_dag.architecture import Architecture
from puzzle_dag.config import Bound, ConstraintName, Scenario
from puzzle_dag.config.scenario import COUNTS
from puzzle_dag.piece_costs import PieceCosts
from puzzle_dag.search.limits import Limit, Measure, ScenarioError, as_written, make_measure, target_costs

_MOST_POINTS = 2000


@dataclass(frozen=True, slots=True)
class Point:
    """One batch size a target (the scenario's own target first), and the limits there, in the order of `Scenario.bounds`."""

    batches: Mapping[str, int]
    limits: tuple[Limit, ...]

    @property
    def batch(self) -> int:
        """The batch size on the scenario's own target."""
        return next(iter(self.batches.values()))


def solved_batches(scenario: Scenario, costs: PieceCosts) -> tuple[int, ...]:
    """Return the batch sizes that a target may serve a scenario at: of its own target those of `batch_sizes`, of others all.

    Raises:
        ScenarioError: `batch_sizes` names one that was not measured, or leaves none.
    """
    if scenario.target != costs.target:
        return costs.batch_sizes
    measured = ", ".join(map(str, costs.batch_sizes))
    if isinstance(scenario.batch_sizes, tuple):
        unknown = sorted(set(scenario.batch_sizes) - set(costs.batch_sizes))
        if unknown:
            raise ScenarioError(f"batch_sizes: target {costs.target} was not measured at {unknown[0]}; measured are {measured}")
    left = tuple(batch for batch in costs.batch_sizes if scenario.allows_batch(batch))
    if not left:
        raise ScenarioError(f"batch_sizes: none of target {costs.target}'s is left; measured are {measured}")
    return left


def scenario_points(scenario: Scenario, costs: Mapping[str, PieceCosts], parent: Architecture) -> list[Point]:
    """Return every combination of batch sizes at which a scenario may be met, with its limits there.

    A target on which no bound depends on the batch size that is chosen (all state `at`, or count) takes no part in
    the combinations; the scenario's own target always does.

    Raises:
        ScenarioError: as `scenario_limits`, or there are thousands of combinations.
    """
    choices: dict[str, tuple[int, ...]] = {}
    for target in scenario.targets:
        own = target_costs(target, costs)
        is_chosen = any((b.target or scenario.target) == target and b.at is None and name not in COUNTS for name, b in scenario.bounds)
        if target == scenario.target or is_chosen:
            choices[target] = solved_batches(scenario, own)
    num_points = math.prod(len(batches) for batches in choices.values())
    if num_points > _MOST_POINTS:
        raise ScenarioError(
            f"scenario {scenario.name}: {num_points} combinations of batch sizes over {len(choices)} targets; "
            "say `at: {batch: ...}` where a constraint bounds another target"
        )
    combinations = [dict(zip(choices, batches, strict=True)) for batches in product(*choices.values())]
    return [Point(batches, scenario_limits(scenario, costs, batches, parent)) for batches in combinations]


def scenario_limits(
    scenario: Scenario, costs: Mapping[str, PieceCosts], batches: Mapping[str, int], parent: Architecture
) -> tuple[Limit, ...]:
    """Return a scenario's limits for a model that each target serves at the batch size of `batches`, relative bounds resolved.

    Raises:
        ScenarioError: a batch or a target that was not measured, or a bound that has no meaning on its target.
    """
    limits = []
    for name, bound in scenario.bounds:
        own = target_costs(bound.target or scenario.target, costs)
        # A count holds at any batch size.
        batch = bound.at.batch if bound.at is not None else batches.get(own.target, own.batch_sizes[0])
        measure = make_measure(name, own, batch, length=None if bound.at is None else bound.at.length)
        factor = _parent_value(measure, bound, parent, scenario) if bound.relative_to == "parent" else Fraction(1)
        least, most = (None if b is None else b * factor for b in _written(bound))
        limits.append(Limit(measure, least, most, _label(scenario, name, bound)))
    return tuple(limits)


def _written(bound: Bound) -> tuple[Fraction | None, Fraction | None]:
    """Return a bound's (at_least, at_most) as the decimal numbers that were written."""
    if bound.equals is not None:
        value, tolerance = as_written(bound.equals), as_written(bound.within or 0.0)
        return value * (1 - tolerance), value * (1 + tolerance)
    least, most = (None if b is None else as_written(b) for b in (bound.at_least, bound.at_most))
    return least, most


def _label(scenario: Scenario, name: ConstraintName, bound: Bound) -> str:
    """Return what tells a bound from the scenario's others: "latency_s", "latency_s on cpu-chat at batch 8"."""
    target = bound.target or scenario.target
    same = Counter((n, b.target or scenario.target) for n, b in scenario.bounds)[name, target]
    place = "" if target == scenario.target else f" on {target}"
    if same == 1 or bound.at is None:
        return name + place
    length = f", length {bound.at.length}" if bound.at.length else ""
    return f"{name}{place} at batch {bound.at.batch}{length}"


def parent_measure(measure: Measure, bound: Bound, parent: Architecture, scenario: Scenario) -> Measure:
    """Return the measure whose value for the parent a relative bound is a multiple of.

    Throughput without a stated batch: the parent at its own best batch size on that target, among those at which it
    fits where the scenario bounds memory in bytes there. Everything else: the very point of the measure.

    Raises:
        ScenarioError: the parent fits at no batch size.
    """
    if not measure.is_rate or bound.at is not None:
        return measure
    return max(_fitting(measure, parent, scenario), key=lambda candidate: candidate.value(candidate.total(parent)))


def _parent_value(measure: Measure, bound: Bound, parent: Architecture, scenario: Scenario) -> Fraction:
    """Return the parent's own value that a relative bound is a multiple of."""
    own = parent_measure(measure, bound, parent, scenario)
    value = own.value(own.total(parent))
    if value == float("inf"):
        raise ScenarioError(f"constraints.{measure.name}: the parent takes no time on target {measure.costs.target}; measure it again")
    return Fraction(value)


def _fitting(measure: Measure, parent: Architecture, scenario: Scenario) -> Sequence[Measure]:
    costs = measure.costs
    candidates = [make_measure(measure.name, costs, batch) for batch in solved_batches(scenario, costs)]
    written = [_written(b)[1] for b in _memory_bounds(scenario, costs.target)]
    most = min((upper for upper in written if upper is not None), default=None)
    if most is None:
        return candidates
    fitting = [c for c in candidates if make_measure("memory_bytes", costs, c.batch).total(parent) <= most]
    if not fitting:
        least = min(make_measure("memory_bytes", costs, c.batch).total(parent) for c in candidates)
        raise ScenarioError(
            f"constraints.{measure.name} is relative to the parent, but the parent needs {int(least)} bytes at the smallest batch and "
            f"memory_bytes allows {float(most):.6g}; give the throughput in tokens a second, or state `at: {{batch: ...}}`"
        )
    return fitting


def _memory_bounds(scenario: Scenario, target: str) -> list[Bound]:
    """Return the bounds of a target's memory that are absolute and hold at the batch size that is chosen."""
    bounds = [b for name, b in scenario.bounds if name == "memory_bytes" and (b.target or scenario.target) == target]
    return [b for b in bounds if b.relative_to is None and b.at is None]
