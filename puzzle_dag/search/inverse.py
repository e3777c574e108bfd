"""The search the other way round: the most throughput, or the least of anything else, within a budget of quality."""

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from fractions import Fraction

import numpy as np

from puzzle_dag.architecture import Block
from puzzle_dag.config import ConstraintName, Scenario
from puzzle_dag.piece_costs import PieceCosts
from puzzle_dag.search.candidates import Candidates, ScoreTable
from puzzle_dag.search.limits import ScenarioError, as_written, make_measure, scenario_limits, solved_batches, target_costs
from puzzle_dag.search.program import Floats, Outcome, Program, Row, minimise
from puzzle_dag.search.solution import Solution
from puzzle_dag.search.solve import build_solution, solve_candidates
from puzzle_dag.search.structure import Structure


def _within(values: Floats, most: Fraction, met: Callable[[tuple[int, ...]], bool]) -> Callable[[tuple[int, ...]], bool]:
    """Return the exact check that a choice keeps to the budget and meets the limits."""
    return lambda chosen: sum((Fraction(float(values[i])) for i in chosen), Fraction(0)) <= most and met(chosen)


def solve_within_quality(
    scores: ScoreTable,
    costs: Mapping[str, PieceCosts],
    scenario: Scenario,
    parent_block: Block,
    *,
    optimise: ConstraintName,
    at_most: float,
    structure: Structure | None = None,
    time_limit_s: float = 600.0,
) -> Solution:
    """Find the architecture with the best value of one quantity whose summed score stays within a budget.

    Throughput is maximised, every other quantity minimised, each at the batch size that is solved for and the
    target's lengths; of several batch sizes the one with the best value is kept.

    Args:
        scores: as `solve_scenario`.
        costs: as `solve_scenario`.
        scenario: its constraints hold as well; its objective says which score the budget is of.
        parent_block: the parent's own block.
        optimise: the quantity.
        at_most: the budget: the most that the summed score may be.
        structure: further conditions.
        time_limit_s: for each batch size.

    Returns:
        The solution. Its `objective` is the summed score; `notes` say what was optimised, the value that was reached,
        the proven bound of the value and the gap between both.

    Raises:
        ScenarioError: as `solve_scenario`, or the budget is below the least score that the constraints allow.
    """
    start = time.monotonic()
    candidates = (structure or Structure()).apply(Candidates.of(scores, parent_block))
    own, values, most = target_costs(scenario.target, costs), candidates.costs(scenario.objective), as_written(float(at_most))
    budget = Row("quality", values, upper=float(most))
    outcomes: dict[int, Outcome] = {}
    reached: dict[int, float] = {}
    limits, bounds = {}, dict[int, float]()
    for batch in solved_batches(scenario, own):
        limits[batch] = scenario_limits(scenario, costs, batch, candidates.parent)
        measure, program = make_measure(optimise, own, batch), candidates.program(limits[batch])
        outcome = minimise(
            Program(program.num_layers, program.items, (*program.rows, budget), program.max_distinct),
            candidates.amounts(measure),
            is_met=_within(values, most, candidates.meets(limits[batch])),
            time_limit_s=time_limit_s,
        )
        outcomes[batch] = outcome
        if outcome.chosen:
            reached[batch] = measure.of(candidates.architecture(outcome.chosen))
            bounds[batch] = float(measure.value(measure.constant + Fraction(outcome.bound)))
            outcomes[batch] = replace(outcome, objective=candidates.exact_sum(values, outcome.chosen), bound=np.nan)
    if not reached:
        least = solve_candidates(candidates, costs, scenario, time_limit_s=time_limit_s).objective
        raise ScenarioError(
            f"scenario {scenario.name}: {scenario.objective.minimize} at most {at_most:g} can't be met: the least that the constraints "
            f"allow is {least:.6g}"
        )
    is_rate = make_measure(optimise, own, own.batch_sizes[0]).is_rate
    batch = max(reached, key=lambda b: (reached[b] if is_rate else -reached[b], -outcomes[b].objective, -b))
    notes = {
        "optimised": optimise,
        "value": reached[batch],
        "bound": bounds[batch],
        "gap": abs(reached[batch] - bounds[batch]) / (abs(reached[batch]) or 1.0),
        "budget": at_most,
    }
    return build_solution(
        scenario, candidates, own, batch=batch, limits=limits[batch], outcomes=outcomes, seconds=time.monotonic() - start, notes=notes
    )
