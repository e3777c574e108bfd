"""What a scenario may ask of the architecture itself, whatever it costs, and how many answers it asks for."""

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from puzzle_dag.config.reading import Name, Settings

_PATTERN = re.compile(r"\*|[a-z0-9*?\[\]!-]+/[a-z0-9*?\[\]!-]+")


def _check_pattern(value: str) -> str:
    if not _PATTERN.fullmatch(value):
        raise ValueError("a block is written attention/ffn, with * for any: kv8/*, */noop, kv4/w384")
    return value


Pattern = Annotated[str, AfterValidator(_check_pattern)]
"""A block's name with wildcards."""
Patterns = Annotated[tuple[Pattern, ...], BeforeValidator(lambda value: (value,) if isinstance(value, str) else value)]


class StructureSettings(Settings):
    """Conditions on the blocks. Patterns are block names with wildcards: `kv8/*` is any FFN beside the full attention."""

    fixed: dict[int, Pattern] = Field(default_factory=dict)
    """Layer -> the pattern that its block must match."""
    forbidden: dict[int | Literal["all"], Patterns] = Field(default_factory=dict)
    """Layer (or `all`) -> patterns that its block must not match."""
    homogeneous: bool = False
    """The same block in every layer."""
    max_distinct: int | None = Field(default=None, ge=1)
    """At most so many different blocks in the whole model."""
    different_from: tuple[Name, ...] = ()
    """Other scenarios: the answer must differ from each of theirs."""
    min_different_layers: int = Field(default=1, ge=1)
    """In how many layers at least."""

    @model_validator(mode="before")
    @classmethod
    def _one_name(cls, value: Any) -> Any:
        if isinstance(value, dict) and isinstance(value.get("different_from"), str):
            return {**value, "different_from": (value["different_from"],)}
        return value


class PoolSettings(Settings):
    """How many solutions are found: the best, the best that differs enough from it, and so on."""

    num_solutions: int = Field(default=1, ge=1, le=100)
    """How many; fewer where no more exist."""
    min_different_layers: int = Field(default=1, ge=1)
    """Layers in which any two of them differ at least; 1 gives the N best."""
