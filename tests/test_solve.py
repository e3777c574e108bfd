"""The search against brute force: every architecture of small instances, in exact arithmetic."""

import json
from collections.abc import Sequence
from fractions import Fraction
from itertools import combinations, product

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

from puzzle_dag.architecture import Architecture, Block
from puzzle_dag.config import Scenario
from puzzle_dag.piece_costs import PieceCost, PieceCosts
from puzzle_dag.search.infeasible import InfeasibleScenarioError
from puzzle_dag.search.limits import ScenarioError
from puzzle_dag.search.score import BlockScore
from puzzle_dag.search.solution import Solution
from puzzle_dag.search.solve import solve_scenario


@settings(max_examples=400, deadline=None)
@given(instances())
def test_equals_brute_force(instance: tuple[list[list[BlockScore]], PieceCosts, Scenario]) -> None:
    table, costs, scenario = instance
    try:
        expected = brute_force(table, costs, scenario)
    except ScenarioError:
        with pytest.raises(ScenarioError, match="parent needs"):
            solve_scenario(table, {"t": costs}, scenario, PARENT)
        return
    if expected is None:
        with pytest.raises(InfeasibleScenarioError) as raised:
            solve_scenario(table, {"t": costs}, scenario, PARENT)
        check_explanation(raised.value, table, costs, scenario)
        return
    solution = solve_scenario(table, {"t": costs}, scenario, PARENT)
    assert solution.status == "optimal"
    assert solution.objective == pytest.approx(expected, abs=1e-12)
    assert solution.bound <= solution.objective
    assert solution.gap <= 1e-6
    assert meets(costs, solution.architecture, plain_bounds(scenario, costs, len(table), solution.batch))
    for name, value in solution.predicted.items():
        assert value == pytest.approx(float(plain_value(name, costs, solution.architecture, solution.batch, 16)))
    assert Solution.from_json(json.loads(json.dumps(solution.to_json(), allow_nan=False))) == solution


def check_explanation(error: InfeasibleScenarioError, table: list[list[BlockScore]], costs: PieceCosts, scenario: Scenario) -> None:
    """The conflict can't be met and is of the least size at that batch; each nearest value is what brute force finds."""
    bounds = {b[0]: b for b in plain_bounds(scenario, costs, len(table), error.batch)}
    architectures = [tuple(Block.parse(s.block) for s in picks) for picks in product(*table)]

    def feasible(names: Sequence[str]) -> list[Architecture]:
        return [a for a in architectures if meets(costs, a, [bounds[n] for n in names])]

    assert not feasible(error.conflicting)
    assert all(feasible(subset) for subset in combinations(bounds, len(error.conflicting) - 1))
    assert error.constraint in error.conflicting
    assert error.best_value == error.nearest[error.constraint]
    assert error.constraint in str(error)
    for name in error.conflicting:
        others = [n for n in bounds if n != name]
        reachable = feasible(others) or feasible([n for n in error.conflicting if n != name])
        _, batch, length, low, high = bounds[name]
        values = [plain_value(name, costs, a, batch, length) for a in reachable]

        def distance(value: Fraction | float, low: Fraction | None = low, high: Fraction | None = high) -> float:
            return min(abs(float(value - b)) for b in (low, high) if b is not None)

        best = min(values, key=distance)
        if low is None or high is None or name != "throughput_tokens_per_s":
            assert distance(error.nearest[name]) == pytest.approx(distance(best))
        else:  # between two bounds of a rate the nearest is told by time
            assert any(error.nearest[name] == pytest.approx(float(v)) for v in values)


def test_of_tied_batches_the_one_with_more_throughput_is_kept() -> None:
    scenario = make_scenario({"parameters": {"at_most": 1e9}})
    solution = solve_scenario(simple_table(3, TABLE), {"t": simple_costs(3, seconds=SECONDS)}, scenario, PARENT)
    assert (solution.objective, solution.batch) == (0.0, 4)
    assert [b.status for b in solution.batches] == ["optimal", "optimal"]
    assert solution.architecture == (PARENT,) * 3


def test_a_bound_that_is_exactly_reached_is_met() -> None:
    """0.7 of 10 layers is 7 layers, though the binary number 0.7 is below it; and 1.0 of the parent's time is the parent."""
    table, costs = simple_table(10, TABLE), simple_costs(10, seconds={"kv4": 0.1, "w64": 0.7, "kv1": 0.1, "w32": 0.3})
    scenario = make_scenario({"num_attention_layers": {"at_most": 0.7, "relative_to": "parent"}})
    assert solve_scenario(table, {"t": costs}, scenario, PARENT).objective == pytest.approx(6.0)
    scenario = make_scenario({"latency_s": {"at_most": 1.0, "relative_to": "parent", "at": {"batch": 4}}})
    assert solve_scenario(table, {"t": costs}, scenario, PARENT).objective == 0.0


def test_throughput_is_relative_to_the_parent_within_the_same_memory() -> None:
    """The parent is fastest at batch 4, where it doesn't fit; so the bound follows from batch 1."""
    table, costs = simple_table(2, TABLE), simple_costs(2, seconds=SECONDS)
    parent = (PARENT, PARENT)
    memory_1 = float(plain_value("memory_bytes", costs, parent, 1, 16))
    constraints = {"throughput_tokens_per_s": {"at_least": 1.2, "relative_to": "parent"}, "memory_bytes": {"at_most": memory_1 + 1}}
    solution = solve_scenario(table, {"t": costs}, make_scenario(constraints), PARENT)
    limit = next(report for report in solution.limits if report.name == "throughput_tokens_per_s")
    assert limit.at_least == pytest.approx(1.2 * 16 / 9)
    del constraints["memory_bytes"]
    solution = solve_scenario(table, {"t": costs}, make_scenario(constraints), PARENT)
    assert solution.limits[0].at_least == pytest.approx(1.2 * 4 * 16 / 9)
    assert solution.parent["parent_best_throughput_tokens_per_s"] == pytest.approx(4 * 16 / 9)


def test_the_digest_changes_with_a_chosen_piece_and_only_then() -> None:
    costs, scenario = simple_costs(2, seconds=SECONDS), make_scenario({"latency_s": {"at_most": 8.0}})
    table = simple_table(2, TABLE)
    before = solve_scenario(table, {"t": costs}, scenario, PARENT)
    assert {c.block for c in before.choices} == {PARENT.name, "kv1/w64"}
    table[0][3] = BlockScore(0, "noop/noop", 3.0, 2.0, 0.5, 64, "retrained, but not chosen")
    assert solve_scenario(table, {"t": costs}, scenario, PARENT).digest == before.digest
    for layer, row in enumerate(table):
        row[1] = BlockScore(layer, "kv1/w64", 0.1, 2.1, 0.99, 64, "retrained and chosen")
    after = solve_scenario(table, {"t": costs}, scenario, PARENT)
    assert [c.block for c in after.choices] == [c.block for c in before.choices]
    assert after.digest != before.digest


def test_an_infeasible_scenario_says_what_can_be_had() -> None:
    scenario = make_scenario({"latency_s": {"at_most": 0.5}})
    with pytest.raises(InfeasibleScenarioError, match=r"latency_s at most 0\.5 .* can't be met: the best value is 1") as raised:
        solve_scenario(simple_table(2, TABLE), {"t": simple_costs(2, seconds=SECONDS)}, scenario, PARENT)
    assert (raised.value.constraint, raised.value.best_value) == ("latency_s", 1.0)


def test_two_conflicting_constraints_are_both_named() -> None:
    scenario = make_scenario({"latency_s": {"at_most": 5.0}, "parameters": {"at_least": 100}, "kv_bytes_per_token": {"at_most": 1e6}})
    with pytest.raises(InfeasibleScenarioError, match="could be met without the others") as raised:
        solve_scenario(simple_table(2, TABLE), {"t": simple_costs(2, seconds=SECONDS)}, scenario, PARENT)
    assert raised.value.conflicting == ("latency_s", "parameters")
    assert raised.value.nearest["latency_s"] == 7.0


@pytest.mark.parametrize(
    ("constraints", "fields", "message"),
    [
        ({"latency_s": {"at_most": 1.0, "at": {"batch": 3}}}, {}, r"batch is 3.*measured are 1, 4"),
        ({"latency_s": {"at_most": 1.0, "at": {"batch": 1, "length": 9}}}, {}, r"measured at 12 \+ 4 tokens"),
        ({"latency_s": {"at_most": 1.0}}, {"batch_sizes": [4, 16]}, r"not measured at 16; measured are 1, 4"),
        ({"latency_s": {"at_most": 1.0}}, {"target": "other"}, r"'other' has no costs \(there are: t\); name it among"),
        ({"throughput_tokens_per_s": {"at_least": 1.5, "relative_to": "parent"}, "memory_bytes": {"at_most": 3}}, {}, "the parent needs"),
    ],
)
def test_what_was_not_measured_is_refused(constraints: dict[str, object], fields: dict[str, object], message: str) -> None:
    with pytest.raises(ScenarioError, match=message):
        solve_scenario(simple_table(2, TABLE), {"t": simple_costs(2, seconds=SECONDS)}, make_scenario(constraints, **fields), PARENT)


def test_no_time_between_tokens_where_there_is_one_token() -> None:
    costs = simple_costs(2, seconds=SECONDS, output_length=1)
    with pytest.raises(ScenarioError, match="bound ttft_s"):
        solve_scenario(simple_table(2, TABLE), {"t": costs}, make_scenario({"tpot_s": {"at_most": 1.0}}), PARENT)
    solution = solve_scenario(simple_table(2, TABLE), {"t": costs}, make_scenario({"ttft_s": {"at_most": 3.0}}), PARENT)
    assert "tpot_s" not in solution.predicted


def test_a_variant_without_cost_or_score_is_named() -> None:
    costs, scenario = simple_costs(2, seconds=SECONDS), make_scenario({"latency_s": {"at_most": 5.0}})
    with pytest.raises(ValueError, match=r"attention kv2 of layer 1 has no cost; measured are kv1, kv4, linear, noop"):
        table = simple_table(2, TABLE)
        table[1].append(BlockScore(1, "kv2/w64", 0.05, 2.05, 0.99, 64, "x"))
        solve_scenario(table, {"t": costs}, scenario, PARENT)
    with pytest.raises(ScenarioError, match=r"layer 1 are incomplete: the parent's block kv4/w64"):
        solve_scenario([simple_table(2, TABLE)[0], simple_table(2, TABLE)[1][1:]], {"t": costs}, scenario, PARENT)


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_costs_that_are_no_times_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match=r"seconds\[1\]\['decode'\]"):
        PieceCost(1, 1, 1, {1: {"prefill": 0.1, "decode": value}})
