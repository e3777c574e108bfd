"""The inverse search against brute force."""

from fractions import Fraction
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from search_instances import (
    BATCHES,
    NAMES,
    PARENT,
    SECONDS,
    TABLE,
    instances,
    make_scenario,
    meets,
    plain_bounds,
    plain_objective,
    plain_value,
    simple_costs,
    simple_table,
)

from puzzle_dag.architecture import Block
from puzzle_dag.config import Scenario
from puzzle_dag.piece_costs import PieceCosts
from puzzle_dag.search.infeasible import InfeasibleScenarioError
from puzzle_dag.search.limits import ScenarioError
from puzzle_dag.search.score import BlockScore
from puzzle_dag.search.solve import solve_scenario


def inverse_of(scenario: Scenario, optimise: str, budget: float) -> Scenario:
    """The scenario with a quantity as its objective and its former score as the budget."""
    word = "maximize" if optimise == "throughput_tokens_per_s" else "minimize"
    objective = {word: optimise, "subject_to": {scenario.objective.minimize: {"at_most": budget}}}
    return Scenario.model_validate({**scenario.model_dump(), "objective": objective})


@settings(max_examples=150, deadline=None)
@given(instances(), st.sampled_from(NAMES), st.integers(0, 24).map(lambda n: n / 8))
def test_equals_brute_force(instance: tuple[list[list[BlockScore]], PieceCosts, Scenario], optimise: str, budget: float) -> None:
    table, costs, scenario = instance
    values = []
    try:
        for batch in BATCHES if scenario.batch_sizes == "all" else scenario.batch_sizes:
            bounds = plain_bounds(scenario, costs, len(table), batch)
            for picks in product(*table):
                architecture = tuple(Block.parse(s.block) for s in picks)
                score = plain_objective(table, scenario.objective.minimize, picks)
                if meets(costs, architecture, bounds) and Fraction(score) <= Fraction(budget):
                    values.append(float(plain_value(optimise, costs, architecture, batch, 16)))
    except ScenarioError:
        return
    if not values:
        with pytest.raises(InfeasibleScenarioError):
            solve_scenario(table, {"t": costs}, inverse_of(scenario, optimise, budget), PARENT)
        return
    solution = solve_scenario(table, {"t": costs}, inverse_of(scenario, optimise, budget), PARENT)
    assert (solution.notes["optimised"], solution.status, solution.minimized) == (optimise, "optimal", scenario.objective.minimize)
    best = max(values) if optimise == "throughput_tokens_per_s" else min(values)
    assert solution.notes["value"] == pytest.approx(best)
    assert solution.predicted[optimise] == pytest.approx(best)
    assert solution.objective <= budget
    assert solution.notes["gap"] <= 1e-6


def test_a_budget_below_what_the_constraints_allow_is_refused() -> None:
    scenario = make_scenario({"latency_s": {"at_most": 0.7, "relative_to": "parent"}})
    with pytest.raises(InfeasibleScenarioError, match=r"kl at most 0\.01 can't be met: the best value with latency_s met is 2") as raised:
        solve_scenario(simple_table(3, TABLE), {"t": simple_costs(3, seconds=SECONDS)}, inverse_of(scenario, "ttft_s", 0.01), PARENT)
    assert raised.value.conflicting == ("latency_s", "kl")


def test_memory_is_taken_where_the_objective_says() -> None:
    """At batch 4 and 100 tokens the KV cache outweighs the weights, at batch 1 and 1 token it doesn't."""
    table, costs = simple_table(2, {PARENT.name: 0.0, "kv1/w64": 0.125, "kv4/noop": 0.125}), {"t": simple_costs(2, seconds=SECONDS)}
    found = {}
    for batch, length in ((4, 100), (1, 1)):
        objective = {"minimize": "memory", "subject_to": {"kl": {"at_most": 0.25}}, "at": {"batch": batch, "length": length}}
        solution = solve_scenario(table, costs, make_scenario({}, objective=objective), PARENT)
        found[batch] = {c.block for c in solution.choices}
        assert solution.notes["value"] == float(plain_value("memory_bytes", costs["t"], solution.architecture, batch, length))
    assert found == {4: {"kv1/w64"}, 1: {"kv4/noop"}}
