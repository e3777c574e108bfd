"""All that is told of a scenario: its pool of solutions, and what loosening each bound of the best one would buy."""

from collections.abc import Mapping
from dataclasses import replace

from puzzle_dag.architecture import Block
from puzzle_dag.config import Scenario
from puzzle_dag.piece_costs import PieceCosts
from puzzle_dag.search.candidates import ScoreTable
from puzzle_dag.search.loosen import loosen_each
from puzzle_dag.search.pool import solve_pool
from puzzle_dag.search.problem import Problem
from puzzle_dag.search.solution import Solution
from puzzle_dag.search.solve import prepare

VERSION = 2


def answer_scenario(
    scores: ScoreTable,
    costs: Mapping[str, PieceCosts],
    scenario: Scenario,
    parent_block: Block,
    *,
    earlier: Mapping[str, Scenario] | None = None,
    time_limit_s: float = 600.0,
) -> list[Solution]:
    """Solve a scenario, its pool with it, and loosen each bound of the best solution in turn.

    Args:
        scores: as `solve_scenario`.
        costs: as `solve_scenario`.
        scenario: as `solve_scenario`; its `pool` says how many solutions.
        parent_block: as `solve_scenario`.
        earlier: as `solve_scenario`.
        time_limit_s: for each program.

    Returns:
        The solutions, the best first, which also says what loosening each of its bounds would buy.

    Raises:
        ScenarioError, InfeasibleScenarioError, SolverError: as `solve_scenario`.
    """
    candidates = prepare(scores, costs, scenario, parent_block, earlier=earlier)
    best, *others = solve_pool(candidates, costs, scenario, time_limit_s=time_limit_s)
    loosened = loosen_each(Problem.of(scenario, candidates, costs), best, time_limit_s=time_limit_s)
    return [replace(best, loosened=loosened), *others]
