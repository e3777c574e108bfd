"""The integer program behind every search: one item for each layer, least cost, linear rows, as HiGHS takes it.

An item covers one layer, or a run of layers at once. An item that is no better than another in anything is left out.
`search/solver.py` solves programs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import highspy
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]

GAP = 1e-6
"""Relative gap between objective and bound that counts as proven."""


class SolverError(RuntimeError):
    """The solver ended in a state that says nothing about the program."""


@dataclass(frozen=True, slots=True)
class Item:
    """A choice: what it is called and the layers that it covers (several for a replacement of a run of layers)."""

    name: str
    layers: tuple[int, ...]


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

    "worse" says that whatever meets the rows costs more than the caller asked for. "feasible" is the status of a choice
    that meets the rows and that nothing is proven of (a baseline's); its bound is NaN.
    """

    status: Literal["optimal", "infeasible", "time_limit", "worse", "feasible"]
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


def row_scale(row: Row) -> float:
    """Return a row's largest number; rows are divided by theirs, so that the solver's tolerance is relative."""
    bounds = [abs(b) for b in (row.lower, row.upper) if np.isfinite(b)]
    return max([float(np.abs(row.coefficients).max(initial=0.0)), *bounds]) or 1.0


@dataclass(slots=True)
class Matrix:
    """The program's columns, ready for HiGHS; restricted to some of the items for each solve."""

    program: Program
    scaled: list[tuple[Floats, float, float]]
    names: list[str] = field(default_factory=list)
    scales: list[float] = field(default_factory=list)

    @staticmethod
    def of(program: Program) -> "Matrix":
        """Return the columns of a program, its rows scaled."""
        names = sorted({item.name for item in program.items}) if program.max_distinct is not None else []
        scales = [row_scale(row) for row in program.rows]
        rows = [(r.coefficients / s, r.lower / s, r.upper / s) for r, s in zip(program.rows, scales, strict=True)]
        return Matrix(program, rows, names, scales)

    def set_bounds(self, index: int, lower: float, upper: float) -> tuple[float, float]:
        """Give a row other bounds; return them as HiGHS takes them, divided by the row's scale."""
        coefficients, scale = self.scaled[index][0], self.scales[index]
        self.scaled[index] = coefficients, lower / scale, upper / scale
        return self.scaled[index][1:]

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
            table += self._name_rows(kept, len(lower))
            lower += [-infinity] * (len(kept) + 1)
            upper += [0.0] * len(kept) + [float(program.max_distinct or 0)]
        all_costs = np.r_[costs[kept], np.zeros(len(self.names))]
        return self._assemble(np.concatenate(table), np.array(lower), np.array(upper), all_costs, integer)

    def _name_rows(self, kept: Indices, first_row: int) -> list[Floats]:
        """Return the rows x <= used[name], one an item, and the row that counts the used names."""
        column_of = {name: len(kept) + i for i, name in enumerate(self.names)}
        named = np.array([column_of[self.program.items[i].name] for i in kept])
        rows = first_row + np.arange(len(kept))
        counted = np.array(list(column_of.values()))
        return [
            np.column_stack([np.arange(len(kept)), rows, np.ones(len(kept))]),
            np.column_stack([named, rows, -np.ones(len(kept))]),
            np.column_stack([counted, np.full(len(counted), first_row + len(kept)), np.ones(len(counted))]),
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
