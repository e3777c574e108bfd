"""Why a scenario can't be met, told: the smallest set of conflicting constraints, and how near one can come."""

from collections.abc import Mapping, Sequence

import numpy as np

from puzzle_dag.search.conflict import STRUCTURE, Conflict, Feasibility, LimitT, Searchable, explain_conflict
from puzzle_dag.search.limits import ScenarioError


class InfeasibleScenarioError(ScenarioError):
    """No architecture meets a scenario's constraints.

    Attributes:
        constraint: the constraint that comes nearest to being met; None where the structure alone allows nothing.
        best_value: the best that it can be while the others are met, in its own unit.
        batch: the batch size at which that is, on the scenario's own target.
        batches: the batch sizes on all targets, the scenario's own first.
        conflicting: a smallest set of constraints that can't be met together at these batch sizes; "structure" may be one.
        nearest: best reachable value of each constraint in `conflicting`, the others met; the structure has none.
        rows: the same as rows for people: constraint, what is asked, the best that can be had, what is met then.
    """

    def __init__(self, scenario: str, batches: Mapping[str, int], conflict: Conflict[LimitT]) -> None:
        nearest = sorted(conflict.nearest, key=lambda n: n.shortfall)
        self.constraint: str | None = nearest[0].limit.name if nearest else None
        self.best_value: float | None = nearest[0].value if nearest else None
        self.batches = dict(batches)
        self.batch = next(iter(self.batches.values()))
        self.conflicting = conflict.names
        self.nearest: Mapping[str, float] = {n.limit.name: n.value for n in conflict.nearest}
        rows: list[dict[str, str | float | None]] = [
            {"constraint": n.limit.name, "asked": n.limit.describe(), "best": n.value, "while met": ", ".join(n.others)}
            for n in conflict.nearest
        ]
        if conflict.structure:
            rows.append({"constraint": STRUCTURE, "asked": conflict.structure, "best": None, "while met": ""})
        self.rows = tuple(rows)
        super().__init__(" ".join([self._where(scenario, conflict), *self._lines(conflict)]))

    def _where(self, scenario: str, conflict: Conflict[LimitT]) -> str:
        if not conflict.limits:
            words = conflict.structure or "fixed, forbidden or counted blocks, difference"
            return f"scenario {scenario}: its structure ({words}) allows no architecture."
        elsewhere = "".join(f", {b} on {target}" for target, b in list(self.batches.items())[1:])
        return f"scenario {scenario}: no architecture meets it, at any batch size; the nearest is batch {self.batch}{elsewhere}."

    def _lines(self, conflict: Conflict[LimitT]) -> list[str]:
        lines = []
        for n in sorted(conflict.nearest, key=lambda n: n.shortfall):
            met = f" with {', '.join(n.others)} met" if n.others else ""
            best = "the best value" if n.is_proven else "the best value that was found in time"
            lines.append(f"{n.limit.describe()} can't be met: {best}{met} is {n.value:.6g}.")
        if conflict.limits and conflict.structure:
            lines.append(f"The structure asks for {conflict.structure}.")
        if len(conflict.names) > 1:
            lines.append(f"Each of {', '.join(conflict.names)} could be met without the others; loosen one of them.")
        return lines


def explain(
    scenario: str, candidates: Searchable[LimitT], points: Sequence[tuple[Mapping[str, int], Sequence[LimitT]]]
) -> InfeasibleScenarioError:
    """Return the error of a scenario that is infeasible at every point, told at the one that comes nearest.

    Args:
        scenario: its name.
        candidates: what was searched.
        points: batch sizes by target, and the limits there.
    """
    feasibility = Feasibility(candidates)
    explained = [(batches, explain_conflict(feasibility, limits)) for batches, limits in points]
    return InfeasibleScenarioError(scenario, *min(explained, key=lambda e: min((n.shortfall for n in e[1].nearest), default=np.inf)))
