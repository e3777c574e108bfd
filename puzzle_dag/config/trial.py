"""How a chosen architecture is tried on the engine before anything is trained."""

from pydantic import Field

from puzzle_dag.config.reading import Settings


class TrialSettings(Settings):
    """Trial of every scenario's solution, which its child is then made from."""

    rounds: int = Field(default=3, gt=0)
    """How often the search may be repeated, at most, with bounds that are moved by what the engine said."""
    turns: int = Field(default=4, ge=3)
    """Engines of each model, parent and child by turns; three or more, so that the interval over the turns tells something."""
    further_turns: int = Field(default=8, ge=0)
    """How many more at most, where those leave open whether a bound is met or may be loosened: until a ratio's standard error is half
    the tolerance."""
    repeats: int = Field(default=6, gt=1)
    """Timed repeats an engine; the median counts."""
    tolerance: float = Field(default=0.02, ge=0, le=0.5)
    """Share by which a measured quantity may miss its bound."""
