"""The trial in plain numbers: what engines say of bounds on time, how bounds are moved by it, and which child is kept."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from search_instances import PARENT, SECONDS, TABLE, make_scenario, simple_costs, simple_table

from puzzle_dag.config import Scenario
from puzzle_dag.search.correction import (
    corrected_scenario,
    correction_words,
    corrections_of_json,
    corrections_to_json,
    find_corrections,
)
from puzzle_dag.search.solution import Solution
from puzzle_dag.search.solve import solve_scenario
from puzzle_dag.search.timed import MeasuredBound, measure_bound, timed_bounds, turns_wanted
from puzzle_dag.search.trial import Trial, Tried, as_asked, choose, trial_rows, trial_words, try_scenario
from puzzle_dag.shrinkage import shrunk_share

LAYERS = 6
COSTS, SCORES = {"t": simple_costs(LAYERS, seconds=SECONDS)}, simple_table(LAYERS, TABLE)
PARENTS = (PARENT,) * LAYERS
FAST = make_scenario({"throughput_tokens_per_s": {"at_least": 1.2, "relative_to": "parent"}}, batch_sizes=[4])
SHORT = make_scenario({"latency_s": {"at_most": 20.0}}, batch_sizes=[4])
NOISE = (1.0, 1.001, 0.999, 1.0)


def solve(scenario: Scenario) -> Solution:
    return solve_scenario(SCORES, COSTS, scenario, PARENT)


def measure(scenario: Scenario, solution: Solution, slowdown: float, noise: tuple[float, ...] = NOISE) -> tuple[MeasuredBound, ...]:
    """Run a solution on a machine on which children take `slowdown` times as long as their costs say, and the parent doesn't."""
    found = []
    for bound in timed_bounds(scenario, solution, COSTS, PARENTS, {"t"}):

        def seconds(architecture: Any, batch: int | None, phase: str = bound.phase) -> float:
            phases = ("prefill", "decode") if phase == "total" else (phase,)
            return sum(float(COSTS["t"].seconds(architecture, batch or 1, p)) for p in phases)

        child_s = [seconds(solution.architecture, bound.batch) * slowdown * n for n in noise]
        parent_s = None if bound.parent_batch is None else [seconds(PARENTS, bound.parent_batch)] * len(noise)
        found.append(measure_bound(bound, child_s, parent_s))
    return tuple(found)


def run(scenario: Scenario, slowdown: float | Callable[[Solution], float], *, rounds: int = 3, tolerance: float = 0.02) -> Trial:
    def run_child(solution: Solution) -> tuple[MeasuredBound, ...]:
        return measure(scenario, solution, slowdown(solution) if callable(slowdown) else slowdown)

    return try_scenario(scenario, solve(scenario), measure=run_child, search=solve, rounds=rounds, tolerance=tolerance)


@pytest.mark.parametrize(
    ("name", "bound", "value"),
    [
        ("throughput_tokens_per_s", {"at_least": 1.2, "relative_to": "parent"}, 12.5 / (11.5 * 1.1)),
        ("throughput_tokens_per_s", {"at_least": 1.2, "relative_to": "parent", "at": {"batch": 1}}, 12.5 / (11.5 * 1.1)),
        ("throughput_tokens_per_s", {"at_least": 1.0}, 4 * 16 / (2 * 11.5 * 1.1)),
        ("latency_s", {"at_most": 0.9, "relative_to": "parent"}, 11.5 * 1.1 / 12.5),
        ("latency_s", {"at_most": 30.0}, 2 * 11.5 * 1.1),
        ("ttft_s", {"at_most": 15.0}, 11.5 * 1.1),
        ("tpot_s", {"at_most": 5.0}, 11.5 * 1.1 / 3),
        ("tpot_s", {"at_most": 0.95, "relative_to": "parent"}, 11.5 * 1.1 / 12.5),
    ],
)
def test_seconds_become_the_quantity_that_is_bounded(name: str, bound: dict[str, Any], value: float) -> None:
    """The parent takes 12.5 s in each phase, at any batch size, and the child 11.5 s by its costs."""
    scenario, found = make_scenario({name: bound}, batch_sizes=[4]), solve(FAST)
    choices = tuple(replace(c, block="kv1/w64" if i < 2 else PARENT.name) for i, c in enumerate(found.choices))
    (measured,) = measure(scenario, replace(found, choices=choices), 1.1)
    assert measured.measured == pytest.approx(value, rel=1e-3) and measured.low < measured.measured < measured.high
    assert measured.slowdown == pytest.approx(math.log(1.1), abs=1e-3) and 0 < measured.error < 1e-3
    is_rate = name == "throughput_tokens_per_s"
    assert measured.asked.predicted == pytest.approx(value * (1.1 if is_rate else 1 / 1.1), rel=1e-3)
    assert measured.asked.parent_batch == (
        None if "relative_to" not in bound else bound.get("at", {"batch": measured.asked.parent_batch})["batch"]
    )


def test_a_throughput_is_relative_to_the_parent_at_its_best_batch() -> None:
    any_batch = make_scenario({"throughput_tokens_per_s": {"at_least": 1.2, "relative_to": "parent"}})
    solution = replace(solve(any_batch), batch=1)
    (found,) = measure(any_batch, solution, 1.0)
    assert (found.asked.batch, found.asked.parent_batch, found.asked.scale) == (1, 4, 0.25)
    assert found.measured == pytest.approx(found.asked.predicted, rel=1e-3)


@given(st.floats(-1, 1), st.floats(0, 1))
def test_shrinking_never_turns_or_enlarges_an_effect(effect: float, error: float) -> None:
    found = effect * shrunk_share(effect, error)
    assert found * effect >= 0 and abs(found) <= abs(effect)
    assert (found == 0) == (abs(effect) <= error or effect == 0) or abs(found) < 1e-9
    assert shrunk_share(effect, 0.0) == (1.0 if effect else 0.0)


@given(st.floats(0.5, 2.0))
def test_bounds_on_time_alone_are_moved(factor: float) -> None:
    scenario = make_scenario(
        {
            "latency_s": [{"at_most": 0.7, "relative_to": "parent"}, {"at_most": 3.0, "at": {"batch": 1}}],
            "memory_bytes": {"at_most": 100},
            "throughput_tokens_per_s": {"equals": 2.0, "within": 0.05, "relative_to": "parent"},
        }
    )
    moved = corrected_scenario(scenario, {1: factor, 3: factor})
    (first, second), rate = moved.constraints["latency_s"], moved.constraints["throughput_tokens_per_s"]
    assert first == scenario.constraints["latency_s"][0] and moved.constraints["memory_bytes"] == scenario.constraints["memory_bytes"]
    assert second.at_most == pytest.approx(3.0 / factor, rel=1e-5) and rate.equals == pytest.approx(2.0 * factor, rel=1e-5)
    assert rate.within == 0.05 and second.at == scenario.constraints["latency_s"][1].at
    assert Scenario.model_validate(moved.model_dump(mode="json")) == moved
    assert moved.model_copy(update={"constraints": scenario.constraints}) == scenario


def test_no_correction_leaves_a_scenario_as_it_is_and_words_say_what_one_does() -> None:
    assert corrected_scenario(FAST, {}) == FAST and correction_words(FAST, {}) == "" == correction_words(FAST, {0: 1.0})
    said = correction_words(FAST, {0: 1.045})
    assert said == "solved for throughput at least 1.254 x the parent's, for children are 4.5 % slower than their costs say"
    assert "3.0 % faster" in correction_words(SHORT, {0: 0.97}) and "at most 20.6186" in correction_words(SHORT, {0: 0.97})
    assert corrections_of_json(corrections_to_json({0: 1.1, 11: 0.9})) == {0: 1.1, 11: 0.9}


def test_children_tell_the_correction_together_and_noise_tells_none() -> None:
    found = solve(FAST)
    slow, slower = measure(FAST, found, 1.04), measure(FAST, found, 1.08)
    assert find_corrections([slow, slower], may_loosen=())[0] == pytest.approx(math.sqrt(1.04 * 1.08), rel=1e-3)
    noisy = measure(FAST, found, 1.0, noise=(1.1, 0.95, 1.02, 0.96))
    assert find_corrections([noisy], may_loosen=()) == {}
    assert find_corrections([measure(FAST, found, 0.95)], may_loosen=()) == {}, "a bound is loosened only where that was asked for"
    assert find_corrections([measure(FAST, found, 0.95)], may_loosen={0})[0] == pytest.approx(0.95, rel=1e-3)
    capped = make_scenario({"throughput_tokens_per_s": {"at_most": 1.2, "relative_to": "parent"}}, batch_sizes=[4])
    assert find_corrections([measure(capped, found, 1.1)], may_loosen=()) == {}, "slower children may be faster by their costs"
    assert find_corrections([measure(capped, found, 0.9)], may_loosen=())[0] == pytest.approx(0.9, rel=1e-3)
    exact = make_scenario({"latency_s": {"equals": 20.0, "within": 0.1}}, batch_sizes=[4])
    for slowdown in (0.9, 1.1):
        assert find_corrections([measure(exact, found, slowdown)], may_loosen=())[0] == pytest.approx(slowdown, rel=1e-3)


@pytest.mark.parametrize("scenario", [FAST, SHORT])
def test_slower_children_are_asked_for_more_until_one_meets_its_bound(scenario: Scenario) -> None:
    trial = run(scenario, 1.1)
    assert trial.tried[0].shortfall > 0.02 and trial.answer is trial.tried[1] and trial.answer.shortfall <= 0.02
    assert trial.answer.corrections[0] == pytest.approx(1.1, rel=1e-3) and "met within 2 %" in trial.ended
    solution = as_asked(trial.answer.solution, scenario, COSTS, PARENTS)
    assert (
        solution.limits[0].at_least == solve(scenario).limits[0].at_least
        and solution.limits[0].at_most == solve(scenario).limits[0].at_most
    )
    rows = trial_rows(trial, scenario, 0.02)
    assert [(r["round"], r["verdict"], r["is_answer"]) for r in rows] == [(0, "missed", False), (1, "met", True)]
    assert rows[0]["asked"] == rows[0]["solved_for"] == rows[1]["asked"] != rows[1]["solved_for"]
    assert "solved for" in trial_words(trial, scenario, 0.02) and "10.0 % slower" in trial_words(trial, scenario, 0.02)


def test_a_child_that_is_as_its_costs_say_is_run_once() -> None:
    trial = run(FAST, 1.0)
    assert len(trial.tried) == 1 and trial.answer.corrections == {} and "solved for" not in trial_words(trial, FAST, 0.02)


def test_a_bound_that_costs_quality_for_nothing_is_loosened() -> None:
    first = solve(FAST)
    assert first.limits[0].slack <= 0.1
    trial = run(FAST, 0.8, tolerance=0.1)
    assert trial.answer.corrections[0] == pytest.approx(0.8, rel=1e-3) and trial.answer.shortfall <= 0.1
    assert trial.answer.solution.objective < first.objective


def test_a_bound_that_does_not_bind_is_not_loosened() -> None:
    slack = make_scenario({"latency_s": {"at_most": 40.0}, "parameters": {"at_most": 0.8, "relative_to": "parent"}}, batch_sizes=[4])
    assert len(run(slack, 0.8).tried) == 1


def test_what_nothing_meets_keeps_what_there_is() -> None:
    hard = make_scenario({"latency_s": {"at_most": 1.05}}, batch_sizes=[4])  # the constant alone takes 1 s
    trial = run(hard, 1.2)
    assert len(trial.tried) == 1 and trial.answer is trial.tried[0]
    assert "nothing meets it" in trial.ended and "can't be met" in trial.ended
    assert "none of 1 children tried meets every bound on time within 2 %; this one misses one by" in trial_words(trial, hard, 0.02)


@pytest.mark.parametrize(
    ("slowdown", "noise", "told"),
    [
        (1.0, (1.0, 1.01, 0.99, 1.0), True),  # half the tolerance and less
        (1.0, (1.1, 0.93, 1.05, 0.96), False),  # met, missed and better are all in the interval
        (1.5, (1.1, 0.93, 1.05, 0.96), True),  # missed, whatever the noise
        (0.5, (1.1, 0.93, 1.05, 0.96), True),  # better than asked, likewise
    ],
)
def test_noise_that_leaves_a_verdict_open_wants_further_turns(slowdown: float, noise: tuple[float, ...], told: bool) -> None:
    (found,) = measure(FAST, solve(FAST), slowdown, noise=noise)
    assert found.is_told(0.02) == told and found.num_turns == 4
    assert turns_wanted([found], 0.02, 12) == (4 if told else 8), "at once no more than twice as many"
    assert turns_wanted([found], 0.02, 5) == (4 if told else 5) and turns_wanted([found], 0.02, 4) == 4


def test_turns_are_wanted_for_half_the_tolerance_and_for_the_bound_that_is_told_worst() -> None:
    (found,) = measure(FAST, solve(FAST), 1.0)
    open_, worse = (replace(found, error=error, low=0.5, high=2.0) for error in (0.011, 0.013))
    assert turns_wanted([open_], 0.02, 12) == math.ceil(4 * 1.1**2) == 5
    assert turns_wanted([open_, worse, found], 0.02, 12) == math.ceil(4 * 1.3**2) == 7
    assert turns_wanted([worse], 0.0, 12) == 8, "no tolerance: as many as there may be, twice as many at once"


def test_of_a_bound_with_two_sides_an_interval_over_both_tells_nothing() -> None:
    exact = make_scenario({"latency_s": {"equals": 20.0, "within": 0.01}}, batch_sizes=[4])
    (found,) = measure(exact, solve(exact), 1.0)
    assert found.is_told(0.02)
    assert not replace(found, error=0.2, low=14.0, measured=20.0, high=28.0).is_told(0.02), "met in the middle, missed at both ends"
    assert not replace(found, error=0.2, low=14.0, measured=24.0, high=28.0).is_told(0.02), "missed throughout, but on both sides"
    assert replace(found, error=0.2, low=22.0, measured=24.0, high=28.0).is_told(0.02)


def test_how_much_better_than_asked_is_told_only_where_a_bound_may_be_loosened() -> None:
    (found,) = measure(FAST, solve(FAST), 1.0)
    over = replace(found, error=0.05, low=1.2, measured=1.3, high=1.4)
    assert not replace(over, asked=replace(over.asked, slack=0.01)).is_told(0.02)
    assert replace(over, asked=replace(over.asked, slack=0.06)).is_told(0.02), "another bound binds: it is met, and that is all"


def test_it_ends_after_its_rounds() -> None:
    grow = {"calls": 0}

    def ever_slower(_: Solution) -> float:
        grow["calls"] += 1
        return 1.05 ** grow["calls"] * 1.1

    trial = run(FAST, ever_slower, rounds=1)
    assert grow["calls"] == len(trial.tried) == 2 and trial.ended == "the search was repeated 1 times"


def test_a_miss_that_may_be_noise_does_not_repeat_the_search_for_the_same_child() -> None:
    def noisy(solution: Solution) -> tuple[MeasuredBound, ...]:
        return measure(FAST, solution, 1.1, noise=(1.5, 0.8, 1.4, 0.85))

    trial = try_scenario(FAST, solve(FAST), measure=noisy, search=solve, rounds=3, tolerance=0.02)
    assert trial.answer.shortfall > 0.02 and len(trial.tried) == 1
    assert trial.ended == "the search found an architecture that was tried already"


def tried(shortfall: float, objective: float) -> Tried:
    (found,) = measure(FAST, solve(FAST), 1.0)
    missed = replace(found, measured=1.2 * (1 - shortfall))
    return Tried(0, {}, replace(solve(FAST), objective=objective), (missed,))


@given(st.lists(st.tuples(st.floats(-0.2, 0.2), st.floats(0, 5)), min_size=1, max_size=5))
def test_of_the_children_that_meet_their_bounds_the_best_is_kept_else_the_nearest(children: list[tuple[float, float]]) -> None:
    all_tried = [tried(*child) for child in children]
    kept = choose(all_tried, FAST, 0.02)
    met = [t for t in all_tried if t.shortfall <= 0.02]
    if met:
        assert kept in met and kept.solution.objective == min(t.solution.objective for t in met)
    else:
        assert kept.shortfall == min(t.shortfall for t in all_tried)


def test_where_a_quantity_is_optimised_its_best_value_is_kept() -> None:
    inverse = make_scenario(
        {"ttft_s": {"at_most": 12.0}}, objective={"maximize": "throughput", "subject_to": {"kl": {"at_most": 2.0}}}, batch_sizes=[4]
    )
    solution = solve(inverse)
    (found,) = measure(inverse, solution, 1.0)
    slow, fast = (
        Tried(0, {}, replace(solution, notes={**solution.notes, "value": v}, objective=o), (found,)) for v, o in ((5, 0.1), (6, 0.2))
    )
    assert choose([slow, fast], inverse, 0.02) is fast
