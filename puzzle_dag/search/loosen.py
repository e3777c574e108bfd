"""What a constraint costs: the objective when each bound in turn is loosened, by solving again.

An integer program has no shadow prices: how much quality one more GiB buys is only known by solving with it.
"""

import math
from fractions import Fraction

from puzzle_dag.search.candidates import AnyLimit
from puzzle_dag.search.limits import Limit, Side, as_written
from puzzle_dag.search.problem import Memory, Problem, keep_point, solve_points
from puzzle_dag.search.program import GAP
from puzzle_dag.search.solution import Loosened, Solution


def _loosen(limit: AnyLimit, side: Side, share: Fraction) -> AnyLimit:
    """Return the limit with one bound moved outwards by a share of its value; a count of layers by one at least."""
    bound = limit.at_least if side == "at_least" else limit.at_most
    assert bound is not None, "only bounds that there are get loosened"
    change = abs(bound) * share
    if isinstance(limit, Limit) and limit.measure.name == "num_attention_layers":
        change = Fraction(max(1, math.ceil(change)))
    if side == "at_most":
        return limit.with_bound(side, bound + change)
    return limit.with_bound(side, max(Fraction(0), bound - change))


def _reach(problem: Problem, memory: Memory, time_limit_s: float) -> float:
    """Return the value of the objective that can be reached."""
    outcomes = solve_points(problem, time_limit_s=time_limit_s, memory=memory, only_best=True)
    kept = keep_point(problem, outcomes)
    return problem.goal(problem.points[kept]).value(problem.candidates, outcomes[kept].chosen)


def loosen_each(problem: Problem, solution: Solution, *, share: float = 0.05, time_limit_s: float = 600.0) -> tuple[Loosened, ...]:
    """Loosen each bound by `share` of its value, alone, and solve again.

    Args:
        problem: what `solution` solves; constraints and budgets of quality are loosened alike.
        solution: the answer with all bounds in force.
        share: by how much a bound is loosened, as a share of it; a count of layers by one layer at least.
        time_limit_s: for each program.

    Returns:
        One entry a bound, the largest gain first.
    """
    kept = next(p for p in problem.points if dict(p.batches) == {k: solution.batch_sizes[k] for k in p.batches})
    goal, limits = problem.goal(kept), [problem.limits(point) for point in problem.points]
    value = solution.objective if goal.measure is None else goal.measure.of(solution.architecture)
    found, memory = [], Memory()
    for index, side in problem.sides():
        changed = [[_loosen(x, side, as_written(share)) if i == index else x for i, x in enumerate(own)] for own in limits]
        reached = _reach(problem.with_limits(changed), memory, time_limit_s)
        before = problem.limits(kept)[index]
        bound, loosened = float(getattr(before, side)), float(getattr(_loosen(before, side, as_written(share)), side))
        gain = max(0.0, goal.loss(value) - goal.loss(reached))
        is_binding = gain > GAP * max(abs(value), abs(reached))
        found.append(Loosened(before.name, side, bound, loosened, abs(loosened - bound), reached, gain, is_binding))
    return tuple(sorted(found, key=lambda entry: -entry.gain))
