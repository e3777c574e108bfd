"""A scenario made ready to be solved: its candidates, its structure, and its limits at every combination of batch sizes."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from puzzle_dag.config import Scenario
from puzzle_dag.piece_costs import PieceCosts
from puzzle_dag.search.candidates import AnyLimit, Candidates
from puzzle_dag.search.goal import Goal, quality_budgets
from puzzle_dag.search.infeasible import InfeasibleScenarioError, explain
from puzzle_dag.search.limits import SIDES, Limit, Side, SumLimit, make_measure, target_costs
from puzzle_dag.search.points import Point, scenario_points
from puzzle_dag.search.program import GAP, Outcome, Program, SolverError
from puzzle_dag.search.solver import Solver

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Problem:
    """What is solved for a scenario.

    Attributes:
        scenario: what is asked.
        candidates: what may be chosen, the structure with them.
        costs: of the scenario's own target.
        points: combinations of batch sizes; each is a program of its own.
        budgets: of summed scores; they hold at every point.
    """

    scenario: Scenario
    candidates: Candidates
    costs: PieceCosts
    points: tuple[Point, ...]
    budgets: tuple[SumLimit, ...] = ()

    @staticmethod
    def of(scenario: Scenario, candidates: Candidates, costs: Mapping[str, PieceCosts]) -> "Problem":
        """Resolve a scenario's limits. Raises ScenarioError where what it asks was not measured."""
        return Problem(
            scenario,
            candidates,
            target_costs(scenario.target, costs),
            tuple(scenario_points(scenario, costs, candidates.parent)),
            quality_budgets(scenario.objective),
        )

    def limits(self, point: Point) -> tuple[AnyLimit, ...]:
        """Return all that must hold at a point: the constraints, then the budgets of quality."""
        return (*point.limits, *self.budgets)

    def goal(self, point: Point) -> Goal:
        """Return what is optimised at a point."""
        return Goal.of(self.scenario, self.costs, point.batch)

    def throughput(self, point: Point, outcome: Outcome) -> float:
        """Return the tokens a second of a choice on the scenario's own target."""
        return make_measure("throughput_tokens_per_s", self.costs, point.batch).of(self.candidates.architecture(outcome.chosen))

    def sides(self) -> list[tuple[int, Side]]:
        """Return every bound there is, as the index of its limit and its side."""
        limits = self.limits(self.points[0])
        return [(index, side) for index, limit in enumerate(limits) for side in SIDES if getattr(limit, side) is not None]

    def with_limits(self, limits: Sequence[Sequence[AnyLimit]]) -> "Problem":
        """Return the problem with other limits, constraints and budgets, a sequence for each point."""
        points = [replace(p, limits=tuple(x for x in own if isinstance(x, Limit))) for p, own in zip(self.points, limits, strict=True)]
        return replace(self, points=tuple(points), budgets=tuple(x for x in limits[0] if isinstance(x, SumLimit)))


def _narrows(new: AnyLimit, old: AnyLimit) -> bool:
    """Say whether whatever lies within `new` lies within `old`, too."""
    lower = old.at_least is None or (new.at_least is not None and new.at_least >= old.at_least)
    upper = old.at_most is None or (new.at_most is not None and new.at_most <= old.at_most)
    return lower and upper


@dataclass(slots=True)
class Memory:
    """What solving a problem leaves for the same problem with other bounds.

    Attributes:
        solvers: of each point's program, by the point's index.
        problem: the one that was solved last; None where none was.
        outcomes: of its points.
    """

    solvers: dict[int, Solver] = field(default_factory=dict)
    problem: Problem | None = None
    outcomes: Sequence[Outcome] = ()

    def settled(self, problem: Problem, index: int) -> Outcome | None:
        """Return a point's outcome where the last problem's settles it, None where it must be solved.

        With limits that are nowhere wider, what was infeasible still is, and the best choice is still the best if it
        meets them.
        """
        if self.problem is None:
            return None
        limits, old = problem.limits(problem.points[index]), self.outcomes[index]
        if not all(_narrows(a, b) for a, b in zip(limits, self.problem.limits(self.problem.points[index]), strict=True)):
            return None
        if old.status == "infeasible":
            return Outcome("infeasible")
        is_best = old.status == "optimal" and problem.candidates.meets(limits)(old.chosen)
        return replace(old, seconds=0.0) if is_best else None

    def solver(self, problem: Problem, index: int, program: Program) -> Solver:
        """Return a point's solver: the one that is there if it fits."""
        costs = problem.goal(problem.points[index]).costs(problem.candidates)
        if index not in self.solvers or not self.solvers[index].fits(program, costs):
            self.solvers[index] = Solver(program, costs)
        return self.solvers[index]


def solve_points(problem: Problem, *, time_limit_s: float = 600.0, memory: Memory | None = None, only_best: bool = False) -> list[Outcome]:
    """Solve the program of every point, to a proven gap each.

    Args:
        problem: what is solved.
        time_limit_s: for each point.
        memory: what the same problem left, solved with other bounds; it is brought up to date.
        only_best: whether points that are proven to be worse than another may end as "worse", without a choice. Summed
            scores alone compare like that; where a quantity is optimised, every point is solved.

    Returns:
        How each point ended. Where none can be met no outcome has a choice, and `explain_problem` says why: that takes many
        solves, so it is left to those who tell somebody.

    Raises:
        SolverError: nothing was found, and time ran out somewhere.
    """
    memory, name = Memory() if memory is None else memory, problem.scenario.name
    only_best = only_best and problem.scenario.objective.quantity is None
    outcomes = {i: settled for i in range(len(problem.points)) if (settled := memory.settled(problem, i)) is not None}
    programs = {i: problem.candidates.program(problem.limits(p)) for i, p in enumerate(problem.points) if i not in outcomes}
    bounds = dict.fromkeys(programs, 0.0)
    if only_best and len(problem.points) > 1:
        bounds = {i: memory.solver(problem, i, program).relax(program, time_limit_s=time_limit_s) for i, program in programs.items()}
    best = min((o.objective for o in outcomes.values() if o.chosen), default=math.inf) if only_best else math.inf
    for index in sorted(programs, key=lambda i: bounds[i]):  # the most promising point first
        outcome = memory.solver(problem, index, programs[index]).solve(
            programs[index],
            is_met=problem.candidates.meets(problem.limits(problem.points[index])),
            worse_than=best + GAP * abs(best) if math.isfinite(best) else math.inf,
            time_limit_s=time_limit_s,
        )
        _log.debug("%s, batch %s: %s in %.2f s", name, dict(problem.points[index].batches), outcome.status, outcome.seconds)
        outcomes[index] = outcome
        if only_best and outcome.chosen:
            best = min(best, outcome.objective)
    ordered = [outcomes[i] for i in range(len(problem.points))]
    if not is_met(ordered):
        if any(outcome.status == "time_limit" for outcome in ordered):
            raise SolverError(f"scenario {name}: nothing found in {time_limit_s:g} s; raise the time limit or loosen a constraint")
        return ordered
    memory.problem, memory.outcomes = problem, ordered
    return ordered


def is_met(outcomes: Sequence[Outcome]) -> bool:
    """Say whether any point has a choice."""
    return any(outcome.chosen for outcome in outcomes)


def explain_problem(problem: Problem) -> InfeasibleScenarioError:
    """Return the error of a problem that is infeasible at every point: what conflicts, and how near one can come."""
    return explain(problem.scenario.name, problem.candidates, [(p.batches, problem.limits(p)) for p in problem.points])


def keep_point(problem: Problem, outcomes: Sequence[Outcome]) -> int:
    """Return the index of the point to keep.

    The one with the best value of the goal; among those within the proven gap of it the one with the least summed
    score, then the highest throughput, then the smallest batch sizes.
    """
    found = [i for i, outcome in enumerate(outcomes) if outcome.chosen]
    losses = {}
    for i in found:
        goal = problem.goal(problem.points[i])
        losses[i] = goal.loss(goal.value(problem.candidates, outcomes[i].chosen))
    least = min(losses.values())
    tied = [i for i in found if losses[i] <= least + GAP / 2 * abs(least)]
    if problem.scenario.objective.quantity is not None:
        values = problem.candidates.costs(problem.scenario.objective)
        scores = {i: problem.candidates.exact_sum(values, outcomes[i].chosen) for i in tied}
        tied = [i for i in tied if scores[i] == min(scores.values())]
    return min(tied, key=lambda i: (-problem.throughput(problem.points[i], outcomes[i]), i))
