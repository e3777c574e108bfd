"""The answer of a search: which block in which layer, what it is predicted to cost, and how it was proven."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from puzzle_dag.architecture import Architecture, Block


@dataclass(frozen=True, slots=True)
class Choice:
    """One layer's chosen block: its name, its score, and the digest of its two pieces."""

    layer: int
    block: str
    score: float
    digest: str


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
class BatchOutcome:
    """What solving for one batch size gave; objective, bound and throughput are None where it is infeasible."""

    batch: int
    status: str
    objective: float | None
    bound: float | None
    seconds: float
    throughput_tokens_per_s: float | None


@dataclass(frozen=True, slots=True)
class Solution:
    """A scenario's solution.

    Attributes:
        scenario: the scenario's name.
        target: its target's name.
        status: "optimal", "time_limit" where the gap was not closed in time, "feasible" for a baseline's.
        minimized: the score that was summed: "kl", "lm_loss" or "top1_loss".
        objective: the sum of the chosen scores (lm_loss as the increment over the parent).
        bound: proven lower bound of the objective over this batch size; None where nothing was proven.
        gap: (objective - bound) / |objective|, absolute where the objective is 0; None where nothing was proven.
        batch: the batch size that is kept.
        choices: one a layer.
        predicted: every quantity at the kept batch size and the target's lengths.
        parent: the same of the parent, at the same batch size; `parent_best_throughput_tokens_per_s` at its own best.
        limits: the constraints as solved.
        batches: how every batch size ended.
        seconds: time that all solving took.
        digest: of the chosen (layer, block, digest); the same exactly when the child is the same.
        notes: what else a search says of its answer (a baseline: its method and seed).
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

    @property
    def architecture(self) -> Architecture:
        """The chosen block of every layer."""
        return tuple(Block.parse(choice.block) for choice in self.choices)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON types; `from_json` reads them back."""
        content = asdict(self)
        content.update(predicted=dict(self.predicted), parent=dict(self.parent), notes=dict(self.notes))
        for name in ("choices", "limits", "batches"):
            content[name] = list(content[name])
        return content

    @staticmethod
    def from_json(content: Mapping[str, Any]) -> "Solution":
        """Read what `to_json` wrote."""
        fields = dict(content)
        fields["choices"] = tuple(Choice(**c) for c in content["choices"])
        fields["limits"] = tuple(LimitReport(**c) for c in content["limits"])
        fields["batches"] = tuple(BatchOutcome(**b) for b in content["batches"])
        return Solution(**fields)
