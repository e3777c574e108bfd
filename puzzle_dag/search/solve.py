"""The search: for a scenario, the architecture of least summed score that meets every constraint, proven."""

import logging
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

from puzzle_dag.architecture import Architecture, Block
from puzzle_dag.config import Scenario
from puzzle_dag.piece_costs import PieceCosts
from puzzle_dag.search.candidates import Candidates, ScoreTable
from puzzle_dag.search.infeasible import InfeasibleScenarioError, explain
from puzzle_dag.search.limits import Limit, all_measures, make_measure, scenario_limits, solved_batches, target_costs
from puzzle_dag.search.program import GAP, Outcome, SolverError, minimise
from puzzle_dag.search.solution import BatchOutcome, Choice, LimitReport, Solution
from puzzle_dag.store import fingerprint

VERSION = 1
_log = logging.getLogger(__name__)

__all__ = ["VERSION", "InfeasibleScenarioError", "Solution", "describe_architecture", "solve_scenario"]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def describe_architecture(architecture: Architecture, costs: PieceCosts, batch: int) -> dict[str, float | None]:
    """Return every quantity of an architecture at a batch size of a target; None for an infinite throughput."""
    return {measure.name: _finite(measure.of(architecture)) for measure in all_measures(costs, batch)}


def report_limit(limit: Limit, architecture: Architecture, parent: Architecture) -> LimitReport:
    """Return a limit together with the values that an architecture and the parent have there."""
    measure = limit.measure
    return LimitReport(
        name=limit.name,
        target=measure.costs.target,
        batch=measure.batch,
        length=measure.length if limit.name == "memory_bytes" else None,
        at_least=None if limit.at_least is None else float(limit.at_least),
        at_most=None if limit.at_most is None else float(limit.at_most),
        value=measure.of(architecture),
        parent_value=measure.of(parent),
    )


def _throughput(candidates: Candidates, costs: PieceCosts, batch: int, outcome: Outcome) -> float:
    return make_measure("throughput_tokens_per_s", costs, batch).of(candidates.architecture(outcome.chosen))


def keep_batch(candidates: Candidates, costs: PieceCosts, outcomes: Mapping[int, Outcome]) -> int:
    """Return the batch size to keep: least objective; among those within the proven gap of it, highest throughput."""
    found = {b: o for b, o in outcomes.items() if o.chosen}
    least = min(outcome.objective for outcome in found.values())
    tied = [b for b, o in found.items() if o.objective <= least + GAP * abs(least)]
    return max(tied, key=lambda b: (_throughput(candidates, costs, b, found[b]), -b))


def _batch_outcome(candidates: Candidates, costs: PieceCosts, batch: int, outcome: Outcome) -> BatchOutcome:
    if not outcome.chosen:
        return BatchOutcome(batch, outcome.status, None, None, outcome.seconds, None)
    throughput = _finite(_throughput(candidates, costs, batch, outcome))
    return BatchOutcome(batch, outcome.status, outcome.objective, _finite(outcome.bound), outcome.seconds, throughput)


def build_solution(
    scenario: Scenario,
    candidates: Candidates,
    costs: PieceCosts,
    *,
    batch: int,
    limits: Sequence[Limit],
    outcomes: Mapping[int, Outcome],
    seconds: float,
    notes: Mapping[str, Any] | None = None,
) -> Solution:
    """Return the solution that the outcome at `batch` stands for; `limits` are those at that batch size."""
    outcome, parent, scores = outcomes[batch], candidates.parent, candidates.costs(scenario.objective)
    architecture = candidates.architecture(outcome.chosen)
    choices = tuple(
        Choice(s.layer, s.block, float(scores[i]), s.digest) for i, s in ((i, candidates.scores[i]) for i in outcome.chosen)
    )
    best = max(make_measure("throughput_tokens_per_s", costs, b).of(parent) for b in costs.batch_sizes)
    return Solution(
        scenario=scenario.name,
        target=scenario.target,
        status=outcome.status,
        minimized=scenario.objective.minimize,
        objective=candidates.exact_sum(scores, outcome.chosen),
        bound=_finite(outcome.bound),
        gap=_finite(outcome.gap),
        batch=batch,
        choices=choices,
        predicted=describe_architecture(architecture, costs, batch),
        parent={**describe_architecture(parent, costs, batch), "parent_best_throughput_tokens_per_s": _finite(best)},
        limits=tuple(report_limit(limit, architecture, parent) for limit in limits),
        batches=tuple(_batch_outcome(candidates, costs, b, o) for b, o in sorted(outcomes.items())),
        seconds=seconds,
        digest=fingerprint([[c.layer, c.block, c.digest] for c in choices]),
        notes=dict(notes or {}),
    )


def solve_scenario(
    scores: ScoreTable,
    costs: Mapping[str, PieceCosts],
    scenario: Scenario,
    parent_block: Block,
    *,
    time_limit_s: float = 600.0,
) -> Solution:
    """Find the architecture of least summed score that meets a scenario's constraints (Puzzle, section 4.3).

    The summed score is an estimate of the child's; every batch size is an integer program of its own, solved by
    HiGHS to a relative gap of 1e-6 or better, and its result is re-checked in exact arithmetic.

    Args:
        scores: of every layer's blocks, layer by layer, the parent's own among them.
        costs: target name -> costs of the pieces.
        scenario: what is to be met and minimised.
        parent_block: the parent's own block.
        time_limit_s: for each batch size; after it the best found is kept with the status "time_limit".

    Returns:
        The solution; of several batch sizes the one with the least objective, then with the highest throughput.

    Raises:
        ScenarioError: a target or batch size that was not measured, a variant without cost or score.
        InfeasibleScenarioError: nothing meets the constraints; names which, and the best value that can be had.
        SolverError: the solver failed, or ran out of time before it found anything.
    """
    return solve_candidates(Candidates.of(scores, parent_block), costs, scenario, time_limit_s=time_limit_s)


def solve_candidates(
    candidates: Candidates, costs: Mapping[str, PieceCosts], scenario: Scenario, *, time_limit_s: float = 600.0
) -> Solution:
    """Solve as `solve_scenario` does, for candidates that several scenarios or bounds share."""
    start = time.monotonic()
    own = target_costs(scenario.target, costs)
    values = candidates.costs(scenario.objective)
    batches = solved_batches(scenario, own)
    limits = {batch: scenario_limits(scenario, costs, batch, candidates.parent) for batch in batches}
    outcomes: dict[int, Outcome] = {}
    for batch in batches:
        outcomes[batch] = minimise(
            candidates.program(limits[batch]), values, is_met=candidates.meets(limits[batch]), time_limit_s=time_limit_s
        )
        _log.info("%s, batch %d: %s in %.2f s", scenario.name, batch, outcomes[batch].status, outcomes[batch].seconds)
    if not any(o.chosen for o in outcomes.values()):
        if any(o.status == "time_limit" for o in outcomes.values()):
            raise SolverError(f"scenario {scenario.name}: nothing found in {time_limit_s:g} s; raise the time limit or loosen a constraint")
        raise explain(scenario.name, candidates, limits)
    batch = keep_batch(candidates, own, outcomes)
    return build_solution(
        scenario, candidates, own, batch=batch, limits=limits[batch], outcomes=outcomes, seconds=time.monotonic() - start
    )
