"""Baselines: each meets the constraints, is what its rule says, and never beats the search."""

from itertools import product

import pytest
from hypothesis import given, settings
from search_instances import (
    PARENT,
    SECONDS,
    TABLE,
    brute_force,
    instances,
    make_scenario,
    meets,
    plain_bounds,
    plain_value,
    simple_costs,
    simple_table,
)

from puzzle_dag.architecture import Block
from puzzle_dag.config import Scenario
from puzzle_dag.piece_costs import PieceCosts
from puzzle_dag.search.baselines import BaselineFailedError, greedy_solution, largest_parameters_solution, random_solution
from puzzle_dag.search.infeasible import InfeasibleScenarioError
from puzzle_dag.search.limits import ScenarioError
from puzzle_dag.search.score import BlockScore
from puzzle_dag.search.solve import solve_scenario


@settings(max_examples=100, deadline=None)
@given(instances())
def test_every_baseline_meets_the_constraints(instance: tuple[list[list[BlockScore]], PieceCosts, Scenario]) -> None:
    table, costs, scenario = instance
    try:
        best = brute_force(table, costs, scenario)
    except ScenarioError:
        return
    for name, solve in {
        "greedy": greedy_solution,
        "largest_parameters": largest_parameters_solution,
        "random": lambda *args: random_solution(*args, seed=5),
    }.items():
        if best is None:
            with pytest.raises(BaselineFailedError if name == "greedy" else InfeasibleScenarioError):
                solve(table, {"t": costs}, scenario, PARENT)
            continue
        try:
            solution = solve(table, {"t": costs}, scenario, PARENT)
        except BaselineFailedError:
            assert name == "greedy", "only the greedy rule may miss what can be met"
            continue
        assert meets(costs, solution.architecture, plain_bounds(scenario, costs, len(table), solution.batch))
        assert solution.objective >= best - 1e-9
        assert (solution.status, solution.bound, solution.notes["method"]) == ("feasible", None, name)


@settings(max_examples=60, deadline=None)
@given(instances())
def test_largest_parameters_has_the_most(instance: tuple[list[list[BlockScore]], PieceCosts, Scenario]) -> None:
    table, costs, scenario = instance
    try:
        solution = largest_parameters_solution(table, {"t": costs}, scenario, PARENT)
    except ScenarioError:
        return
    most = 0
    for batch in (1, 4) if scenario.batch_sizes == "all" else scenario.batch_sizes:
        bounds = plain_bounds(scenario, costs, len(table), batch)
        for picks in product(*table):
            architecture = tuple(Block.parse(s.block) for s in picks)
            if meets(costs, architecture, bounds):
                most = max(most, plain_value("parameters", costs, architecture, batch, 16))
    assert solution.predicted["parameters"] == most


def test_greedy_follows_the_paper_by_hand() -> None:
    """Two layers, a budget of 2.5 s each beside the constant; the layer with the lower mean score goes first.

    Layer 1 (lower mean): the parent costs 2.0, fits in 2.5, leaves 0.5. Layer 0 then has 3.0: the parent fits as well.
    With 1.5 s each, layer 1 can't have the parent (2.0): it takes kv1/w64 (1.5); layer 0 has 1.5: kv1/w64 as well.
    With 1.75 s each, layer 1 leaves 0.25, so that layer 0 has exactly the parent's 2.0.
    """
    table, costs = simple_table(2, TABLE), simple_costs(2, seconds=SECONDS)
    table[0] = [BlockScore(0, s.block, s.kl * 2, s.lm_loss, s.top1_agreement, 64, s.digest) for s in table[0]]
    # Prefill and decode each take what SECONDS says, so the latency of a block is twice that; the constant is 1 s.
    for share, expected in {5.0: (PARENT.name, PARENT.name), 3.0: ("kv1/w64", "kv1/w64"), 3.5: (PARENT.name, "kv1/w64")}.items():
        scenario = make_scenario({"latency_s": {"at_most": 1.0 + 2 * share}}, batch_sizes=[1])
        solution = greedy_solution(table, {"t": costs}, scenario, PARENT)
        assert tuple(c.block for c in solution.choices) == expected


def test_greedy_loses_where_the_search_does_not() -> None:
    """One layer has to give up half an attention. Greedy lets the layer with the lower mean pay, where it hurts more."""
    costs = simple_costs(2, seconds=SECONDS)
    kl = [{PARENT.name: 0.0, "kv1/w64": 0.3, "noop/noop": 0.3}, {PARENT.name: 0.0, "kv1/w64": 0.1, "noop/noop": 5.0}]
    table = [[BlockScore(layer, name, value, 2.0, 1.0, 64, name) for name, value in row.items()] for layer, row in enumerate(kl)]
    scenario = make_scenario({"latency_s": {"at_most": 1.0 + 2 * 3.5}}, batch_sizes=[1])
    greedy, best = (solve(table, {"t": costs}, scenario, PARENT) for solve in (greedy_solution, solve_scenario))
    assert best.objective == pytest.approx(0.1)
    assert greedy.objective == pytest.approx(0.3)


def test_random_draws_differ_by_seed_and_repeat() -> None:
    table, costs = simple_table(8, TABLE), simple_costs(8, seconds=SECONDS)
    scenario = make_scenario({"latency_s": {"at_most": 0.6, "relative_to": "parent"}})
    draws = [random_solution(table, {"t": costs}, scenario, PARENT, seed=s) for s in range(6)]
    assert len({d.digest for d in draws}) > 3
    assert draws[2].digest == random_solution(table, {"t": costs}, scenario, PARENT, seed=2).digest
    loose = make_scenario({"latency_s": {"at_most": 2.0, "relative_to": "parent"}})
    blocks = [c.block for s in range(60) for c in random_solution(table, {"t": costs}, loose, PARENT, seed=s).choices]
    shares = {name: blocks.count(name) / len(blocks) for name in TABLE}
    assert all(abs(share - 1 / len(TABLE)) < 0.08 for share in shares.values()), "with nothing in the way, the draw is uniform"
