"""Other ways to pick an architecture from the same library under the same constraints, to hold the search against.

As in Puzzle's ablations (arXiv 2411.19146, appendix F.2): a budget-constrained greedy choice (F.2.2), the
architecture with the most parameters (F.2.3), and random blocks of the library (F.2.4).
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from puzzle_dag.architecture import Block
from puzzle_dag.config import Scenario
from puzzle_dag.piece_costs import PieceCosts
from puzzle_dag.search.candidates import AnyLimit, Candidates, ScoreTable
from puzzle_dag.search.limits import ScenarioError, make_measure, target_costs
from puzzle_dag.search.problem import Problem, explain_problem
from puzzle_dag.search.program import Floats, Outcome
from puzzle_dag.search.solution import Solution
from puzzle_dag.search.solve import build_solution, prepare
from puzzle_dag.search.solver import minimise


class BaselineFailedError(ScenarioError):
    """The greedy choice meets the constraints at no batch size, though another architecture may."""


def greedy_solution(scores: ScoreTable, costs: Mapping[str, PieceCosts], scenario: Scenario, parent_block: Block) -> Solution:
    """Pick layer by layer, within an equal share of each budget (Puzzle, F.2.2).

    Layers go from the lowest mean score to the highest; each takes the block with the lowest score that its share of
    the budgets allows, and what it leaves is added to the next layer's. Where a share allows no block at all, the one
    that exceeds it least is taken and the next layers' shares pay for it.

    Raises:
        BaselineFailedError: what was picked meets the constraints at no batch size.
        ScenarioError: as `solve_scenario`.
    """

    def pick(candidates: Candidates, limits: Sequence[AnyLimit], values: Floats) -> Outcome:
        start, chosen = time.monotonic(), _pick_greedily(candidates, limits, values)
        if not candidates.meets(limits)(chosen):
            return Outcome("infeasible", seconds=time.monotonic() - start)
        return Outcome("feasible", chosen, seconds=time.monotonic() - start)

    return _best_of_batches(scores, costs, scenario, parent_block, pick, notes={"method": "greedy"})


def largest_parameters_solution(scores: ScoreTable, costs: Mapping[str, PieceCosts], scenario: Scenario, parent_block: Block) -> Solution:
    """Pick the architecture with the most parameters that meets the constraints, whatever its scores (Puzzle, F.2.3).

    Of several batch sizes the one that allows the most parameters is kept. Raises as `solve_scenario`.
    """

    def pick(candidates: Candidates, limits: Sequence[AnyLimit], values: Floats) -> Outcome:
        own = target_costs(scenario.target, costs)
        sizes = candidates.amounts(make_measure("parameters", own, own.batch_sizes[0]))
        return minimise(candidates.program(limits), -sizes, is_met=candidates.meets(limits))

    return _best_of_batches(scores, costs, scenario, parent_block, pick, notes={"method": "largest_parameters"}, by_score=False)


def random_solution(scores: ScoreTable, costs: Mapping[str, PieceCosts], scenario: Scenario, parent_block: Block, *, seed: int) -> Solution:
    """Pick random blocks of the library that meet the constraints, whatever their scores (Puzzle, F.2.4).

    One block a layer is drawn uniformly; where the draw misses a constraint, the fewest layers are exchanged that
    make it meet all, so every constraint set that can be met gets an answer. Raises as `solve_scenario`.
    """

    def pick(candidates: Candidates, limits: Sequence[AnyLimit], values: Floats) -> Outcome:
        rng = np.random.default_rng(seed)
        layers = np.array([s.layer for s in candidates.scores])
        # Ties among the exchanges are broken at random, too: by less than one exchange in all.
        changes = 1.0 + rng.random(len(layers)) / (2 * candidates.num_layers)
        for layer in range(candidates.num_layers):
            changes[rng.choice(np.flatnonzero(layers == layer))] = 0.0
        return minimise(candidates.program(limits), changes, is_met=candidates.meets(limits))

    return _best_of_batches(scores, costs, scenario, parent_block, pick, notes={"method": "random", "seed": seed}, by_score=False)


def _pick_greedily(candidates: Candidates, limits: Sequence[AnyLimit], values: Floats) -> tuple[int, ...]:
    """Return one item a layer. Every bound is a budget: a lower bound is one of the negated amounts."""
    program = candidates.program(limits)
    budgets = [(row.coefficients, row.upper) for row in program.rows if np.isfinite(row.upper)]
    budgets += [(-row.coefficients, -row.lower) for row in program.rows if np.isfinite(row.lower)]
    amounts = np.array([coefficients for coefficients, _ in budgets]).reshape(len(budgets), -1)
    shares = np.array([total for _, total in budgets]) / candidates.num_layers
    layers = np.array([s.layer for s in candidates.scores])
    members = [np.flatnonzero(layers == layer) for layer in range(candidates.num_layers)]
    left, chosen = np.zeros(len(budgets)), [0] * candidates.num_layers
    for layer in sorted(range(candidates.num_layers), key=lambda i: (float(values[members[i]].mean()), i)):
        left = left + shares
        excess = np.maximum(0.0, (amounts[:, members[layer]] - left[:, None]) / np.maximum(np.abs(shares), 1e-300)[:, None]).sum(0)
        best = min(range(len(members[layer])), key=lambda k: (excess[k] if excess[k] > 1e-12 else 0.0, values[members[layer][k]], k))
        chosen[layer] = int(members[layer][best])
        left = left - amounts[:, chosen[layer]]
    return tuple(chosen)


def _best_of_batches(
    scores: ScoreTable,
    costs: Mapping[str, PieceCosts],
    scenario: Scenario,
    parent_block: Block,
    pick: Callable[[Candidates, Sequence[AnyLimit], Floats], Outcome],
    *,
    notes: Mapping[str, object],
    by_score: bool = True,
) -> Solution:
    """Pick at every batch size; keep the one with the least summed score, or what the picking itself minimised."""
    start = time.monotonic()
    problem = Problem.of(scenario, prepare(scores, costs, scenario, parent_block), costs)
    candidates, values = problem.candidates, problem.candidates.costs(scenario.objective)
    picked = [pick(candidates, problem.limits(point), values) for point in problem.points]
    found = [i for i, outcome in enumerate(picked) if outcome.chosen]
    if not found:
        error = explain_problem(problem) if not by_score else None
        raise error or BaselineFailedError(f"scenario {scenario.name}: the greedy choice meets the constraints at no batch size")
    losses = {i: candidates.exact_sum(values, picked[i].chosen) if by_score else picked[i].objective for i in found}
    kept = min(found, key=lambda i: (losses[i], -problem.throughput(problem.points[i], picked[i]), i))
    unproven = [replace(o, status="feasible", bound=np.nan) if o.chosen else o for o in picked]
    return build_solution(problem, unproven, kept, seconds=time.monotonic() - start, notes=notes)
