"""A pool of solutions: the best, the best that differs enough from it, the best that differs from both, and so on."""

import time
from collections.abc import Mapping
from dataclasses import replace

from puzzle_dag.config import Scenario
from puzzle_dag.piece_costs import PieceCosts
from puzzle_dag.search.candidates import Candidates
from puzzle_dag.search.limits import ScenarioError
from puzzle_dag.search.problem import Problem, explain_problem
from puzzle_dag.search.solution import Solution
from puzzle_dag.search.solve import find_solution


def solve_pool(
    candidates: Candidates, costs: Mapping[str, PieceCosts], scenario: Scenario, *, time_limit_s: float = 600.0
) -> list[Solution]:
    """Return as many solutions as a scenario's `pool` asks for, the best first; fewer where no more exist.

    With `min_different_layers` = 1 these are the N best architectures. Diversity as in Puzzle's appendix B.

    Args:
        candidates: from `prepare`.
        costs: as `solve_scenario`.
        scenario: as `solve_scenario`.
        time_limit_s: for each combination of batch sizes and each solution.

    Raises:
        ScenarioError: as `solve_scenario`; InfeasibleScenarioError where there is not even one solution.
    """
    least, num_layers = scenario.pool.min_different_layers, candidates.num_layers
    if least > num_layers:
        raise ScenarioError(f"scenario {scenario.name}: pool.min_different_layers is {least}; the parent has {num_layers} layers")
    start, solutions = time.monotonic(), list[Solution]()
    problem = Problem.of(scenario, candidates, costs)
    while len(solutions) < scenario.pool.num_solutions:
        found = find_solution(problem, time_limit_s=time_limit_s)
        if found is None:
            break
        solutions.append(found)
        problem = replace(problem, candidates=problem.candidates.differing(found.architecture, least))
    if not solutions:
        raise explain_problem(problem)
    return [replace(solutions[0], seconds=time.monotonic() - start), *solutions[1:]] if len(solutions) > 1 else solutions
