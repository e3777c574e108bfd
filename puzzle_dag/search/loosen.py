"""What a constraint costs: the objective when each bound in turn is loosened, by solving again.

An integer program has no shadow prices: how much quality one more GiB buys is only known by solving with it.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from puzzle_dag.architecture import Block
from puzzle_dag.config import ConstraintName, Scenario
from puzzle_dag.piece_costs import PieceCosts
from puzzle_dag.search.candidates import Candidates, ScoreTable
from puzzle_dag.search.program import GAP
from puzzle_dag.search.solution import Solution
from puzzle_dag.search.solve import solve_candidates
from puzzle_dag.search.structure import Structure


@dataclass(frozen=True, slots=True)
class Loosened:
    """One bound loosened, all others as they are.

    Attributes:
        constraint: its name.
        side: "at_least" or "at_most".
        bound: as the scenario writes it.
        loosened: what it was set to.
        change: the loosening in the constraint's own unit (bytes, seconds, tokens a second).
        objective: the objective then.
        gain: by how much the objective falls; 0 where the bound doesn't bind.
    """

    constraint: str
    side: str
    bound: float
    loosened: float
    change: float
    objective: float
    gain: float

    @property
    def is_binding(self) -> bool:
        """Whether loosening the bound buys anything beyond the proven gap."""
        return self.gain > GAP * max(abs(self.objective), abs(self.objective + self.gain))


def _loosened(scenario: Scenario, name: ConstraintName, side: str, value: float) -> Scenario:
    bound = scenario.constraints[name].model_copy(update={side: value})
    return scenario.model_copy(update={"constraints": {**scenario.constraints, name: bound}})


def loosen_each(
    scores: ScoreTable,
    costs: Mapping[str, PieceCosts],
    scenario: Scenario,
    parent_block: Block,
    solution: Solution,
    *,
    share: float = 0.05,
    structure: Structure | None = None,
) -> list[Loosened]:
    """Loosen each bound by `share` of its value, alone, and solve again.

    Args:
        scores: as `solve_scenario`.
        costs: as `solve_scenario`.
        scenario: the scenario that `solution` solves.
        parent_block: the parent's own block.
        solution: the answer with all bounds in force.
        share: by how much a bound is loosened, as a share of it.
        structure: that `solution` was found under.

    Returns:
        One entry a bound, the largest gain first.
    """
    candidates = (structure or Structure()).apply(Candidates.of(scores, parent_block))
    resolved = {limit.name: limit for limit in solution.limits}
    out = []
    for name, bound in scenario.constraints.items():
        for side, sign in (("at_least", -1), ("at_most", 1)):
            value = getattr(bound, side)
            if value is None:
                continue
            loosened = value * (1 + sign * share)
            found = solve_candidates(candidates, costs, _loosened(scenario, name, side, loosened))
            change = getattr(resolved[name], side) * share
            gain = max(0.0, solution.objective - found.objective)
            out.append(Loosened(name, side, value, loosened, change, found.objective, gain))
    return sorted(out, key=lambda entry: -entry.gain)
