"""How children are served: beside their parent for what their scenarios ask, and beyond that under load and as draft models.

The latter two cost minutes a scenario, so both are off unless given, and each may be kept to some of the scenarios.
"""

from pydantic import Field, field_validator

from puzzle_dag.config.reading import Name, Settings


def _increasing(value: tuple[int, ...]) -> tuple[int, ...]:
    if any(b <= 0 for b in value) or list(value) != sorted(set(value)):
        raise ValueError(f"{list(value)} must be positive and increasing, e.g. [1, 4, 16]")
    return value


class ServingSettings(Settings):
    """Parent and child on the engine by turns, at the batch sizes that the scenario speaks of."""

    turns: int | None = Field(default=None, ge=3)
    """Engines of each model; by default one more than the target takes for a probe, and three at the least: the interval over two
    turns is 12.7 standard errors to each side, over three 4.3, over five 2.8."""
    further_turns: int = Field(default=5, ge=0)
    """How many more at most where the scenario bounds a time: until a speed-up's 95 % interval reaches 5 % to each side, or less."""
    repeats: int | None = Field(default=None, gt=1)
    """Timed repeats an engine; by default the target's."""


class BeyondSettings(Settings):
    """What is measured of some scenarios' children only."""

    scenarios: tuple[Name, ...] | None = Field(default=None, min_length=1)
    """Scenarios of the profile whose children are measured so; all of them unless given."""

    def includes(self, scenario: str) -> bool:
        """Say whether a scenario's child is measured so."""
        return self.scenarios is None or scenario in self.scenarios


class LoadCurveSettings(BeyondSettings):
    """`vllm bench serve` against `vllm serve`, for parent and child at several concurrencies."""

    concurrencies: tuple[int, ...] = Field(min_length=1)
    """Requests under way at any time. Those among the target's batch sizes have a prediction beside them."""
    rounds: int = Field(default=8, gt=0)
    """Requests of each concurrency, as a multiple of it."""
    turns: int = Field(default=3, ge=3)
    """Servers of each model, parent and child by turns; three or more, so that the interval over the turns tells something."""

    @field_validator("concurrencies")
    @classmethod
    def _check_concurrencies(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        return _increasing(value)


class SpeculationSettings(BeyondSettings):
    """A child as the draft model of its own parent, against the parent alone."""

    num_draft_tokens: int = Field(default=3, gt=0)
    """Tokens that the child proposes before the parent looks at them."""
    batch_sizes: tuple[int, ...] = Field(default=(1, 8), min_length=1)
    """Concurrent requests."""
    output_length: int = Field(default=64, gt=1)
    """Generated tokens a request."""
    turns: int = Field(default=3, ge=3)
    """Engines with and without the draft model, by turns; three or more, as above."""
    repeats: int = Field(default=3, gt=0)
    """Timed repeats an engine; the median counts."""

    @field_validator("batch_sizes")
    @classmethod
    def _check_batch_sizes(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        return _increasing(value)
