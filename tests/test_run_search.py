"""Runs of layers in the search of a scenario: against brute force over all ways to cover the layers, with every structure there is."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from search_instances import BATCHES, PARENT, SECONDS, instances, meets, plain_bounds, plain_objective, simple_costs, simple_table

from puzzle_dag.architecture import NO_BLOCK, Architecture, Block, Run
from puzzle_dag.config import Scenario
from puzzle_dag.piece_costs import PieceCost, PieceCosts
from puzzle_dag.search.answer import answer_scenario
from puzzle_dag.search.baselines import greedy_solution, random_solution
from puzzle_dag.search.infeasible import InfeasibleScenarioError
from puzzle_dag.search.limits import ScenarioError
from puzzle_dag.search.recheck import recheck_solutions
from puzzle_dag.search.run_score import RunScore
from puzzle_dag.search.score import BlockScore
from puzzle_dag.search.solution import Solution
from puzzle_dag.search.solve import solve_scenario

Table = list[list[BlockScore]]
Cover = tuple[BlockScore, ...]


def run_score(run: Run, kl: float, *, lm_loss: float = 2.0, top1: float = 0.5) -> RunScore:
    blocks = run.blocks(PARENT)
    digests = tuple("nothing" if b == NO_BLOCK else f"fused {run.name}" for b in blocks)
    return RunScore(run.first, run.name, kl, lm_loss, top1, 64, run.name, {}, tuple(b.name for b in blocks), digests)


def blocks_of(score: BlockScore) -> Architecture:
    return tuple(Block.parse(name) for name in (score.blocks if isinstance(score, RunScore) else (score.block,)))


def covers(table: Table, first: int = 0) -> Iterator[Cover]:
    """Every way to cover the layers from `first` on."""
    if first == len(table):
        yield ()
        return
    for score in table[first]:
        for others in covers(table, first + len(blocks_of(score))):
            yield (score, *others)


def architecture_of(cover: Cover) -> Architecture:
    return tuple(block for score in cover for block in blocks_of(score))


def with_fused(costs: PieceCosts, num_layers: int, piece: Any) -> PieceCosts:
    """Costs of the fused FFNs beside the others: a width of n layers costs what `piece(n)` says."""
    width = PARENT.ffn.intermediate_size
    fused = {(layer, "ffn", f"w{n * width}"): piece(n) for layer in range(num_layers) for n in range(2, num_layers + 1)}
    return replace(costs, pieces={**costs.pieces, **fused})


@st.composite
def with_runs(draw: st.DrawFn) -> tuple[Table, PieceCosts, Scenario]:
    """The instances of single blocks, and runs whose scores are below, at and above the sum of their layers' no-ops."""
    table, costs, scenario = draw(instances())
    num_layers = len(table)
    for run in (Run(i, j, kind) for i in range(num_layers) for j in range(i + 1, num_layers) for kind in ("drop", "fuse")):
        if draw(st.integers(0, 3)):
            kl, loss = draw(st.integers(0, 20)) / 8, draw(st.integers(8, 24)) / 8
            table[run.first].append(run_score(run, kl, lm_loss=loss, top1=draw(st.integers(0, 8)) / 8))
    seconds = {n: {b: {"prefill": draw(st.integers(0, 8)) / 64, "decode": draw(st.integers(0, 8)) / 64} for b in BATCHES} for n in (2, 3)}
    sizes = {n: draw(st.integers(0, 9)) for n in (2, 3)}
    return table, with_fused(costs, num_layers, lambda n: PieceCost(sizes[n], sizes[n], 0, seconds[n])), scenario


def plain_value(table: Table, scenario: Scenario, cover: Cover) -> float:
    """A cover's objective: what each replacement adds, the parent's loss taken off once a replacement."""
    objective = scenario.objective.minimize
    if objective != "lm_loss":
        return plain_objective(table, objective, cover)
    own = {layer: next(s for s in scores if s.block == PARENT.name) for layer, scores in enumerate(table)}
    return sum(s.lm_loss - own[s.layer].lm_loss for s in cover)


def brute_force(table: Table, costs: PieceCosts, scenario: Scenario, allowed: Any = lambda architecture: True) -> float | None:
    best = None
    for batch in BATCHES if scenario.batch_sizes == "all" else scenario.batch_sizes:
        bounds = plain_bounds(scenario, costs, len(table), batch)
        for cover in covers(table):
            architecture = architecture_of(cover)
            if allowed(architecture) and meets(costs, architecture, bounds):
                value = plain_value(table, scenario, cover)
                best = value if best is None else min(best, value)
    return best


def check(found: Solution, table: Table, costs: PieceCosts, scenario: Scenario, best: float) -> None:
    assert found.objective == pytest.approx(best, abs=1e-9) and found.status == "optimal"
    assert sum(c.score for c in found.choices) == pytest.approx(found.objective, abs=1e-9)
    assert [c.layer for c in found.choices] == list(range(len(table)))
    bounds = plain_bounds(scenario, costs, len(table), found.batch)
    assert meets(costs, found.architecture, bounds)
    for name in found.runs:
        run = Run.parse(name)
        assert tuple(found.architecture[run.first : run.last + 1]) == run.blocks(PARENT)
        assert [c.run for c in found.choices[run.first : run.last + 1]] == [name] * len(run.layers)
    assert Solution.from_json(found.to_json()) == found


@settings(max_examples=300, deadline=None)
@given(with_runs())
def test_equals_brute_force_over_all_covers(instance: tuple[Table, PieceCosts, Scenario]) -> None:
    table, costs, scenario = instance
    try:
        best = brute_force(table, costs, scenario)
    except ScenarioError:
        return
    if best is None:
        with pytest.raises(InfeasibleScenarioError):
            solve_scenario(table, {"t": costs}, scenario, PARENT)
        return
    check(solve_scenario(table, {"t": costs}, scenario, PARENT), table, costs, scenario, best)


def patterns_hold(architecture: Architecture, fixed: dict[int, str], forbidden: Sequence[str]) -> bool:
    names = [block.name for block in architecture]
    return all(names[layer] == name for layer, name in fixed.items()) and not set(names) & set(forbidden)


@settings(max_examples=150, deadline=None)
@given(with_runs(), st.data())
def test_structure_speaks_of_the_blocks_that_runs_bring(instance: tuple[Table, PieceCosts, Scenario], data: st.DataObject) -> None:
    """Fixed and forbidden blocks, counted ones and sameness hold of the child, however its layers were covered."""
    table, costs, scenario = instance
    placed = {(s.layer + i, b.name) for scores in table for s in scores for i, b in enumerate(blocks_of(s))}
    layer, name = data.draw(st.sampled_from(sorted(placed)))
    kind = data.draw(st.sampled_from(["fixed", "forbidden", "max_distinct", "homogeneous"]))
    most = data.draw(st.integers(1, 2))
    settings_of = {"fixed": {layer: name}, "forbidden": {"all": [name]}, "max_distinct": most, "homogeneous": True}
    content = scenario.model_dump(mode="json")
    asked = Scenario.model_validate({**content, "structure": {kind: settings_of[kind]}})
    allowed = {
        "fixed": lambda a: patterns_hold(a, {layer: name}, ()),
        "forbidden": lambda a: patterns_hold(a, {}, (name,)),
        "max_distinct": lambda a: len(set(a)) <= most,
        "homogeneous": lambda a: len(set(a)) == 1,
    }[kind]
    try:
        best = brute_force(table, costs, scenario, allowed)
    except ScenarioError:
        return
    if best is None:
        with pytest.raises(ScenarioError):
            solve_scenario(table, {"t": costs}, asked, PARENT)
        return
    check(solve_scenario(table, {"t": costs}, asked, PARENT), table, costs, asked, best)


@settings(max_examples=100, deadline=None)
@given(with_runs(), st.integers(1, 3))
def test_a_pool_holds_different_children(instance: tuple[Table, PieceCosts, Scenario], least: int) -> None:
    """A run that is dropped and single no-ops in its layers are the same child, and stand in a pool once."""
    table, costs, scenario = instance
    least = min(least, len(table))
    content = scenario.model_dump(mode="json")
    asked = Scenario.model_validate({**content, "pool": {"num_solutions": 3, "min_different_layers": least}})
    try:
        if brute_force(table, costs, scenario) is None:
            return
    except ScenarioError:
        return
    earlier: list[Architecture] = []
    for found in answer_scenario(table, {"t": costs}, asked, PARENT):

        def differs(architecture: Architecture) -> bool:
            return all(sum(a != b for a, b in zip(architecture, other, strict=True)) >= least for other in earlier)

        best = brute_force(table, costs, scenario, differs)
        assert best is not None and differs(found.architecture)
        check(found, table, costs, scenario, best)
        earlier.append(found.architecture)


SCORES = {PARENT.name: 0.0, "kv1/w64": 0.3, "noop/noop": 1.0}
ONE_SECOND = {b: {"prefill": 1.0, "decode": 1.0} for b in BATCHES}
COSTS = with_fused(simple_costs(4, seconds=SECONDS), 4, lambda n: PieceCost(30 * n, 60 * n, 0, ONE_SECOND))
HALF = {"latency_s": {"at_most": 0.55, "relative_to": "parent"}}


def scenario_of(constraints: dict[str, Any], **fields: Any) -> Scenario:
    content = {"version": 1, "name": "s", "target": "t", "constraints": constraints, "uptrain": {"tokens": 0}, **fields}
    return Scenario.model_validate(content)


@pytest.mark.parametrize(("kl", "taken"), [(1.5, ("drop_1-2",)), (2.0, ()), (2.5, ())])
def test_a_run_is_taken_where_it_beats_the_sum_of_its_layers(kl: float, taken: tuple[str, ...]) -> None:
    """Two of four layers have to go; alone they cost 1 each, together `kl`."""
    table: Table = simple_table(4, {PARENT.name: 0.0, "noop/noop": 1.0})
    table[1].append(run_score(Run(1, 2, "drop"), kl))
    found = solve_scenario(table, {"t": COSTS}, scenario_of(HALF), PARENT)
    assert found.objective == pytest.approx(min(kl, 2.0))
    assert kl == 2.0 or found.runs == taken
    assert found.architecture.count(NO_BLOCK) == 2


def test_a_run_and_the_same_single_blocks_are_one_child() -> None:
    """The digest of the solution is of the child: no re-assembly where only the way to the same child is another."""
    table: Table = [[replace(s, digest="nothing") if s.block == "noop/noop" else s for s in row] for row in simple_table(3, SCORES)]
    fixed = {"structure": {"fixed": {0: "noop/noop", 1: "noop/noop", 2: PARENT.name}}}
    alone = solve_scenario(table, {"t": COSTS}, scenario_of({}, **fixed), PARENT)
    table[0].append(run_score(Run(0, 1, "drop"), 0.5))
    together = solve_scenario(table, {"t": COSTS}, scenario_of({}, **fixed), PARENT)
    assert (alone.runs, together.runs) == ((), ("drop_0-1",)) and together.objective == 0.5
    assert together.digest == alone.digest


def test_loosening_and_what_conflicts_know_runs() -> None:
    table: Table = simple_table(4, {PARENT.name: 0.0})
    table[0].append(run_score(Run(0, 2, "fuse"), 0.2))
    table[2].append(run_score(Run(2, 3, "drop"), 0.5))
    # Parent: 0.5 + 4 * 2 = 8.5 s of prefill; the fused run of three leaves 0.5 + 1 + 1 + 2.
    best = answer_scenario(table, {"t": COSTS}, scenario_of({"ttft_s": {"at_most": 4.5}}), PARENT)[0]
    assert best.runs == ("fuse_0-2",) and best.predicted["ttft_s"] == 4.5
    assert [c.score for c in best.choices] == [0.2, 0.0, 0.0, 0.0]
    assert [c.block for c in best.choices] == ["kv4/w192", "noop/noop", "noop/noop", PARENT.name]
    asked = scenario_of({"ttft_s": {"at_most": 4.5}})
    assert recheck_solutions(table, {"t": COSTS}, asked, PARENT, [best]).wrong == ()
    torn = replace(best, choices=(replace(best.choices[0], run=""), *best.choices[1:]))
    assert recheck_solutions(table, {"t": COSTS}, asked, PARENT, [torn]).wrong, "a run's block was never scored alone"
    assert [entry.is_binding for entry in best.loosened] == [False], "nothing between the run and the parent"
    with pytest.raises(InfeasibleScenarioError) as caught:
        solve_scenario(table, {"t": COSTS}, scenario_of({"ttft_s": {"at_most": 4.0}}), PARENT)
    assert caught.value.best_value == 4.5


def test_baselines_choose_among_single_blocks() -> None:
    table: Table = simple_table(4, SCORES)
    table[0].append(run_score(Run(0, 3, "drop"), 0.0))
    asked = scenario_of(HALF)
    assert greedy_solution(table, {"t": COSTS}, asked, PARENT).runs == ()
    assert random_solution(table, {"t": COSTS}, asked, PARENT, seed=1).runs == ()
