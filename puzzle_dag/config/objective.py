"""What a scenario's search minimises or maximises: summed scores, or a cost within a budget of summed scores."""

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import Discriminator, Field, Tag, model_validator

from puzzle_dag.config.reading import At, Settings

ConstraintName = Literal[
    "throughput_tokens_per_s", "latency_s", "ttft_s", "tpot_s", "memory_bytes", "parameters", "kv_bytes_per_token", "num_attention_layers"
]
LossName = Literal["kl", "lm_loss", "top1_loss"]
"""Scores that every score table has, the lower the better; lm-eval tasks may stand beside them."""
LOSSES: tuple[LossName, ...] = get_args(LossName)
_SHORT = {
    "throughput": "throughput_tokens_per_s",
    "latency": "latency_s",
    "ttft": "ttft_s",
    "tpot": "tpot_s",
    "memory": "memory_bytes",
}
"""Short names that the objective takes as well."""

Minimized = Annotated[
    Annotated[
        Literal[
            "kl", "lm_loss", "top1_loss", "latency_s", "ttft_s", "tpot_s",
            "memory_bytes", "parameters", "kv_bytes_per_token", "num_attention_layers",
        ],
        Tag("<word>"),
    ]
    | Annotated[dict[str, float], Tag("<mapping>"), Field(min_length=1)],
    Discriminator(lambda value: "<mapping>" if isinstance(value, dict) else "<word>"),
]  # fmt: skip


class QualityBudget(Settings):
    """How much quality may be lost."""

    at_most: float = Field(ge=0)
    """Upper bound of the summed score."""


class Objective(Settings):
    """What the search is for: the least summed score, or the best of one quantity within a budget of summed scores."""

    minimize: Minimized | None = None
    """A score that is summed over the layers (kl by default), scores with weights, or a quantity."""
    maximize: Literal["throughput_tokens_per_s"] | None = None
    """The quantity to maximise."""
    subject_to: dict[str, QualityBudget] = Field(default_factory=dict)
    """Score -> budget. Needed where a quantity is optimised, allowed elsewhere."""
    at: At | None = None
    """Where the optimised quantity is taken; by default at the batch size that is solved for and the target's lengths."""

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        full = {k: _SHORT.get(v, v) if k in ("minimize", "maximize") and isinstance(v, str) else v for k, v in value.items()}
        if full.get("minimize") is None and full.get("maximize") is None:
            full["minimize"] = "kl"
        return full

    @model_validator(mode="after")
    def _one_objective(self) -> "Objective":
        if self.minimize is not None and self.maximize is not None:
            raise ValueError("give one of `minimize` and `maximize`; bound the other one under `constraints` or `subject_to`")
        if self.quantity is not None and not self.subject_to:
            raise ValueError(f"{self.quantity} alone would be best with no layers at all; give `subject_to: {{kl: {{at_most: 0.2}}}}`")
        if self.quantity is None and self.at is not None:
            raise ValueError("`at` is where an optimised quantity is taken; a score holds anywhere, so leave it out")
        for name, weight in self.weights.items():
            if not math.isfinite(weight) or weight == 0 or (weight < 0 and name in LOSSES):
                raise ValueError(f"minimize.{name} is {weight:g}; a weight is a number other than 0, and of {', '.join(LOSSES)} above 0")
        return self

    @property
    def quantity(self) -> ConstraintName | None:
        """The quantity that is optimised; None where scores are."""
        found = self.maximize or self.minimize
        return found if isinstance(found, str) and found not in LOSSES else None  # type: ignore[return-value]

    @property
    def weights(self) -> dict[str, float]:
        """Score -> weight in the summed score that a solution reports; of several budgets' scores, the first."""
        if isinstance(self.minimize, dict):
            return self.minimize
        if self.quantity is None:
            return {str(self.minimize): 1.0}
        return {next(iter(self.subject_to)): 1.0}

    @property
    def is_summed_losses(self) -> bool:
        """Whether it is the least of LOSSES alone, without a budget: what a whole child can be measured by as each of its blocks is."""
        return self.quantity is None and not self.subject_to and set(self.weights) <= set(LOSSES)

    @property
    def score(self) -> str:
        """The summed score in words: "kl", or "kl + 0.5 hellaswag"."""
        terms = [name if weight == 1 else f"{weight:g} {name}" for name, weight in self.weights.items()]
        return " + ".join(terms).replace("+ -", "- ")
