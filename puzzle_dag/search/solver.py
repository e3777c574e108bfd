"""The solver of integer programs: to a proven gap by HiGHS, kept from one right-hand side to the next.

What bounds don't change is worked out once: which items are dominated, the columns, and the linear relaxation with its
last basis. Items whose reduced cost there shows that no solution as good as the one found can hold them are left
out of the integer program, which is exact; the bound that is returned accounts for them. That integer program is built
anew and searched from the start in each solve.
"""

import time
from collections.abc import Callable, Sequence
from typing import Literal

import highspy
import numpy as np

from puzzle_dag.search.highs import make_highs
from puzzle_dag.search.program import Floats, Indices, Matrix, Outcome, Program, Row, SolverError, drop_dominated, row_scale

_TOLERANCE = 1e-9
_FIRST_ITEMS_PER_LAYER = 1.6
_MOST_EXACT_CUTS = 200
_MOST_RESCALING = 8.0
_OPTIONS = {
    "threads": 1,  # more threads, and the answer among equals may change from run to run
    "random_seed": 0,
    "mip_rel_gap": 0.0,
    "mip_abs_gap": _TOLERANCE,  # of costs that are scaled to a total near 1
    "primal_feasibility_tolerance": _TOLERANCE,
    "dual_feasibility_tolerance": _TOLERANCE,
    "mip_feasibility_tolerance": _TOLERANCE,
    # Few items are left when the search starts, so hunting for a first solution costs more than it saves.
    "mip_heuristic_run_feasibility_jump": False,
    "mip_heuristic_run_rens": False,
    "mip_heuristic_run_rins": False,
    "mip_detect_symmetry": False,
    "mip_allow_restart": False,
}


class Solver:
    """One program, to be solved again and again with other bounds of its rows."""

    def __init__(self, program: Program, costs: Floats) -> None:
        """Prepare.

        Args:
            program: what is chosen from, and the conditions; other bounds may come later.
            costs: one for each item; may be negative.
        """
        self._program, self._costs = program, costs
        self._matrix, self._kept = Matrix.of(program), drop_dominated(program, costs)
        # The costs are shifted by each layer's least, so that only differences are rounded.
        self._base, shifts = _least_per_layer(program, costs)
        self._shifted = costs - shifts
        self._scale = float(self._shifted[self._kept].max()) if np.isfinite(self._base) else 1.0
        self._scale = self._scale or 1.0
        self._relaxation: highspy.Highs | None = None

    def fits(self, program: Program, costs: Floats) -> bool:
        """Say whether a program is this one but for the values of its bounds, and these are of a similar size."""
        own = self._program
        return (
            program.items is own.items
            and (program.num_layers, program.max_distinct, len(program.rows)) == (own.num_layers, own.max_distinct, len(own.rows))
            and all(self._fits_row(i, row) for i, row in enumerate(program.rows))
            and np.array_equal(costs, self._costs)
        )

    def _fits_row(self, index: int, row: Row) -> bool:
        own, ratio = self._program.rows[index], row_scale(row) / self._matrix.scales[index]
        same_sides = (np.isfinite(row.lower), np.isfinite(row.upper)) == (np.isfinite(own.lower), np.isfinite(own.upper))
        # Which items are dominated depends on the sides that are bounded, and the tolerance on the scale.
        return same_sides and 1 / _MOST_RESCALING <= ratio <= _MOST_RESCALING and np.array_equal(row.coefficients, own.coefficients)

    def relax(self, program: Program, *, time_limit_s: float = 600.0) -> float:
        """Return the optimum of the linear relaxation under a program's bounds: no choice costs less. Infinite where there is none.

        Raises:
            SolverError: the solver failed.
        """
        outcome = self._relax(program, time.monotonic() + time_limit_s)
        return float(np.inf) if outcome.status == "infeasible" else outcome.bound

    def solve(
        self,
        program: Program,
        *,
        is_met: Callable[[tuple[int, ...]], bool] = lambda chosen: True,
        worse_than: float = np.inf,
        any_choice: bool = False,
        time_limit_s: float = 600.0,
    ) -> Outcome:
        """Find the items of least total cost, proven within a relative gap of 1e-6.

        Args:
            program: with the bounds to be met; one that `fits`.
            is_met: re-checks a choice in exact arithmetic. The solver knows the rows up to a tolerance of 1e-9; a choice
                that breaks one by less is cut off and the next best is found.
            worse_than: where nothing costs as little as this, the status is "worse" and no choice is looked for.
            any_choice: whether the first choice that is found will do; its status is "feasible", and it tends to cost little.
            time_limit_s: when to stop; the best choice so far is returned with the status "time_limit".

        Raises:
            SolverError: the solver failed, or hundreds of choices lie within rounding of a limit.
        """
        start, solver = time.monotonic(), self
        for _ in range(_MOST_EXACT_CUTS):
            outcome = solver._search(program, worse_than, any_choice, start + time_limit_s)
            if not outcome.chosen or is_met(outcome.chosen):
                objective = float(sum(self._costs[i] for i in outcome.chosen)) if outcome.chosen else np.nan
                bound = min(outcome.bound, objective) if outcome.chosen else outcome.bound
                return Outcome(outcome.status, outcome.chosen, objective, bound, time.monotonic() - start)
            program = _cut_off(program, outcome.chosen)
            solver = Solver(program, self._costs)
        raise SolverError(f"{_MOST_EXACT_CUTS} choices lie within rounding of a limit without meeting it; move the limit a little")

    def _relax(self, program: Program, deadline_s: float) -> Outcome:
        """Solve the linear relaxation from where the last one ended; the outcome has a bound, and no choice."""
        if not np.isfinite(self._base):
            return Outcome("infeasible")  # a layer that no item covers
        scaled = [self._matrix.set_bounds(i, row.lower, row.upper) for i, row in enumerate(program.rows)]
        if self._relaxation is None:
            model = self._matrix.model(self._kept, self._shifted / self._scale, integer=False)
            self._relaxation = _start(model)
        else:
            for index, (lower, upper) in enumerate(scaled):
                self._relaxation.changeRowBounds(program.num_layers + index, lower, upper)
        _run(self._relaxation, deadline_s)
        state = _state(self._relaxation)
        bound = self._relaxation.getInfo().objective_function_value * self._scale + self._base if state == "optimal" else np.nan
        return Outcome(state, bound=bound)

    def _search(self, program: Program, worse_than: float, any_choice: bool, deadline_s: float) -> Outcome:
        """Solve in floating point."""
        relaxed = self._relax(program, deadline_s)
        if relaxed.status != "optimal":
            return relaxed
        if relaxed.bound - _TOLERANCE * self._scale > worse_than:  # by more than rounding, or a tie would pass for worse
            return Outcome("worse", bound=relaxed.bound)
        assert self._relaxation is not None
        kept, matrix, base = self._kept, self._matrix, self._base
        least = self._relaxation.getInfo().objective_function_value * self._scale
        reduced = np.array(self._relaxation.getSolution().col_dual[: len(kept)]) * self._scale
        num_kept, known = int(_FIRST_ITEMS_PER_LAYER * program.num_layers), tuple[int, ...]()
        slack = float(np.sort(reduced)[num_kept]) if num_kept < len(kept) else np.inf
        while True:
            # An item whose reduced cost is above `slack` is in no solution below least + slack.
            part = kept[reduced <= slack]
            unit = least if least > 1e-6 * self._scale else self._scale
            solver = _start(matrix.model(part, self._shifted / unit, integer=True))
            if known and not matrix.names:
                solver.setSolution(_solution(part, known))
            if any_choice:
                solver.setOptionValue("mip_max_improving_sols", 1)
            _run(solver, deadline_s)
            state, info = _state(solver), solver.getInfo()
            found = info.primal_solution_status == highspy.SolutionStatus.kSolutionStatusFeasible
            if any_choice and found:
                return Outcome("feasible", _chosen(solver, part, program), bound=least + base)
            if state == "time_limit":
                return Outcome(state, _chosen(solver, part, program) if found else (), bound=least + base)
            if state == "infeasible" and len(part) == len(kept):
                return Outcome(state)
            if state == "optimal":
                objective = info.objective_function_value * unit
                bound = min(info.mip_dual_bound * unit, objective)
                if len(part) == len(kept) or objective <= least + slack:
                    return Outcome(state, _chosen(solver, part, program), bound=bound + base)
                known, slack = _chosen(solver, part, program), max(slack, objective - least) + _TOLERANCE * self._scale
            else:
                num_kept *= 4
                slack = float(np.sort(reduced)[num_kept]) if num_kept < len(kept) else np.inf


def minimise(
    program: Program,
    costs: Floats,
    *,
    is_met: Callable[[tuple[int, ...]], bool] = lambda chosen: True,
    any_choice: bool = False,
    time_limit_s: float = 600.0,
) -> Outcome:
    """Find the items of least total cost of a program that is solved once. Arguments and errors as `Solver` and its `solve`."""
    return Solver(program, costs).solve(program, is_met=is_met, any_choice=any_choice, time_limit_s=time_limit_s)


def least_total(program: Program, costs: Floats) -> float:
    """Return the least total cost that could be if the rows asked for nothing; exact where every item covers one layer, else a bound."""
    return _least_per_layer(program, costs)[0]


def _start(model: highspy.HighsLp) -> highspy.Highs:
    solver = make_highs()
    for name, value in _OPTIONS.items():
        solver.setOptionValue(name, value)
    solver.passModel(model)
    return solver


def _run(solver: highspy.Highs, deadline_s: float) -> None:
    # HiGHS counts the time of all its runs against the limit.
    solver.setOptionValue("time_limit", solver.getRunTime() + max(0.01, deadline_s - time.monotonic()))
    solver.run()


def _state(solver: highspy.Highs) -> Literal["optimal", "infeasible", "time_limit", "feasible"]:
    status, known = solver.getModelStatus(), highspy.HighsModelStatus
    if status == known.kOptimal:
        return "optimal"
    if status in (known.kInfeasible, known.kUnboundedOrInfeasible):  # all columns are bounded, so the second is the first
        return "infeasible"
    if status == known.kTimeLimit:
        return "time_limit"
    if status == known.kSolutionLimit:
        return "feasible"
    raise SolverError(f"HiGHS ended with {solver.modelStatusToString(status)!r}")


def _solution(part: Indices, chosen: Sequence[int]) -> highspy.HighsSolution:
    """Return a choice as a point from which the search starts, and which it need only prove or improve."""
    solution = highspy.HighsSolution()
    solution.col_value = np.isin(part, chosen).astype(float).tolist()
    return solution


def _chosen(solver: highspy.Highs, kept: Indices, program: Program) -> tuple[int, ...]:
    values = np.array(solver.getSolution().col_value[: len(kept)])
    chosen = [int(i) for i in kept[values > 0.5]]
    return tuple(sorted(chosen, key=lambda i: program.items[i].layers))


def _least_per_layer(program: Program, costs: Floats) -> tuple[float, Floats]:
    """Return the sum over the layers of the least cost a layer, and each item's part of it; infinite for a bare layer."""
    counts = np.array([len(item.layers) for item in program.items])
    layers = np.concatenate([item.layers for item in program.items]).astype(np.int64)
    least = np.full(program.num_layers, np.inf)
    np.minimum.at(least, layers, np.repeat(costs / counts, counts))
    return float(least.sum()), np.add.reduceat(least[layers], np.r_[0, np.cumsum(counts)[:-1]])


def _cut_off(program: Program, chosen: Sequence[int]) -> Program:
    """Return the program with one row more, which only this very choice breaks."""
    coefficients = np.zeros(len(program.items))
    coefficients[list(chosen)] = 1.0
    row = Row("not again", coefficients, upper=len(chosen) - 1)
    return Program(program.num_layers, program.items, (*program.rows, row), program.max_distinct)
