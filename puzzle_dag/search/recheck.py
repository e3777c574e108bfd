"""A scenario's solutions held against all that was asked, added up again from the scores and costs and not from the solver."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from puzzle_dag.architecture import Block
from puzzle_dag.config import Scenario
from puzzle_dag.piece_costs import PieceCosts
from puzzle_dag.search.candidates import AnyLimit, Candidates, ScoreTable, num_different_layers, placed_digests
from puzzle_dag.search.goal import quality_budgets
from puzzle_dag.search.limits import ScenarioError
from puzzle_dag.search.points import scenario_limits
from puzzle_dag.search.solution import LimitReport, Solution
from puzzle_dag.search.solve import earlier_answers, report_limit
from puzzle_dag.search.structure import Structure


@dataclass(frozen=True, slots=True)
class Recheck:
    """What adding up again gave.

    Attributes:
        wrong: what is not as it must be, in words; empty where all holds.
        limits: the constraints with the best solution's values; empty where it is made of what is unknown.
    """

    wrong: tuple[str, ...]
    limits: tuple[LimitReport, ...]


def recheck_solutions(
    scores: ScoreTable,
    costs: Mapping[str, PieceCosts],
    scenario: Scenario,
    parent_block: Block,
    solutions: Sequence[Solution],
    *,
    earlier: Mapping[str, Scenario] | None = None,
    is_refined: bool = False,
) -> Recheck:
    """Hold a pool of solutions, the best first, against the scenario that they are of.

    What must hold of each: it is made of what was scored, at a batch size that may serve; the structure allows it; costs and
    summed scores lie within every bound and budget, in exact arithmetic; the objective is what the scores add up to, and not
    below the proven bound. Any two differ in as many layers as the pool asks for.

    Args:
        scores: as `solve_scenario`.
        costs: as `solve_scenario`.
        scenario: what was asked.
        parent_block: as `solve_scenario`.
        solutions: of the scenario.
        earlier: as `solve_scenario`; the scenarios that must be differed from are solved again.
        is_refined: whether the solutions are refinements: their objective is measured, and `different_from` holds between what
            the searches found.

    Raises:
        ScenarioError: as `solve_scenario`, where the scenario itself means nothing.
    """
    candidates = Candidates.of(scores, parent_block)
    others = () if is_refined else earlier_answers(scores, costs, scenario, parent_block, earlier=earlier)
    structure = Structure.of(scenario.structure, candidates, others)
    wrong, limits = list[str](), tuple[LimitReport, ...]()
    for rank, solution in enumerate(solutions, start=1):
        try:
            own = _recheck_one(candidates, costs, scenario, structure, solution, is_refined=is_refined)
        except ScenarioError as error:
            wrong.append(f"solution {rank}: {error}")
            continue
        wrong += [f"solution {rank}: {fault}" for fault in own.wrong]
        limits = limits or own.limits
        for before, other in enumerate(solutions[: rank - 1], start=1):
            num_different = num_different_layers(solution.architecture, other.architecture)
            if num_different < scenario.pool.min_different_layers:
                wrong.append(f"solutions {before} and {rank} differ in {num_different} layers, not {scenario.pool.min_different_layers}")
    return Recheck(tuple(wrong), limits)


def _recheck_one(
    candidates: Candidates,
    costs: Mapping[str, PieceCosts],
    scenario: Scenario,
    structure: Structure,
    solution: Solution,
    *,
    is_refined: bool,
) -> Recheck:
    chosen = _find_items(candidates, solution)
    architecture = candidates.architecture(chosen)
    wrong = structure.broken_by(architecture)
    if not scenario.allows_batch(solution.batch):
        wrong.append(f"batch {solution.batch} is none that may serve")
    limits = scenario_limits(scenario, costs, solution.batch_sizes, candidates.parent)
    asked: tuple[AnyLimit, ...] = (*limits, *quality_budgets(scenario.objective))
    for limit in asked:
        total = candidates.total(limit, chosen)
        if not limit.is_met(total):
            wrong.append(f"{limit.name} is {float(limit.value(total)):.6g}; asked for {limit.describe()}")
    if not is_refined:
        objective = candidates.exact_sum(candidates.costs(scenario.objective), chosen)
        if objective != solution.objective or (solution.bound is not None and solution.bound > objective):
            wrong.append(f"{solution.minimized} is {objective}, not {solution.objective} (bound {solution.bound})")
    return Recheck(tuple(wrong), tuple(report_limit(limit, architecture, candidates.parent) for limit in limits))


def _find_items(candidates: Candidates, solution: Solution) -> tuple[int, ...]:
    """Return the candidates that a solution is made of. Raises ScenarioError where there is no such one, or a layer isn't covered once."""
    known = {(score.block, tuple(placed_digests(score))): i for i, score in enumerate(candidates.scores)}
    found = []
    for _, group in groupby(solution.choices, key=lambda choice: choice.run or choice.layer):
        choices = list(group)
        name = choices[0].run or choices[0].block
        key = (name, tuple((c.layer, c.block, c.digest) for c in choices))
        if key not in known:
            raise ScenarioError(f"layer {choices[0].layer}'s {name} is none of those that were scored")
        found.append(known[key])
    layers = [layer for i in found for layer in candidates.items[i].layers]
    if layers != list(range(candidates.num_layers)):
        raise ScenarioError(f"it covers the layers {layers}, not each of {candidates.num_layers} once")
    return tuple(found)
