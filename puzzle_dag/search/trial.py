"""A trial: what a search found is run on the engine before it is trained, and the search repeated where the engine says otherwise.

Each round moves the bounds on time by how much slower (or faster) the children tried so far are than their costs say.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from puzzle_dag.architecture import Architecture
from puzzle_dag.config import Scenario
from puzzle_dag.piece_costs import PieceCosts
from puzzle_dag.search.correction import Corrections, corrected_scenario, correction_words, find_corrections
from puzzle_dag.search.infeasible import InfeasibleScenarioError
from puzzle_dag.search.points import scenario_limits
from puzzle_dag.search.solution import Solution
from puzzle_dag.search.solve import report_limit
from puzzle_dag.search.timed import MeasuredBound

VERSION = 2

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Tried:
    """One child that was run."""

    round: int
    """How often the search had been repeated; 0 is what the trial began with."""
    corrections: Corrections
    """By how much its bounds were moved."""
    solution: Solution
    """As solved, with these bounds."""
    bounds: tuple[MeasuredBound, ...]
    """The bounds on time, as measured."""

    @property
    def shortfall(self) -> float:
        """The largest share by which a bound is missed; below 0 where all are met."""
        return max(b.shortfall for b in self.bounds)

    @property
    def worst(self) -> MeasuredBound:
        """The bound that is missed most, or met with least to spare."""
        return max(self.bounds, key=lambda b: b.shortfall)


@dataclass(frozen=True, slots=True)
class Trial:
    """What a trial ended with."""

    tried: tuple[Tried, ...]
    """Every child that was run, in order."""
    answer: Tried
    """The one that is kept."""
    ended: str
    """Why no other was tried, in words."""


def try_scenario(
    scenario: Scenario,
    first: Solution,
    *,
    measure: Callable[[Solution], tuple[MeasuredBound, ...]],
    search: Callable[[Scenario], Solution],
    rounds: int,
    tolerance: float,
) -> Trial:
    """Run a solution, and repeat the search until what it finds meets every bound on time.

    Args:
        scenario: as the user wrote it; one bound on time at least is measured.
        first: its solution by the costs.
        measure: runs a solution's child beside its parent, and returns the bounds on time.
        search: solves a scenario. May raise InfeasibleScenarioError; the trial then ends with what it has.
        rounds: how often the search may be repeated.
        tolerance: share by which a measured quantity may miss its bound.
    """
    tried, may_loosen = [_run(0, {}, first, measure, tolerance)], set[int]()
    ended = f"the search was repeated {rounds} times"
    for number in range(rounds + 1):
        last = tried[-1]
        loose = {b.asked.index for b in last.bounds if b.may_loosen(tolerance)}
        if last.shortfall <= tolerance and not loose:
            ended = f"every bound on time is met within {100 * tolerance:g} %"
            break
        if number == rounds:
            break
        may_loosen |= loose
        corrections = find_corrections([t.bounds for t in tried], may_loosen=may_loosen)
        try:
            found = search(corrected_scenario(scenario, corrections))
        except InfeasibleScenarioError as error:
            ended = f"{correction_words(scenario, corrections)}, nothing meets it: {error}"
            break
        if any(_is_same(found, t.solution) for t in tried):
            ended = "the search found an architecture that was tried already"
            break
        tried.append(_run(number + 1, corrections, found, measure, tolerance))
    return Trial(tuple(tried), choose(tried, scenario, tolerance), ended)


def _run(
    number: int, corrections: Corrections, solution: Solution, measure: Callable[[Solution], tuple[MeasuredBound, ...]], tolerance: float
) -> Tried:
    tried = Tried(number, corrections, solution, measure(solution))
    worst = tried.worst
    words = "met" if worst.is_met(tolerance) else "missed"
    _log.info(
        "%s, round %d: %s is %.4g in %d turns, asked for %s: %s",
        solution.scenario,
        number,
        worst.asked.name,
        worst.measured,
        worst.num_turns,
        worst.asked.bound.words,
        words,
    )
    return tried


def _is_same(left: Solution, right: Solution) -> bool:
    return left.digest == right.digest and dict(left.batch_sizes) == dict(right.batch_sizes)


def choose(tried: Sequence[Tried], scenario: Scenario, tolerance: float) -> Tried:
    """Return of all children that meet every bound within the tolerance the best by the objective; where none does, the nearest."""
    met = [t for t in tried if t.shortfall <= tolerance]
    return min(met, key=lambda t: _loss(t.solution, scenario)) if met else min(tried, key=lambda t: t.shortfall)


def _loss(solution: Solution, scenario: Scenario) -> float:
    """Return a number that is the lower the better: the objective, or the optimised quantity as the costs predict it."""
    if scenario.objective.quantity is None:
        return solution.objective
    value: float | None = solution.notes["value"]
    if scenario.objective.quantity == "throughput_tokens_per_s":
        return float("-inf") if value is None else -value
    return float("inf") if value is None else value


def as_asked(solution: Solution, scenario: Scenario, costs: Mapping[str, PieceCosts], parent: Architecture) -> Solution:
    """Return a solution whose constraints are told as the user wrote them, whatever bounds it was solved with."""
    limits = scenario_limits(scenario, costs, solution.batch_sizes, parent)
    return replace(solution, limits=tuple(report_limit(limit, solution.architecture, parent) for limit in limits))


def trial_words(trial: Trial, scenario: Scenario, tolerance: float) -> str:
    """Return in words what the answer was solved with and what the engine said of it."""
    shortfall, number, within = trial.answer.shortfall, len(trial.tried), f"meets every bound on time within {100 * tolerance:g} %"
    said = f"its child {within} on the engine"
    if shortfall > tolerance:
        said = f"none of {number} children tried {within}; this one misses one by {100 * shortfall:.1f} %"
    return "; ".join(part for part in (correction_words(scenario, trial.answer.corrections), said, f"ended: {trial.ended}") if part)


def trial_rows(trial: Trial, scenario: Scenario, tolerance: float) -> list[dict[str, Any]]:
    """Return a row a child and bound: what was asked, solved for, predicted and measured."""
    return [_row(tried, found, trial, scenario, tolerance) for tried in trial.tried for found in tried.bounds]


def _row(tried: Tried, found: MeasuredBound, trial: Trial, scenario: Scenario, tolerance: float) -> dict[str, Any]:
    asked, solved = found.asked, corrected_scenario(scenario, tried.corrections)
    return {
        "scenario": scenario.name,
        "round": tried.round,
        "target": asked.target,
        "constraint": asked.name,
        "batch": asked.batch,
        "parent_batch": asked.parent_batch,
        "asked": asked.bound.words,
        "solved_for": solved.bounds[asked.index][1].words,
        "predicted": asked.predicted,
        "measured": found.measured,
        "low": found.low,
        "high": found.high,
        "num_turns": found.num_turns,
        "measured_over_asked": found.over_asked,
        "verdict": "met" if found.is_met(tolerance) else "missed",
        "objective": tried.solution.objective,
        "is_answer": tried is trial.answer,
        "blocks": " ".join(c.block for c in tried.solution.choices),
    }
