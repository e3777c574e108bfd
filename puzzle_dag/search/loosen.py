"""What a constraint costs: the objective when each bound in turn is loosened, by solving again.

An integer program has no shadow prices: how much quality one more GiB buys is only known by solving with it.
"""

from puzzle_dag.search.candidates import AnyLimit
from puzzle_dag.search.limits import Side, as_written
from puzzle_dag.search.problem import Memory, Problem, keep_point, solve_points
from puzzle_dag.search.solution import Loosened, Solution
from puzzle_dag.search.step import StepKind, loosened_limit, step_kinds, tell_loosened


def _reach(problem: Problem, memory: Memory, time_limit_s: float) -> float:
    """Return the value of the objective that can be reached."""
    outcomes = solve_points(problem, time_limit_s=time_limit_s, memory=memory, only_best=True)
    kept = keep_point(problem, outcomes)
    return problem.goal(problem.points[kept]).value(problem.candidates, outcomes[kept].chosen)


def loosen_each(problem: Problem, solution: Solution, *, share: float = 0.05, time_limit_s: float = 600.0) -> tuple[Loosened, ...]:
    """Loosen each bound alone, and solve again: by `share` of its value, or by the steps that `search/step.py` tells of.

    Args:
        problem: what `solution` solves; constraints and budgets of quality are loosened alike.
        solution: the answer with all bounds in force.
        share: by how much a bound is loosened, as a share of it.
        time_limit_s: for each program.

    Returns:
        One entry a bound and step, the largest gain first.
    """
    kept = next(p for p in problem.points if dict(p.batches) == {k: solution.batch_sizes[k] for k in p.batches})
    goal, limits, part = problem.goal(kept), [problem.limits(point) for point in problem.points], as_written(share)
    value = solution.objective if goal.measure is None else goal.measure.of(solution.architecture)
    found, memory = [], Memory()

    def moved(limit: AnyLimit, side: Side, kind: StepKind) -> AnyLimit:
        return loosened_limit(problem.candidates, limit, side, kind, part)

    for index, side in problem.sides():
        before = problem.limits(kept)[index]
        for kind in step_kinds(before, side):
            changed = [[moved(x, side, kind) if i == index else x for i, x in enumerate(own)] for own in limits]
            reached = _reach(problem.with_limits(changed), memory, time_limit_s)
            gain = max(0.0, goal.loss(value) - goal.loss(reached))
            found.append(tell_loosened(before, moved(before, side, kind), side, kind, part, value=value, reached=reached, gain=gain))
    return tuple(sorted(found, key=lambda entry: -entry.gain))
