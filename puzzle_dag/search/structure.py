"""What an architecture must look like, whatever it costs: fixed or forbidden blocks, sameness, difference, pools."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from puzzle_dag.architecture import Architecture, Block
from puzzle_dag.config import Scenario
from puzzle_dag.piece_costs import PieceCosts
from puzzle_dag.search.candidates import Candidates, ScoreTable
from puzzle_dag.search.infeasible import InfeasibleScenarioError
from puzzle_dag.search.limits import ScenarioError
from puzzle_dag.search.solution import Solution
from puzzle_dag.search.solve import solve_candidates


@dataclass(frozen=True, slots=True)
class Structure:
    """Conditions on the blocks themselves.

    Patterns are block names with wildcards: "kv8/*" is any FFN beside the full attention, "*/noop" no FFN.

    Attributes:
        fixed: layer -> pattern that its block must match.
        forbidden: layer -> patterns that its block must not match; None stands for every layer.
        homogeneous: the same block in every layer.
        max_distinct: at most so many different blocks in the whole model.
        different_from: architectures that the answer must differ from in `min_different_layers` or more.
        min_different_layers: see there.
    """

    fixed: Mapping[int, str] = field(default_factory=dict)
    forbidden: Mapping[int | None, Sequence[str]] = field(default_factory=dict)
    homogeneous: bool = False
    max_distinct: int | None = None
    different_from: tuple[Architecture, ...] = ()
    min_different_layers: int = 1

    def allows(self, layer: int, block: str) -> bool:
        """Say whether a layer may have a block."""
        if not fnmatchcase(block, self.fixed.get(layer, "*")):
            return False
        forbidden = (*self.forbidden.get(None, ()), *self.forbidden.get(layer, ()))
        return not any(fnmatchcase(block, pattern) for pattern in forbidden)

    def apply(self, candidates: Candidates) -> Candidates:
        """Return the candidates that this structure leaves, its counts and differences with them.

        Raises:
            ScenarioError: a layer that isn't there, a layer that is left without any block, a count that isn't positive.
        """
        for layer in {*self.fixed, *(i for i in self.forbidden if i is not None)}:
            if not 0 <= layer < candidates.num_layers:
                raise ScenarioError(f"structure: layer {layer} isn't there; the parent has layers 0 to {candidates.num_layers - 1}")
        if self.max_distinct is not None and self.max_distinct < 1:
            raise ScenarioError(f"structure: max_distinct is {self.max_distinct}; a model has one block or more, so give 1 or more")
        kept = [i for i, s in enumerate(candidates.scores) if self.allows(s.layer, s.block)]
        bare = sorted(set(range(candidates.num_layers)) - {candidates.scores[i].layer for i in kept})
        if bare:
            names = ", ".join(s.block for s in candidates.scores if s.layer == bare[0])
            raise ScenarioError(f"structure: no block is left for layer {bare[0]}; it has {names}: loosen `fixed` or `forbidden`")
        restricted = candidates.restricted(kept, max_distinct=1 if self.homogeneous else self.max_distinct)
        for architecture in self.different_from:
            restricted = restricted.differing(architecture, self.min_different_layers)
        return restricted


def solve_pool(
    scores: ScoreTable,
    costs: Mapping[str, PieceCosts],
    scenario: Scenario,
    parent_block: Block,
    *,
    num_solutions: int,
    min_different_layers: int = 1,
    structure: Structure | None = None,
) -> list[Solution]:
    """Return the best solution, the best that differs from it enough, the best that differs from both, and so on.

    With `min_different_layers` = 1 these are the N best architectures. Diversity as in Puzzle's appendix B.

    Args:
        scores: as `solve_scenario`.
        costs: as `solve_scenario`.
        scenario: as `solve_scenario`.
        parent_block: the parent's own block.
        num_solutions: how many to return; fewer where no more exist.
        min_different_layers: layers in which any two solutions differ at least.
        structure: further conditions.

    Raises:
        ScenarioError: as `solve_scenario`; InfeasibleScenarioError where there is not even one solution.
    """
    num_layers = len(scores)
    if num_solutions < 1 or not 1 <= min_different_layers <= num_layers:
        raise ScenarioError(
            f"num_solutions is {num_solutions} and min_different_layers {min_different_layers}; give 1 or more, and 1 to {num_layers}"
        )
    candidates = (structure or Structure()).apply(Candidates.of(scores, parent_block))
    solutions: list[Solution] = []
    while len(solutions) < num_solutions:
        try:
            solutions.append(solve_candidates(candidates, costs, scenario))
        except InfeasibleScenarioError:
            if not solutions:
                raise
            break
        candidates = candidates.differing(solutions[-1].architecture, min_different_layers)
    return solutions
