"""The search: for a scenario, the architecture of least summed score that meets every constraint, proven.

Or, where the scenario's objective is a quantity, the one with the best value of it within a budget of summed scores.
"""

import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from puzzle_dag.architecture import Architecture, Block
from puzzle_dag.config import Scenario
from puzzle_dag.piece_costs import PieceCosts
from puzzle_dag.search.candidates import Candidates, ScoreTable, placed_digests
from puzzle_dag.search.infeasible import InfeasibleScenarioError
from puzzle_dag.search.limits import Limit, ScenarioError, all_measures, make_measure
from puzzle_dag.search.points import Point
from puzzle_dag.search.problem import Problem, explain_problem, is_met, keep_point, solve_points
from puzzle_dag.search.program import GAP, Outcome
from puzzle_dag.search.solution import BatchOutcome, BudgetReport, Choice, LimitReport, Solution
from puzzle_dag.search.structure import Structure
from puzzle_dag.store import fingerprint

if TYPE_CHECKING:
    from puzzle_dag.search.score import BlockScore

_log = logging.getLogger(__name__)

__all__ = ["InfeasibleScenarioError", "Solution", "describe_architecture", "prepare", "solve_candidates", "solve_scenario"]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def describe_architecture(architecture: Architecture, costs: PieceCosts, batch: int) -> dict[str, float | None]:
    """Return every quantity of an architecture at a batch size of a target; None for an infinite throughput."""
    return {measure.name: _finite(measure.of(architecture)) for measure in all_measures(costs, batch)}


def report_limit(limit: Limit, architecture: Architecture, parent: Architecture) -> LimitReport:
    """Return a limit together with the values that an architecture and the parent have there."""
    measure = limit.measure
    return LimitReport(
        name=measure.name,
        target=measure.costs.target,
        batch=measure.batch,
        length=measure.length if measure.name == "memory_bytes" else None,
        at_least=None if limit.at_least is None else float(limit.at_least),
        at_most=None if limit.at_most is None else float(limit.at_most),
        value=measure.of(architecture),
        parent_value=measure.of(parent),
    )


def _choices(score: "BlockScore", value: float) -> Iterator[Choice]:
    """Yield the choice of each layer that a replacement covers."""
    placed = list(placed_digests(score))
    for layer, block, digest in placed:
        yield Choice(layer, block, value if layer == score.layer else 0.0, digest, score.block if len(placed) > 1 else "")


def _batch_outcome(problem: Problem, point: Point, outcome: Outcome) -> BatchOutcome:
    others = {target: batch for target, batch in point.batches.items() if target != problem.scenario.target}
    if not outcome.chosen:
        return BatchOutcome(point.batch, outcome.status, None, None, outcome.seconds, None, others)
    score = problem.candidates.exact_sum(problem.candidates.costs(problem.scenario.objective), outcome.chosen)
    bound = _finite(outcome.bound) if problem.scenario.objective.quantity is None else None
    return BatchOutcome(point.batch, outcome.status, score, bound, outcome.seconds, _finite(problem.throughput(point, outcome)), others)


def _proof(problem: Problem, outcomes: Sequence[Outcome], kept: int) -> tuple[str, float | None, float | None]:
    """Return the status, the bound of the goal's value over all points, and the gap; None where nothing was proven."""
    goals = [problem.goal(point) for point in problem.points]
    value = goals[kept].value(problem.candidates, outcomes[kept].chosen)
    losses = [goals[i].loss(goals[i].bound(o)) for i, o in enumerate(outcomes) if o.status != "infeasible"]
    if outcomes[kept].status == "feasible" or any(math.isnan(loss) for loss in losses):
        return ("feasible" if outcomes[kept].status == "feasible" else "time_limit"), None, None
    least = min(*losses, goals[kept].loss(value))
    gap = (goals[kept].loss(value) - least) / (abs(value) or 1.0)
    bound = -least if goals[kept].is_maximised else least
    return ("optimal" if gap <= GAP else "time_limit"), _finite(bound), _finite(gap)


def build_solution(
    problem: Problem, outcomes: Sequence[Outcome], kept: int, *, seconds: float, notes: Mapping[str, Any] | None = None
) -> Solution:
    """Return the solution that the outcome at the point `kept` stands for."""
    scenario, candidates, point = problem.scenario, problem.candidates, problem.points[kept]
    outcome, objective = outcomes[kept], scenario.objective
    architecture, scores = candidates.architecture(outcome.chosen), candidates.costs(objective)
    choices = tuple(choice for i in outcome.chosen for choice in _choices(candidates.scores[i], float(scores[i])))
    best = max(make_measure("throughput_tokens_per_s", problem.costs, b).of(candidates.parent) for b in problem.costs.batch_sizes)
    status, bound, gap = _proof(problem, outcomes, kept)
    if objective.quantity is not None:
        value = problem.goal(point).value(candidates, outcome.chosen)
        notes = {"optimised": objective.quantity, "value": _finite(value), "bound": bound, "gap": gap, **(notes or {})}
    is_score = objective.quantity is None
    return Solution(
        scenario=scenario.name,
        target=scenario.target,
        status=status,
        minimized=objective.score,
        objective=candidates.exact_sum(scores, outcome.chosen),
        bound=bound if is_score else None,
        gap=gap if is_score else None,
        batch=point.batch,
        choices=choices,
        predicted=describe_architecture(architecture, problem.costs, point.batch),
        parent={
            **describe_architecture(candidates.parent, problem.costs, point.batch),
            "parent_best_throughput_tokens_per_s": _finite(best),
        },
        limits=tuple(report_limit(limit, architecture, candidates.parent) for limit in point.limits),
        batches=tuple(_batch_outcome(problem, p, o) for p, o in zip(problem.points, outcomes, strict=True)),
        seconds=seconds,
        digest=fingerprint([[c.layer, c.block, c.digest] for c in choices]),
        notes=dict(notes or {}),
        budgets=tuple(BudgetReport(b.name, float(b.at_most or 0), float(candidates.total(b, outcome.chosen))) for b in problem.budgets),
        batch_elsewhere={target: batch for target, batch in point.batches.items() if target != scenario.target},
    )


def prepare(
    scores: ScoreTable,
    costs: Mapping[str, PieceCosts],
    scenario: Scenario,
    parent_block: Block,
    *,
    earlier: Mapping[str, Scenario] | None = None,
) -> Candidates:
    """Return the candidates that a scenario's structure leaves; scenarios that it must differ from are solved first.

    An earlier scenario is solved from the same scores and costs, so its answer here is its answer of today, whatever
    was materialised and when. Arguments and errors as `solve_scenario`.
    """
    others = earlier_answers(scores, costs, scenario, parent_block, earlier=earlier)
    candidates = Candidates.of(scores, parent_block)
    return Structure.of(scenario.structure, candidates, others).apply(candidates)


def earlier_answers(
    scores: ScoreTable,
    costs: Mapping[str, PieceCosts],
    scenario: Scenario,
    parent_block: Block,
    *,
    earlier: Mapping[str, Scenario] | None = None,
) -> tuple[Architecture, ...]:
    """Return the answers of today that a scenario must differ from. Arguments and errors as `solve_scenario`."""
    found = []
    for name in scenario.structure.different_from:
        if name not in (earlier or {}):
            raise ScenarioError(f"scenario {scenario.name}: structure.different_from names {name!r}, which was not given")
        try:
            found.append(solve_scenario(scores, costs, (earlier or {})[name], parent_block, earlier=earlier).architecture)
        except ScenarioError as error:
            raise ScenarioError(f"scenario {scenario.name} must differ from scenario {name}, which has no answer: {error}") from error
    return tuple(found)


def solve_scenario(
    scores: ScoreTable,
    costs: Mapping[str, PieceCosts],
    scenario: Scenario,
    parent_block: Block,
    *,
    earlier: Mapping[str, Scenario] | None = None,
    time_limit_s: float = 600.0,
) -> Solution:
    """Find the architecture of least summed score that meets a scenario's constraints (Puzzle, section 4.3).

    The summed score is an estimate of the child's; every combination of batch sizes is an integer program of its own,
    solved by HiGHS to a relative gap of 1e-6 or better, and its result is re-checked in exact arithmetic. Where the
    objective is a quantity, its best value within the budget of summed scores is found in the same way.

    Args:
        scores: of every layer's blocks, layer by layer, the parent's own among them.
        costs: target name -> costs of the pieces, of every target that the scenario names.
        scenario: what is to be met and optimised.
        parent_block: the parent's own block.
        earlier: the scenarios that `structure.different_from` names, here and in one another, by name.
        time_limit_s: for each combination of batch sizes; after it the best found is kept with the status "time_limit".

    Returns:
        The solution; of several batch sizes the one with the least objective, then with the highest throughput. With a
        quantity as the objective, `notes` say which, the value that was reached, its proven bound and the gap.

    Raises:
        ScenarioError: a target or batch size that was not measured, a variant without cost or score.
        InfeasibleScenarioError: nothing meets the constraints; names which, and the best value that can be had.
        SolverError: the solver failed, or ran out of time before it found anything.
    """
    candidates = prepare(scores, costs, scenario, parent_block, earlier=earlier)
    return solve_candidates(candidates, costs, scenario, time_limit_s=time_limit_s)


def solve_candidates(
    candidates: Candidates, costs: Mapping[str, PieceCosts], scenario: Scenario, *, time_limit_s: float = 600.0
) -> Solution:
    """Solve as `solve_scenario` does, for candidates (from `prepare`) that several scenarios or bounds share."""
    return solve_problem(Problem.of(scenario, candidates, costs), time_limit_s=time_limit_s)


def solve_problem(problem: Problem, *, time_limit_s: float = 600.0) -> Solution:
    """Solve as `solve_scenario` does, with limits that were resolved before."""
    solution = find_solution(problem, time_limit_s=time_limit_s)
    if solution is None:
        raise explain_problem(problem)
    return solution


def find_solution(problem: Problem, *, time_limit_s: float = 600.0) -> Solution | None:
    """Solve as `solve_problem` does; return None where nothing meets the constraints, without looking for the reason."""
    start = time.monotonic()
    outcomes = solve_points(problem, time_limit_s=time_limit_s)
    if not is_met(outcomes):
        return None
    solution = build_solution(problem, outcomes, keep_point(problem, outcomes), seconds=time.monotonic() - start)
    _log.info("%s: %s, %d programs in %.2f s", solution.scenario, solution.status, len(outcomes), solution.seconds)
    return solution
