"""A scenario's constraints as sums over a model's pieces, in exact arithmetic.

Every quantity that a scenario bounds (throughput, latency, memory, ...) follows from a sum of the pieces' amounts:
seconds, bytes, counts. A `Measure` is such a quantity at one point (target, batch, length); a `Limit` bounds it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import get_args

from puzzle_dag.architecture import Architecture, Block
from puzzle_dag.config import Bound, ConstraintName, Scenario
from puzzle_dag.piece_costs import PieceCost, PieceCosts

ALL_NAMES: tuple[ConstraintName, ...] = get_args(ConstraintName)
TIMED: tuple[ConstraintName, ...] = ("throughput_tokens_per_s", "latency_s", "ttft_s", "tpot_s")
"""Quantities that were measured at the target's batch sizes and lengths, and only there."""


class ScenarioError(ValueError):
    """A scenario that asks for what was not measured or can't be."""


def as_written(value: float) -> Fraction:
    """Return the decimal number that a user wrote: 0.7 is 7/10, not the binary number next to it."""
    return Fraction(repr(value))


@dataclass(frozen=True, slots=True)
class Measure:
    """A quantity of a whole model on one target, at one batch size (and, for memory, a sequence length).

    `amount` is what a piece adds to the sum, `value` turns the sum into the quantity. `tpot_s` is the time of the
    decode phase over the tokens that it makes, which are all but the first.
    """

    name: ConstraintName
    costs: PieceCosts
    batch: int
    length: int

    def amount(self, cost: PieceCost) -> Fraction:
        """Return what a piece adds to the sum behind this quantity: seconds, bytes or a count."""
        if self.name == "parameters":
            return Fraction(cost.parameters)
        if self.name == "kv_bytes_per_token":
            return Fraction(cost.kv_bytes_per_token)
        if self.name == "memory_bytes":
            return Fraction(cost.weight_bytes + self.batch * self.length * cost.kv_bytes_per_token)
        if self.name == "num_attention_layers":
            return Fraction(0)  # counted by block
        seconds = cost.seconds[self.batch]
        if self.name == "ttft_s":
            return Fraction(seconds["prefill"])
        if self.name == "tpot_s":
            return Fraction(seconds["decode"]) / (self.costs.output_length - 1)
        return Fraction(seconds["prefill"]) + Fraction(seconds["decode"])

    def of_block(self, layer: int, block: Block) -> Fraction:
        """Return what a layer's block adds to the sum."""
        if self.name == "num_attention_layers":
            return Fraction(block.attention.kind == "gqa")
        attention, ffn = self.costs.of_block(layer, block)
        return self.amount(attention) + self.amount(ffn)

    @property
    def constant(self) -> Fraction:
        """What the model adds to the sum beside its blocks."""
        return self.amount(self.costs.constant)

    @property
    def is_rate(self) -> bool:
        """Whether the quantity falls as the sum grows (throughput, whose sum is time)."""
        return self.name == "throughput_tokens_per_s"

    @property
    def work(self) -> int:
        """Tokens read and written by a batch."""
        return self.batch * (self.costs.input_length + self.costs.output_length)

    def total(self, architecture: Architecture) -> Fraction:
        """Return the exact sum over a model."""
        return self.constant + sum((self.of_block(i, b) for i, b in enumerate(architecture)), Fraction(0))

    def value(self, total: Fraction) -> Fraction | float:
        """Return the quantity that a sum stands for; infinity for the throughput of a model that takes no time."""
        if not self.is_rate:
            return total
        return self.work / total if total else float("inf")

    def of(self, architecture: Architecture) -> float:
        """Return the quantity for a model, as a float."""
        return float(self.value(self.total(architecture)))


@dataclass(frozen=True, slots=True)
class Limit:
    """Bounds of a measure, in its own unit (tokens a second, seconds, bytes, counts)."""

    measure: Measure
    at_least: Fraction | None
    at_most: Fraction | None

    @property
    def name(self) -> ConstraintName:
        """The constraint's name."""
        return self.measure.name

    def sum_bounds(self) -> tuple[Fraction | None, Fraction | None]:
        """Return the bounds (lower, upper) of the sum behind the measure, the constant included."""
        if not self.measure.is_rate:
            return self.at_least, self.at_most
        work = self.measure.work
        return (None if self.at_most is None else work / self.at_most), (None if self.at_least is None else work / self.at_least)

    def with_sum_bounds(self, *, lower: bool, upper: bool) -> "Limit":
        """Keep only the named bounds of the sum (a rate's upper bound is the lower one of its time)."""
        if self.measure.is_rate:
            lower, upper = upper, lower
        return Limit(self.measure, self.at_least if lower else None, self.at_most if upper else None)

    def value(self, total: Fraction) -> Fraction | float:
        """Return the quantity that a sum stands for."""
        return self.measure.value(total)

    def is_met(self, total: Fraction) -> bool:
        """Say whether a sum lies within the bounds, exactly."""
        lower, upper = self.sum_bounds()
        return (lower is None or total >= lower) and (upper is None or total <= upper)

    def describe(self) -> str:
        """Return e.g. "memory_bytes at most 1.2e+09 (batch 32, length 256)"."""
        bounds = [f"{word} {float(b):.6g}" for word, b in (("at least", self.at_least), ("at most", self.at_most)) if b is not None]
        return f"{self.name} {' and '.join(bounds)} ({describe_point(self.measure)})"


def describe_point(measure: Measure) -> str:
    """Return where a measure is taken, e.g. "target cpu-chat, batch 32, length 256"."""
    length = f", length {measure.length}" if measure.name == "memory_bytes" else ""
    return f"target {measure.costs.target}, batch {measure.batch}{length}"


def make_measure(name: ConstraintName, costs: PieceCosts, batch: int, *, length: int | None = None) -> Measure:
    """Return a measure. Raises ScenarioError for a batch that was not measured, or `tpot_s` of a one-token answer."""
    if name in TIMED and batch not in costs.batch_sizes:
        measured = ", ".join(map(str, costs.batch_sizes))
        raise ScenarioError(
            f"constraints.{name}.at.batch is {batch}, which target {costs.target} was not measured at; measured are {measured}: "
            "use one of them or add it to the target's batch_sizes"
        )
    lengths = costs.input_length + costs.output_length
    if name in TIMED and length not in (None, lengths):
        raise ScenarioError(
            f"constraints.{name}.at.length is {length}, but target {costs.target} was measured at "
            f"{costs.input_length} + {costs.output_length} tokens; leave it out, or name a target with these lengths"
        )
    if name == "tpot_s" and costs.output_length < 2:
        raise ScenarioError(f"constraints.tpot_s: target {costs.target} makes one token, so there is no time between tokens; bound ttft_s")
    return Measure(name, costs, batch, lengths if length is None else length)


def solved_batches(scenario: Scenario, costs: PieceCosts) -> tuple[int, ...]:
    """Return the batch sizes that a scenario may be served at. Raises ScenarioError for one that was not measured."""
    if scenario.batch_sizes == "all":
        return costs.batch_sizes
    unknown = sorted(set(scenario.batch_sizes) - set(costs.batch_sizes))
    if unknown:
        measured = ", ".join(map(str, costs.batch_sizes))
        raise ScenarioError(f"batch_sizes: target {costs.target} was not measured at {unknown[0]}; measured are {measured}")
    return tuple(sorted(set(scenario.batch_sizes)))


def _parent_value(measure: Measure, bound: Bound, parent: Architecture, scenario: Scenario) -> Fraction:
    """Return the parent's own value that a relative bound is a multiple of.

    Throughput without a stated batch: the parent at its own best batch size, among those at which it fits where the
    scenario bounds memory in bytes. Everything else: at the very point of the measure.
    """
    if not measure.is_rate or bound.at is not None:
        value = measure.value(measure.total(parent))
    else:
        value = max(candidate.value(candidate.total(parent)) for candidate in _fitting(measure, parent, scenario))
    if value == float("inf"):
        raise ScenarioError(f"constraints.{measure.name}: the parent takes no time on target {measure.costs.target}; measure it again")
    return Fraction(value)


def _fitting(measure: Measure, parent: Architecture, scenario: Scenario) -> list[Measure]:
    costs = measure.costs
    candidates = [make_measure(measure.name, costs, batch) for batch in solved_batches(scenario, costs)]
    memory = scenario.constraints.get("memory_bytes")
    if memory is None or memory.at_most is None or memory.relative_to is not None or memory.at is not None:
        return candidates
    most = as_written(memory.at_most)
    fitting = [c for c in candidates if make_measure("memory_bytes", costs, c.batch).total(parent) <= most]
    if not fitting:
        least = min(make_measure("memory_bytes", costs, c.batch).total(parent) for c in candidates)
        raise ScenarioError(
            f"constraints.{measure.name} is relative to the parent, but the parent needs {int(least)} bytes at the smallest batch and "
            f"memory_bytes allows {float(most):.6g}; give the throughput in tokens a second, or state `at: {{batch: ...}}`"
        )
    return fitting


def _bound_at(value: float | None, factor: Fraction) -> Fraction | None:
    return None if value is None else as_written(value) * factor


def scenario_limits(scenario: Scenario, costs: Mapping[str, PieceCosts], batch: int, parent: Architecture) -> tuple[Limit, ...]:
    """Return a scenario's limits for a model that is served at `batch`, bounds relative to the parent resolved.

    Raises:
        ScenarioError: a batch or a target that was not measured, or a bound that has no meaning on this target.
    """
    limits = []
    own = target_costs(scenario.target, costs)
    for name in sorted(scenario.constraints):
        bound = scenario.constraints[name]
        at = bound.at
        measure = make_measure(name, own, batch if at is None else at.batch, length=None if at is None else at.length)
        factor = _parent_value(measure, bound, parent, scenario) if bound.relative_to == "parent" else Fraction(1)
        limits.append(Limit(measure, _bound_at(bound.at_least, factor), _bound_at(bound.at_most, factor)))
    return tuple(limits)


def target_costs(target: str, costs: Mapping[str, PieceCosts]) -> PieceCosts:
    """Return a target's costs. Raises ScenarioError, with the way to get them, where there are none."""
    if target not in costs:
        known = ", ".join(sorted(costs)) or "none"
        raise ScenarioError(f"target {target!r} has no costs (there are: {known}); measure it by materializing block_costs for this target")
    return costs[target]


def all_measures(costs: PieceCosts, batch: int) -> Iterable[Measure]:
    """Return every measure at a batch size of a target, for reports."""
    return [make_measure(name, costs, batch) for name in ALL_NAMES if name != "tpot_s" or costs.output_length > 1]
