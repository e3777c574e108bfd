"""A scenario: the constraints of one deployment, for which a child is searched (conf/scenarios/NAME.yaml)."""

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from puzzle_dag.config.reading import Name, Settings, check_name, read_settings


class At(Settings):
    """The workload point at which a constraint holds."""

    batch: int = Field(gt=0)
    """Concurrent requests."""
    length: int | None = Field(default=None, gt=0)
    """Tokens a sequence (memory and KV)."""


class Bound(Settings):
    """A lower or an upper bound, absolute or as a multiple of the parent's value."""

    at_least: float | None = Field(default=None, gt=0)
    """Lower bound."""
    at_most: float | None = Field(default=None, gt=0)
    """Upper bound."""
    relative_to: Literal["parent"] | None = None
    """Read the bound as a multiple of the parent's own value on the same target."""
    at: At | None = None
    """Where it holds; by default at the batch size that is solved for and the target's lengths."""

    @model_validator(mode="after")
    def _a_bound(self) -> "Bound":
        if self.at_least is None and self.at_most is None:
            raise ValueError("give `at_least` or `at_most`")
        if self.at_least is not None and self.at_most is not None and self.at_least > self.at_most:
            raise ValueError(f"at_least {self.at_least} is above at_most {self.at_most}; no value is both")
        return self


ConstraintName = Literal[
    "throughput_tokens_per_s", "latency_s", "ttft_s", "tpot_s", "memory_bytes", "parameters", "kv_bytes_per_token", "num_attention_layers"
]


class Objective(Settings):
    """What the search minimises."""

    minimize: Literal["kl", "lm_loss", "top1_loss"] = "kl"
    """The score that is summed over the layers."""


class UptrainBudget(Settings):
    """How long a child is healed."""

    tokens: int = Field(ge=0)
    """Tokens of global knowledge distillation; 0 leaves the child as assembled."""


class Scenario(Settings):
    """One deployment to find a child for."""

    version: Literal[1]
    """Version of this file format."""
    name: Name
    """The file's stem; the partition key."""
    description: str = ""
    """What it is for, in words."""
    target: Name
    """The target whose costs bound the child."""
    costs: Literal["measured", "analytic"] = Field(default="measured", exclude_if=lambda value: value == "measured")
    """Which costs will do. `measured`: only what an engine measured, here or where it was imported from. `analytic`: where nobody
    measured the target, a roofline from published peaks will do as well; what rests on it is labelled analytic everywhere."""
    objective: Objective = Objective()
    """What is minimised."""
    constraints: dict[ConstraintName, Bound] = Field(min_length=1)
    """What the child must meet."""
    batch_sizes: Literal["all"] | tuple[int, ...] = "all"
    """The target's batch sizes that may serve; each is solved, the best feasible one is kept."""
    uptrain: UptrainBudget
    """How long the child is healed."""
    retention_floor: float = Field(default=0.9, gt=0, le=1)
    """Share of the parent's accuracy, corrected for chance, below which the asset check fails."""


def read_scenario(conf: Path, name: str) -> Scenario:
    """Read conf/scenarios/NAME.yaml. Raises ConfigError."""
    return read_settings(Scenario, conf / "scenarios" / f"{check_name(name)}.yaml")
