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
from puzzle_dag.search.inverse import solve_within_quality
from puzzle_dag.search.limits import ScenarioError
from puzzle_dag.search.score import BlockScore


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
        with pytest.raises(ScenarioError):
            solve_within_quality(table, {"t": costs}, scenario, PARENT, optimise=optimise, at_most=budget)
        return
    solution = solve_within_quality(table, {"t": costs}, scenario, PARENT, optimise=optimise, at_most=budget)
    best = max(values) if optimise == "throughput_tokens_per_s" else min(values)
    assert solution.notes["value"] == pytest.approx(best)
    assert solution.predicted[optimise] == pytest.approx(best)
    assert solution.objective <= budget
    assert solution.notes["gap"] <= 1e-6


def test_a_budget_below_what_the_constraints_allow_is_refused() -> None:
    scenario = make_scenario({"latency_s": {"at_most": 0.7, "relative_to": "parent"}})
    with pytest.raises(ScenarioError, match=r"kl at most 0\.01 can't be met: the least that the constraints allow is 2$"):
        solve_within_quality(
            simple_table(3, TABLE), {"t": simple_costs(3, seconds=SECONDS)}, scenario, PARENT, optimise="ttft_s", at_most=0.01
        )
