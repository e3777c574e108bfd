"""The integer program behind every search: one item for each layer, least cost, linear rows; solved by HiGHS to a proven gap.

An item covers one layer, or a run of layers at once. Two exact reductions make it fast: an item that is no better
than another in anything is left out, and so are items whose reduced cost in the linear relaxation shows that no
solution as good as the one found can hold them; the bound that is returned accounts for both.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import highspy
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]

GAP = 1e-6
"""Relative gap between objective and bound that counts as proven."""
_TOLERANCE = 1e-9
_FIRST_ITEMS_PER_LAYER = 1.6
_MOST_EXACT_CUTS = 200


class SolverError(RuntimeError):
    """The solver ended in a state that says nothing about the program."""


@dataclass(frozen=True, slots=True)
class Item:
    """A choice: what it is called and the layers that it covers (several for a replacement of a run of layers).

    `more_names` are further names that it brings along where names are counted: a run may put several blocks into its layers.
    """

    name: str
    layers: tuple[int, ...]
    more_names: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """All names that it brings along."""
        return (self.name, *self.more_names)


@dataclass(frozen=True, slots=True)
class Row:
    """A linear condition: lower <= sum of the chosen items' coefficients <= upper, infinities where there is no bound."""

    name: str
    coefficients: Floats
    lower: float = -np.inf
    upper: float = np.inf


@dataclass(frozen=True, slots=True)
class Program:
    """Cover each of `num_layers` layers by exactly one chosen item, meet the rows, at most `max_distinct` names."""

    num_layers: int
    items: Sequence[Item]
    rows: tuple[Row, ...] = ()
    max_distinct: int | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a solve ended: `chosen` are item indices in layer order, `bound` is a proven lower bound of the objective.

    "feasible" is the status of a choice that meets the rows and that nothing is proven of (a baseline's); its bound is NaN.
    """

    status: Literal["optimal", "infeasible", "time_limit", "feasible"]
    chosen: tuple[int, ...] = ()
    objective: float = np.nan
    bound: float = np.nan
    seconds: float = 0.0

    @property
    def gap(self) -> float:
        """Return (objective - bound) / |objective|, absolute where the objective is 0; NaN where nothing was proven."""
        return (self.objective - min(self.bound, self.objective)) / (abs(self.objective) or 1.0)


def drop_dominated(program: Program, costs: Floats) -> Indices:
    """Return the indices of the items that are kept: none is worse or equal in cost and every row than another.

    An item may be exchanged for one that covers the same layers, costs no more, and can't break a row that held:
    not more in a row with an upper bound, not less in one with a lower bound, the same where both are given. Of
    equal items the first is kept. Not valid where names count (`max_distinct`), so nothing is dropped then.
    """
    if program.max_distinct is not None:
        return np.arange(len(program.items))
    measures = [costs]
    for row in program.rows:
        if np.isfinite(row.upper):
            measures.append(row.coefficients)
        if np.isfinite(row.lower):
            measures.append(-row.coefficients)
    table = np.column_stack(measures)
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, item in enumerate(program.items):
        groups.setdefault(item.layers, []).append(index)
    kept: list[int] = []
    for members in groups.values():
        part = table[members]
        no_worse = (part[:, None, :] <= part[None, :, :]).all(-1)
        earlier = np.tri(len(members), dtype=bool, k=-1).T
        beaten: NDArray[np.bool_] = np.any(no_worse & (~no_worse.T | earlier), axis=0)
        kept += [m for m, b in zip(members, beaten, strict=True) if not b]
    return np.array(sorted(kept), dtype=np.int64)


def _scaled(row: Row) -> tuple[Floats, float, float]:
    """Return the row divided by its largest number, so that the solver's tolerance is relative."""
    bounds = [abs(b) for b in (row.lower, row.upper) if np.isfinite(b)]
    scale = max([float(np.abs(row.coefficients).max(initial=0.0)), *bounds]) or 1.0
    return row.coefficients / scale, row.lower / scale, row.upper / scale


@dataclass(slots=True)
class _Matrix:
    """The program's columns, ready for HiGHS; restricted to some of the items for each solve."""

    program: Program
    scaled: list[tuple[Floats, float, float]]
    names: list[str] = field(default_factory=list)

    @staticmethod
    def of(program: Program) -> "_Matrix":
        names = sorted({name for item in program.items for name in item.names}) if program.max_distinct is not None else []
        return _Matrix(program, [_scaled(row) for row in program.rows], names)

    def model(self, kept: Indices, costs: Floats, *, integer: bool) -> highspy.HighsLp:
        """Return the program over the items `kept`, with one further column for each name where names are counted."""
        program, num_layers, infinity = self.program, self.program.num_layers, highspy.kHighsInf
        covers = [program.items[i].layers for i in kept]
        columns = np.repeat(np.arange(len(kept)), [len(layers) for layers in covers])
        table = [np.column_stack([columns, np.concatenate(covers), np.ones(len(columns))])]
        lower, upper = [1.0] * num_layers, [1.0] * num_layers
        for coefficients, low, high in self.scaled:
            used = np.flatnonzero(coefficients[kept])
            table.append(np.column_stack([used, np.full(len(used), len(lower)), coefficients[kept][used]]))
            lower.append(low if np.isfinite(low) else -infinity)
            upper.append(high if np.isfinite(high) else infinity)
        if self.names:
            named = self._name_rows(kept, len(lower))
            table += named
            lower += [-infinity] * (len(named[0]) + 1)
            upper += [0.0] * len(named[0]) + [float(program.max_distinct or 0)]
        all_costs = np.r_[costs[kept], np.zeros(len(self.names))]
        return self._assemble(np.concatenate(table), np.array(lower), np.array(upper), all_costs, integer)

    def _name_rows(self, kept: Indices, first_row: int) -> list[Floats]:
        """Return the rows x <= used[name], one a name of an item, and the row that counts the used names."""
        column_of = {name: len(kept) + i for i, name in enumerate(self.names)}
        named = np.array([(k, column_of[name]) for k, i in enumerate(kept) for name in self.program.items[i].names])
        rows = first_row + np.arange(len(named))
        counted = np.array(list(column_of.values()))
        return [
            np.column_stack([named[:, 0], rows, np.ones(len(named))]),
            np.column_stack([named[:, 1], rows, -np.ones(len(named))]),
            np.column_stack([counted, np.full(len(counted), first_row + len(named)), np.ones(len(counted))]),
        ]

    @staticmethod
    def _assemble(table: Floats, lower: Floats, upper: Floats, costs: Floats, integer: bool) -> highspy.HighsLp:
        """Return the HiGHS model of a table of (column, row, value)."""
        table = table[np.lexsort((table[:, 1], table[:, 0]))]
        num_columns = len(costs)
        lp = highspy.HighsLp()
        lp.num_col_, lp.num_row_ = num_columns, len(lower)
        lp.col_cost_, lp.col_lower_, lp.col_upper_ = costs, np.zeros(num_columns), np.ones(num_columns)
        lp.row_lower_, lp.row_upper_ = lower, upper
        lp.a_matrix_.format_ = highspy.MatrixFormat.kColwise
        lp.a_matrix_.start_ = np.searchsorted(table[:, 0], np.arange(num_columns + 1)).astype(np.int32)
        lp.a_matrix_.index_, lp.a_matrix_.value_ = table[:, 1].astype(np.int32), table[:, 2]
        if integer:
            lp.integrality_ = [highspy.HighsVarType.kInteger] * num_columns
        return lp


def _run(lp: highspy.HighsLp, time_limit_s: float) -> highspy.Highs:
    solver = highspy.Highs()
    for name, value in {
        "output_flag": False,
        "threads": 1,  # more threads, and the answer among equals may change from run to run
        "random_seed": 0,
        "mip_rel_gap": 0.0,
        "mip_abs_gap": _TOLERANCE,  # of costs that are scaled to a total near 1
        "primal_feasibility_tolerance": _TOLERANCE,
        "dual_feasibility_tolerance": _TOLERANCE,
        "mip_feasibility_tolerance": _TOLERANCE,
        "time_limit": max(0.01, time_limit_s),
        # Few items are left when the search starts, so hunting for a first solution costs more than it saves.
        "mip_heuristic_run_feasibility_jump": False,
        "mip_heuristic_run_rens": False,
        "mip_heuristic_run_rins": False,
        "mip_detect_symmetry": False,
        "mip_allow_restart": False,
    }.items():
        solver.setOptionValue(name, value)
    solver.passModel(lp)
    solver.run()
    return solver


def _state(solver: highspy.Highs) -> Literal["optimal", "infeasible", "time_limit"]:
    status, known = solver.getModelStatus(), highspy.HighsModelStatus
    if status == known.kOptimal:
        return "optimal"
    if status in (known.kInfeasible, known.kUnboundedOrInfeasible):  # all columns are bounded, so the second is the first
        return "infeasible"
    if status == known.kTimeLimit:
        return "time_limit"
    raise SolverError(f"HiGHS ended with {solver.modelStatusToString(status)!r}")


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


def _minimise_floats(program: Program, costs: Floats, deadline_s: float) -> Outcome:
    """Solve in floating point. The costs are shifted by each layer's least, so that only differences are rounded."""
    matrix, kept = _Matrix.of(program), drop_dominated(program, costs)
    base, shifts = _least_per_layer(program, costs)
    if not np.isfinite(base):
        return Outcome("infeasible")  # a layer that no item covers
    shifted = costs - shifts
    scale = float(shifted[kept].max()) or 1.0
    relaxed = _run(matrix.model(kept, shifted / scale, integer=False), deadline_s - time.monotonic())
    if (state := _state(relaxed)) != "optimal":
        return Outcome(state)
    least = relaxed.getInfo().objective_function_value * scale
    reduced = np.array(relaxed.getSolution().col_dual[: len(kept)]) * scale
    num_kept = int(_FIRST_ITEMS_PER_LAYER * program.num_layers)
    slack = float(np.sort(reduced)[num_kept]) if num_kept < len(kept) else np.inf
    while True:
        # An item whose reduced cost is above `slack` is in no solution below least + slack.
        part = kept[reduced <= slack]
        mip_scale = least if least > 1e-6 * scale else scale
        solver = _run(matrix.model(part, shifted / mip_scale, integer=True), deadline_s - time.monotonic())
        state, info = _state(solver), solver.getInfo()
        found = info.primal_solution_status == highspy.SolutionStatus.kSolutionStatusFeasible
        if state == "time_limit":
            return Outcome(state, _chosen(solver, part, program) if found else (), bound=least + base)
        if state == "infeasible" and len(part) == len(kept):
            return Outcome(state)
        if state == "optimal":
            objective = info.objective_function_value * mip_scale
            bound = min(info.mip_dual_bound * mip_scale, objective)
            if len(part) == len(kept) or objective <= least + slack:
                return Outcome(state, _chosen(solver, part, program), bound=bound + base)
            slack = max(slack, objective - least) + _TOLERANCE * scale
        else:
            num_kept *= 4
            slack = float(np.sort(reduced)[num_kept]) if num_kept < len(kept) else np.inf


def _cut_off(program: Program, chosen: Sequence[int]) -> Program:
    """Return the program with one row more, which only this very choice breaks."""
    coefficients = np.zeros(len(program.items))
    coefficients[list(chosen)] = 1.0
    row = Row("not again", coefficients, upper=len(chosen) - 1)
    return Program(program.num_layers, program.items, (*program.rows, row), program.max_distinct)


def minimise(
    program: Program,
    costs: Floats,
    *,
    is_met: Callable[[tuple[int, ...]], bool] = lambda chosen: True,
    time_limit_s: float = 600.0,
) -> Outcome:
    """Find the items of least total cost, proven within a relative gap of 1e-6.

    Args:
        program: what is chosen from, and the conditions.
        costs: one for each item; may be negative.
        is_met: re-checks a choice in exact arithmetic. The solver knows the rows up to a tolerance of 1e-9; a choice
            that breaks one by less is cut off and the next best is found.
        time_limit_s: when to stop; the best choice so far is returned with the status "time_limit".

    Raises:
        SolverError: the solver failed, or hundreds of choices lie within rounding of a limit.
    """
    start = time.monotonic()
    for _ in range(_MOST_EXACT_CUTS):
        outcome = _minimise_floats(program, costs, start + time_limit_s)
        if not outcome.chosen or is_met(outcome.chosen):
            objective = float(sum(costs[i] for i in outcome.chosen)) if outcome.chosen else np.nan
            return Outcome(outcome.status, outcome.chosen, objective, min(outcome.bound, objective), time.monotonic() - start)
        program = _cut_off(program, outcome.chosen)
    raise SolverError(f"{_MOST_EXACT_CUTS} choices lie within rounding of a limit without meeting it; move the limit a little")
