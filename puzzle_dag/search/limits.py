"""A scenario's constraints as sums over a model's pieces, in exact arithmetic.

Every quantity that a scenario bounds (throughput, latency, memory, ...) follows from a sum of the pieces' amounts:
seconds, bytes, counts. A `Measure` is such a quantity at one point (target, batch, length); a `Limit` bounds it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal, get_args

from puzzle_dag.architecture import Architecture, Block
from puzzle_dag.config import ConstraintName
from puzzle_dag.config.scenario import TIMED
from puzzle_dag.piece_costs import PieceCost, PieceCosts

ALL_NAMES: tuple[ConstraintName, ...] = get_args(ConstraintName)
Side = Literal["at_least", "at_most"]
SIDES: tuple[Side, ...] = ("at_least", "at_most")


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
    """Bounds of a measure, in its own unit (tokens a second, seconds, bytes, counts); equal ones for an equality."""

    measure: Measure
    at_least: Fraction | None
    at_most: Fraction | None
    label: str = ""

    @property
    def name(self) -> str:
        """What the limit is called: its label, e.g. "latency_s on cpu-chat", or the constraint's name alone."""
        return self.label or self.measure.name

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
        return replace(self, at_least=self.at_least if lower else None, at_most=self.at_most if upper else None)

    def with_bound(self, side: Side, value: Fraction) -> "Limit":
        """Return the limit with another bound."""
        return replace(self, at_least=value) if side == "at_least" else replace(self, at_most=value)

    def value(self, total: Fraction) -> Fraction | float:
        """Return the quantity that a sum stands for."""
        return self.measure.value(total)

    def is_met(self, total: Fraction) -> bool:
        """Say whether a sum lies within the bounds, exactly."""
        lower, upper = self.sum_bounds()
        return (lower is None or total >= lower) and (upper is None or total <= upper)

    def describe(self) -> str:
        """Return e.g. "memory_bytes at most 1.2e+09 (batch 32, length 256)"."""
        return f"{self.measure.name} {describe_bounds(self.at_least, self.at_most)} ({describe_point(self.measure)})"


@dataclass(frozen=True, slots=True)
class SumLimit:
    """Bounds of a plain sum over the chosen items: of a score, or of a number in a foreign library."""

    name: str
    at_least: Fraction | None = None
    at_most: Fraction | None = None

    def sum_bounds(self) -> tuple[Fraction | None, Fraction | None]:
        """Return (at_least, at_most)."""
        return self.at_least, self.at_most

    def with_sum_bounds(self, *, lower: bool, upper: bool) -> "SumLimit":
        """Keep only the named bounds."""
        return SumLimit(self.name, self.at_least if lower else None, self.at_most if upper else None)

    def with_bound(self, side: Side, value: Fraction) -> "SumLimit":
        """Return the limit with another bound."""
        return replace(self, at_least=value) if side == "at_least" else replace(self, at_most=value)

    def value(self, total: Fraction) -> Fraction:
        """Return the total itself."""
        return total

    def is_met(self, total: Fraction) -> bool:
        """Say whether a total lies within the bounds, exactly."""
        return (self.at_least is None or total >= self.at_least) and (self.at_most is None or total <= self.at_most)

    def describe(self) -> str:
        """Return e.g. "stats.memory_mib at most 70000"."""
        return f"{self.name} {describe_bounds(self.at_least, self.at_most)}"


def describe_bounds(at_least: Fraction | None, at_most: Fraction | None) -> str:
    """Return e.g. "at least 2 and at most 3", or "equal to 2"."""
    if at_least is not None and at_least == at_most:
        return f"equal to {float(at_least):.6g}"
    return " and ".join(f"{word} {float(b):.6g}" for word, b in (("at least", at_least), ("at most", at_most)) if b is not None)


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


def target_costs(target: str, costs: Mapping[str, PieceCosts]) -> PieceCosts:
    """Return a target's costs. Raises ScenarioError, with the way to get them, where there are none."""
    if target not in costs:
        known = ", ".join(sorted(costs)) or "none"
        raise ScenarioError(
            f"target {target!r} has no costs (there are: {known}); name it among the profile's targets, and `python -m assets refresh` "
            "measures it (block_costs)"
        )
    return costs[target]


def all_measures(costs: PieceCosts, batch: int) -> Iterable[Measure]:
    """Return every measure at a batch size of a target, for reports."""
    return [make_measure(name, costs, batch) for name in ALL_NAMES if name != "tpot_s" or costs.output_length > 1]
