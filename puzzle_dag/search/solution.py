"""The answer of a search: which block in which layer, what it is predicted to cost, and how it was proven."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from puzzle_dag.architecture import Architecture, Block


@dataclass(frozen=True, slots=True)
class Choice:
    """One layer's chosen block: its name, its score, and the digest of its two pieces.

    `run` names the run of layers that was replaced at once, where the layer is in one; its score stands with its first layer,
    and the others have 0, so that scores still add up to the objective (but for a refined solution, whose objective is measured).
    """

    layer: int
    block: str
    score: float
    digest: str
    run: str = ""


@dataclass(frozen=True, slots=True)
class LimitReport:
    """One constraint as it was solved.

    Attributes:
        name: the constraint's name.
        target: where its costs were measured.
        batch: batch size that it holds at.
        length: tokens a sequence (memory only, otherwise None).
        at_least: lower bound in the constraint's own unit, relative bounds resolved.
        at_most: upper bound.
        value: the solution's.
        parent_value: the parent's at the same point.
    """

    name: str
    target: str
    batch: int
    length: int | None
    at_least: float | None
    at_most: float | None
    value: float
    parent_value: float

    @property
    def slack(self) -> float:
        """Distance from the nearer bound as a share of the bound; 0 on the bound."""
        bounds = [b for b in (self.at_least, self.at_most) if b is not None]
        return min(abs(self.value - b) / (abs(b) or 1.0) for b in bounds)


@dataclass(frozen=True, slots=True)
class BudgetReport:
    """A budget of a summed score: the score, its upper bound, and the solution's sum."""

    score: str
    at_most: float
    value: float


@dataclass(frozen=True, slots=True)
class BatchOutcome:
    """What solving for one combination of batch sizes gave; objective, bound and throughput are None where it is infeasible.

    `batch` is that of the scenario's own target, `batch_elsewhere` those of the other targets that take part.
    """

    batch: int
    status: str
    objective: float | None
    bound: float | None
    seconds: float
    throughput_tokens_per_s: float | None
    batch_elsewhere: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Loosened:
    """One bound loosened, all others as they are.

    Attributes:
        constraint: the limit's name, e.g. "latency_s" or "latency_s on cpu-chat"; or the score of a budget.
        side: "at_least" or "at_most".
        bound: in the constraint's own unit, a relative bound resolved.
        loosened: what it was set to.
        change: by how much it was loosened.
        step: the same in words: "5 % more", "1 GiB more", "1 layer more".
        value: what the objective reaches then.
        gain: by how much that is better; 0 where the bound doesn't bind.
        is_binding: whether loosening the bound buys anything beyond the proven gap.
    """

    constraint: str
    side: str
    bound: float
    loosened: float
    change: float
    value: float
    gain: float
    is_binding: bool
    step: str = ""


@dataclass(frozen=True, slots=True)
class Solution:
    """A scenario's solution.

    Attributes:
        scenario: the scenario's name.
        target: its target's name.
        status: "optimal", "time_limit" where the gap was not closed in time, "feasible" for a baseline's.
        minimized: the score that was summed: "kl", "lm_loss", "top1_loss", a task, or a sum of these with weights.
        objective: the sum of the chosen scores (lm_loss as the increment over the parent).
        bound: proven lower bound of the objective over all batch sizes; None where nothing was proven, and where the
            objective is a quantity, whose value and bound are in `notes`.
        gap: (objective - bound) / |objective|, absolute where the objective is 0; None where nothing was proven.
        batch: the batch size that is kept.
        choices: one a layer.
        predicted: every quantity at the kept batch size and the target's lengths.
        parent: the same of the parent, at the same batch size; `parent_best_throughput_tokens_per_s` at its own best.
        limits: the constraints as solved, in the order of `Scenario.bounds`.
        batches: how every combination of batch sizes ended.
        seconds: time that all solving took.
        digest: of the chosen (layer, block, digest); the same exactly when the child is the same.
        notes: what else a search says of its answer: a baseline its method and seed; of an optimised quantity its name
            ("optimised"), "value", proven "bound" and "gap".
        budgets: the budgets of summed scores.
        batch_elsewhere: the batch size on each other target whose batch size was chosen.
        loosened: what loosening each bound alone would buy, the largest gain first; () where nobody asked.
    """

    scenario: str
    target: str
    status: str
    minimized: str
    objective: float
    bound: float | None
    gap: float | None
    batch: int
    choices: tuple[Choice, ...]
    predicted: Mapping[str, float | None]
    parent: Mapping[str, float | None]
    limits: tuple[LimitReport, ...]
    batches: tuple[BatchOutcome, ...]
    seconds: float
    digest: str
    notes: Mapping[str, Any] = field(default_factory=dict)
    budgets: tuple[BudgetReport, ...] = ()
    batch_elsewhere: Mapping[str, int] = field(default_factory=dict)
    loosened: tuple[Loosened, ...] = ()

    @property
    def batch_sizes(self) -> Mapping[str, int]:
        """Target -> the batch size that is kept there, the scenario's own target first."""
        return {self.target: self.batch, **self.batch_elsewhere}

    @property
    def architecture(self) -> Architecture:
        """The chosen block of every layer."""
        return tuple(Block.parse(choice.block) for choice in self.choices)

    @property
    def runs(self) -> tuple[str, ...]:
        """Names of the runs that were replaced at once, in order."""
        return tuple(dict.fromkeys(choice.run for choice in self.choices if choice.run))

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON types; `from_json` reads them back."""
        content = asdict(self)
        content.update(predicted=dict(self.predicted), parent=dict(self.parent), notes=dict(self.notes))
        for name in ("choices", "limits", "batches", "budgets", "loosened"):
            content[name] = list(content[name])
        return content

    @staticmethod
    def from_json(content: Mapping[str, Any]) -> "Solution":
        """Read what `to_json` wrote."""
        fields = dict(content)
        fields["choices"] = tuple(Choice(**c) for c in content["choices"])
        fields["limits"] = tuple(LimitReport(**c) for c in content["limits"])
        fields["batches"] = tuple(BatchOutcome(**b) for b in content["batches"])
        fields["budgets"] = tuple(BudgetReport(**b) for b in content.get("budgets", ()))
        fields["loosened"] = tuple(Loosened(**entry) for entry in content.get("loosened", ()))
        return Solution(**fields)
