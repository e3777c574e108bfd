"""The frontier: the least score that each value of one bound allows, swept over a range, the parent among the points."""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from puzzle_dag.architecture import Block
from puzzle_dag.config import Bound, ConstraintName, Scenario
from puzzle_dag.piece_costs import PieceCosts
from puzzle_dag.progress import Progress, silent
from puzzle_dag.search.candidates import ScoreTable
from puzzle_dag.search.limits import ScenarioError, make_measure, target_costs
from puzzle_dag.search.problem import Memory, Problem, is_met, keep_point, solve_points
from puzzle_dag.search.solution import Solution
from puzzle_dag.search.solve import build_solution, describe_architecture, prepare

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FrontierPoint:
    """One point: a bound and the best that it allows.

    Attributes:
        bound: value of the swept bound, as the scenario writes it; None for the parent.
        objective: summed score; 0 for the parent.
        batch: batch size of the solution; for the parent that of its best throughput.
        values: every quantity at that batch size.
        solution: the whole solution; None for the parent.
    """

    bound: float | None
    objective: float
    batch: int
    values: Mapping[str, float | None]
    solution: Solution | None

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON types, the architecture as block names."""
        return {
            "bound": self.bound,
            "objective": self.objective,
            "batch": self.batch,
            "values": dict(self.values),
            "architecture": None if self.solution is None else [c.block for c in self.solution.choices],
        }


def with_bound(scenario: Scenario, constraint: ConstraintName, value: float) -> Scenario:
    """Return the scenario with another value of a constraint's one bound. Raises ScenarioError where it has none or two."""
    bound = scenario.constraints.get(constraint)
    if not isinstance(bound, Bound) or (bound.at_least is None) == (bound.at_most is None):
        raise ScenarioError(f"scenario {scenario.name}: constraints.{constraint} must have one bound, at_least or at_most, to be swept")
    side = "at_least" if bound.at_most is None else "at_most"
    swept = bound.model_copy(update={side: value})
    return scenario.model_copy(update={"constraints": {**scenario.constraints, constraint: swept}})


def sweep(
    scores: ScoreTable,
    costs: Mapping[str, PieceCosts],
    scenario: Scenario,
    parent_block: Block,
    *,
    constraint: ConstraintName,
    values: Sequence[float],
    earlier: Mapping[str, Scenario] | None = None,
    time_limit_s: float = 600.0,
    progress: Progress = silent,
) -> list[FrontierPoint]:
    """Solve a scenario at each value of one of its bounds, the others as they are.

    Args:
        scores: as `solve_scenario`.
        costs: as `solve_scenario`.
        scenario: what is swept; must bound `constraint` on one side.
        parent_block: the parent's own block.
        constraint: whose bound is swept.
        values: the bound's values, relative to the parent where the scenario's bound is.
        earlier: as `solve_scenario`.
        time_limit_s: for each program.
        progress: told the values done.

    Returns:
        The parent, then one point for each value that can be met, in the order of `values`. A value that can't be
        met gives no point; a log line says so.

    Raises:
        ScenarioError: as `solve_scenario`, or the scenario does not bound the constraint on one side.
    """
    points = [parent_point(target_costs(scenario.target, costs), parent_block, len(scores))]
    candidates = prepare(scores, costs, scenario, parent_block, earlier=earlier)
    memory = Memory()
    for done, value in enumerate(values, start=1):
        start, problem = time.monotonic(), Problem.of(with_bound(scenario, constraint, value), candidates, costs)
        outcomes = solve_points(problem, time_limit_s=time_limit_s, memory=memory, only_best=True)
        if not is_met(outcomes):
            _log.info("%s: no architecture meets %s %g", scenario.name, constraint, value)
        else:
            solution = build_solution(problem, outcomes, keep_point(problem, outcomes), seconds=time.monotonic() - start)
            points.append(FrontierPoint(value, solution.objective, solution.batch, solution.predicted, solution))
        progress(done, len(values), "points")
    return points


def parent_point(costs: PieceCosts, parent_block: Block, num_layers: int) -> FrontierPoint:
    """Return the parent as a point, at the batch size of its highest throughput."""
    parent = (parent_block,) * num_layers
    batch = max(costs.batch_sizes, key=lambda b: make_measure("throughput_tokens_per_s", costs, b).of(parent))
    return FrontierPoint(None, 0.0, batch, describe_architecture(parent, costs, batch), None)
