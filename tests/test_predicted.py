"""The predicted frontier against brute force: no architecture is as fast, or as small, and scores better than the curve."""

import math
from dataclasses import replace
from itertools import product

import pytest
from search_instances import PARENT, SECONDS, TABLE, make_scenario, plain_value, simple_costs, simple_table

from puzzle_dag.architecture import Architecture, Block
from puzzle_dag.piece_costs import PieceCost, weakest_source
from puzzle_dag.search.predicted import QUANTITIES, PredictedPoint, predict_frontier
from puzzle_dag.search.solve import solve_scenario

COSTS = simple_costs(3, seconds=SECONDS)
SCORES = simple_table(3, TABLE)
SOLUTION = solve_scenario(SCORES, {"t": COSTS}, make_scenario({"latency_s": {"at_most": 0.7, "relative_to": "parent"}}), PARENT)
LENGTH = COSTS.input_length + COSTS.output_length


@pytest.fixture(scope="module")
def points() -> list[PredictedPoint]:
    return predict_frontier(SCORES, COSTS, PARENT, {"fast": SOLUTION}, num_points=6)


def value(quantity: str, architecture: Architecture, reference: int) -> float:
    """The quantity from the definitions: throughput at the best batch size, the others at the reference."""
    batches = COSTS.batch_sizes if QUANTITIES[quantity] == "at_least" else (reference,)
    return max(float(plain_value(quantity, COSTS, architecture, batch, LENGTH)) for batch in batches)


@pytest.mark.parametrize("quantity", list(QUANTITIES))
def test_nothing_lies_beyond_the_curve(points: list[PredictedPoint], quantity: str) -> None:
    own = [p for p in points if p.quantity == quantity]
    parent, curve = own[0], [p for p in own if p.kind == "curve"]
    assert (parent.kind, parent.kl, parent.ratio) == ("parent", 0.0, 1.0) and len(curve) >= 3
    every = {tuple(Block.parse(s.block) for s in choice): math.fsum(s.kl for s in choice) for choice in product(*SCORES)}
    sign = 1 if QUANTITIES[quantity] == "at_least" else -1
    reference = parent.batch
    for point in curve:
        as_good = [kl for a, kl in every.items() if sign * value(quantity, a, reference) >= sign * point.value * (1 - sign * 1e-12)]
        assert point.status == "optimal" and point.kl == pytest.approx(min(as_good), abs=1e-12)
        chosen = tuple(Block.parse(name) for name in point.blocks.split())
        assert point.kl == pytest.approx(every[chosen], abs=1e-12)
        assert point.value == pytest.approx(float(plain_value(quantity, COSTS, chosen, point.batch, LENGTH)))
        assert point.ratio == pytest.approx(point.value / parent.value)
    assert [p.kl for p in curve] == sorted(p.kl for p in curve) and curve[-1].kl > 0


def test_a_scenarios_solution_lies_on_the_picture(points: list[PredictedPoint]) -> None:
    own = {p.quantity: p for p in points if p.kind == "scenario"}
    assert set(own) == set(QUANTITIES) and {p.scenario for p in own.values()} == {"fast"}
    assert {p.kl for p in own.values()} == {SOLUTION.objective}
    speed = own["throughput_tokens_per_s"]
    assert speed.batch == SOLUTION.batch and speed.value == SOLUTION.predicted["throughput_tokens_per_s"]


def test_a_solution_that_minimised_something_else_is_placed_by_its_divergence() -> None:
    asked = make_scenario({"latency_s": {"at_most": 0.7, "relative_to": "parent"}}, objective={"minimize": "lm_loss"})
    solution = solve_scenario(SCORES, {"t": COSTS}, asked, PARENT)
    kl = {(s.layer, s.block): s.kl for layer in SCORES for s in layer}
    placed = [p for p in predict_frontier(SCORES, COSTS, PARENT, {"x": solution}, num_points=1) if p.kind == "scenario"]
    assert {p.kl for p in placed} == {math.fsum(kl[c.layer, c.block] for c in solution.choices)}


def test_a_refined_solution_stands_where_its_blocks_are_beside_what_was_searched() -> None:
    """Its objective is a measured loss, which is no sum of scores."""
    other = solve_scenario(SCORES, {"t": COSTS}, make_scenario({"latency_s": {"at_most": 0.5, "relative_to": "parent"}}), PARENT)
    refined = replace(other, scenario=SOLUTION.scenario, status="feasible", objective=9.0, gap=None)
    points = predict_frontier(SCORES, COSTS, PARENT, {"fast": refined}, searched={"fast": SOLUTION}, num_points=1)
    placed = {(p.kind, p.quantity): (p.kl, p.blocks) for p in points if p.scenario == "fast"}
    assert refined.choices != SOLUTION.choices and len(placed) == 2 * len(QUANTITIES)
    for quantity in QUANTITIES:
        assert placed["scenario", quantity] == (other.objective, " ".join(c.block for c in other.choices))
        assert placed["searched", quantity] == (SOLUTION.objective, " ".join(c.block for c in SOLUTION.choices))


@pytest.mark.parametrize("source", ["measured", "imported", "analytic"])
def test_every_point_says_where_its_costs_come_from(source) -> None:
    assert {p.costs for p in predict_frontier(SCORES, replace(COSTS, source=source), PARENT, {}, num_points=1)} == {source}


def test_what_rests_on_several_costs_is_as_firm_as_the_weakest() -> None:
    assert [weakest_source(s) for s in (["measured"], ["imported", "measured"], ["measured", "analytic", "imported"])] == [
        "measured",
        "imported",
        "analytic",
    ]


def test_a_model_that_is_said_to_take_no_time_is_no_point() -> None:
    """Noise can swallow all that a small model takes; its throughput would be infinite, which no table and no picture can show."""
    nothing = PieceCost(1, 2, 0, {batch: {"prefill": 0.0, "decode": 0.0} for batch in COSTS.batch_sizes})
    points = predict_frontier(SCORES, replace(COSTS, constant=nothing), PARENT, {"fast": SOLUTION}, num_points=6)
    assert {p.quantity for p in points} == set(QUANTITIES) and all(math.isfinite(p.value + p.ratio) for p in points)
    assert max(p.kl for p in points) > SOLUTION.objective, "the curve goes on beyond the scenario"
