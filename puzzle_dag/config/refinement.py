"""How solutions are improved with scores that know what else was replaced."""

from pydantic import Field

from puzzle_dag.config.reading import Settings


class RefinementSettings(Settings):
    """Refinement of every scenario's solution, which its child is then made from."""

    rounds: int = Field(default=3, gt=0)
    """How often all blocks are scored inside the child, at most; each time takes as long as scoring them alone, on as many tokens."""
    tokens: int | None = Field(default=None, gt=0)
    """Tokens that this is done on, the first of those that blocks were scored on; all of them unless given."""
