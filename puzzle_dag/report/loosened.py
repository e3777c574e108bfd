"""What loosening each bound of a scenario buys, as rows for people: the UI, the pages and the terminal show the same."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from puzzle_dag.report.tables import format_quantity


@dataclass(frozen=True, slots=True, kw_only=True)
class LoosenedFact:
    """One bound, and what the search gains where it alone is loosened."""

    name: str
    """Name of the bounded quantity or score; where it is bounded may stand behind it ("latency_s on cpu-chat")."""
    side: str
    """"at_least" or "at_most"."""
    bound: float
    """The bound, in the unit that the name says."""
    change: float
    """By how much it was loosened, in that unit."""
    value: float
    """What the objective reaches then."""
    gain: float
    """By how much that is better."""
    is_binding: bool
    """Whether that is more than the proven gap."""
    step: str = ""
    """By how much it was loosened, in words: "5 % more", "1 GiB more"."""

    @staticmethod
    def of(entry: Mapping[str, Any]) -> "LoosenedFact":
        """Read an entry of a solution's record."""
        shown = {k: entry[k] for k in ("side", "bound", "change", "value", "gain", "is_binding")}
        return LoosenedFact(name=entry["constraint"], step=entry.get("step", ""), **shown)


def loosened_rows(facts: Sequence[LoosenedFact], optimised: str) -> list[dict[str, str]]:
    """Return what each bound that binds costs; the others are named, for they cost nothing.

    Args:
        facts: the bounds.
        optimised: name of the objective: a score, or a quantity.
    """
    return [
        {
            "constraint": fact.name,
            "bound": f"{fact.side.replace('_', ' ')} {format_quantity(fact.name, fact.bound)}",
            "loosened by": fact.step,
            "which is": format_quantity(fact.name, fact.change),
            f"buys, {optimised}": format_quantity(optimised, fact.gain) if fact.is_binding else "nothing: it does not bind",
            f"{optimised} then": format_quantity(optimised, fact.value),
        }
        for fact in facts
    ]
