"""All that a scenario can ask for, against brute force: several targets, equalities, weights, budgets, structure, pools, loosening."""

import json
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from search_instances import PARENT, SECONDS, TABLE, make_scenario, simple_costs, simple_table
from wide_instances import Instance, ParentDoesNotFit, answers, best, is_allowed, wide_instances

from puzzle_dag.config import PoolSettings, Scenario, StructureSettings
from puzzle_dag.search.answer import answer_scenario
from puzzle_dag.search.infeasible import InfeasibleScenarioError
from puzzle_dag.search.limits import ScenarioError
from puzzle_dag.search.score import BlockScore
from puzzle_dag.search.solution import Solution
from puzzle_dag.search.solve import solve_scenario
from puzzle_dag.search.task_scores import GradedBlockScore, score_of_row

COSTS = {"t": simple_costs(3, seconds=SECONDS), "u": replace(simple_costs(3, seconds={**SECONDS, "kv1": 0.25}), target="u")}
SCORES = simple_table(3, TABLE)
slow = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def reached(scenario: Scenario, solution: Solution) -> float:
    return solution.objective if scenario.objective.quantity is None else solution.notes["value"]


@slow
@given(wide_instances())
def test_equals_brute_force(instance: Instance) -> None:
    table, costs, scenario = instance
    try:
        found = dict(answers(instance)) and [value for _, value in answers(instance)]
    except ParentDoesNotFit:
        # The structure is looked at first.
        has_blocks = all(any(is_allowed(scenario, layer, s.block) for s in scores) for layer, scores in enumerate(table))
        with pytest.raises(ScenarioError, match="parent needs" if has_blocks else "no block is left"):
            solve_scenario(table, costs, scenario, PARENT)
        return
    if not found:
        with pytest.raises(ScenarioError) as raised:
            solve_scenario(table, costs, scenario, PARENT)
        if isinstance(raised.value, InfeasibleScenarioError):
            assert len(raised.value.rows) == len(raised.value.conflicting)
        else:
            assert "structure" in str(raised.value)
        return
    solution = solve_scenario(table, costs, scenario, PARENT)
    assert solution.status == "optimal"
    assert reached(scenario, solution) == pytest.approx(best(scenario, found), abs=1e-9)
    assert solution.architecture in {architecture for architecture, _ in answers(instance)}
    assert [x.name for x in solution.limits] == [name for name, _ in scenario.bounds]
    assert Solution.from_json(json.loads(json.dumps(solution.to_json(), allow_nan=False))) == solution


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
@given(wide_instances())
def test_loosening_equals_brute_force(instance: Instance) -> None:
    table, costs, scenario = instance
    try:
        found = [value for _, value in answers(instance)]
    except ParentDoesNotFit:
        assume(False)
    assume(found)
    (solution, *_) = answer_scenario(table, costs, scenario, PARENT)
    sides = [(i, s) for i, x in enumerate(solution.limits) for s in ("at_least", "at_most") if getattr(x, s) is not None]
    expected = [best(scenario, [v for _, v in answers(instance, loosened=side)]) for side in sides]
    own = [entry.value for entry in solution.loosened if entry.constraint not in scenario.objective.subject_to]
    assert sorted(own) == pytest.approx(sorted(expected), abs=1e-9)
    assert all(entry.gain >= 0 for entry in solution.loosened)
    assert len(solution.loosened) == len(sides) + len(scenario.objective.subject_to)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
@given(wide_instances(), st.integers(1, 2))
def test_a_scenario_differs_from_an_earlier_ones_answer(instance: Instance, least: int) -> None:
    table, costs, scenario = instance
    first = scenario.model_copy(update={"name": "first"})
    structure = scenario.structure.model_copy(update={"different_from": ("first",), "min_different_layers": min(least, len(table))})
    second = scenario.model_copy(update={"structure": structure})
    try:
        assume(list(answers(instance)))
    except ParentDoesNotFit:
        assume(False)
    earlier = solve_scenario(table, costs, first, PARENT).architecture
    left = [value for _, value in answers((table, costs, second), earlier=[earlier])]
    if not left:
        with pytest.raises(InfeasibleScenarioError):
            solve_scenario(table, costs, second, PARENT, earlier={"first": first})
        return
    solution = solve_scenario(table, costs, second, PARENT, earlier={"first": first})
    assert reached(second, solution) == pytest.approx(best(second, left), abs=1e-9)


def test_bounds_on_two_targets_hold_at_once_each_at_its_own_best_batch() -> None:
    """On u kv1 saves more; the answer must meet both, and the batch size on u is chosen, not given."""
    constraints = {"latency_s": [{"at_most": 0.9, "relative_to": "parent"}, {"target": "u", "at_most": 0.75, "relative_to": "parent"}]}
    solution = solve_scenario(SCORES, COSTS, make_scenario(constraints), PARENT)
    assert [x.target for x in solution.limits] == ["t", "u"]
    assert all(x.value <= x.at_most for x in solution.limits)
    assert set(solution.batch_sizes) == {"t", "u"} and len(solution.batches) == 4
    alone = solve_scenario(SCORES, COSTS, make_scenario({"latency_s": constraints["latency_s"][0]}), PARENT)
    assert alone.objective < solution.objective


def test_throughput_elsewhere_is_met_at_the_batch_size_that_can() -> None:
    """24 tokens a second on u are out of reach at batch 1 (16 tokens), and no matter at batch 4."""
    constraints = {"throughput_tokens_per_s": {"target": "u", "at_least": 4.0}, "parameters": {"at_most": 1e9}}
    solution = solve_scenario(SCORES, COSTS, make_scenario(constraints), PARENT)
    assert (solution.objective, solution.batch_elsewhere) == (0.0, {"u": 4})
    fixed = {"target": "u", "at_least": 4.0, "at": {"batch": 1}}
    solution = solve_scenario(SCORES, COSTS, make_scenario({"throughput_tokens_per_s": fixed}), PARENT)
    assert solution.objective > 0 and solution.batch_elsewhere == {}


@pytest.mark.parametrize(("equals", "within", "num"), [(2, None, 2), (2, 0.5, 3), (0.0, None, 0)])
def test_an_equality_of_a_count(equals: float, within: float | None, num: int) -> None:
    bound = {"equals": equals, **({"within": within} if within else {})}
    solution = solve_scenario(SCORES, COSTS, make_scenario({"num_attention_layers": bound}), PARENT)
    assert solution.predicted["num_attention_layers"] == num


def test_a_weight_for_a_score_that_the_table_lacks_names_what_is_there() -> None:
    table = [[GradedBlockScore(*(getattr(s, f) for f in BlockScore.__slots__), tasks={"hellaswag": 0.5}) for s in row] for row in SCORES]
    scenario = make_scenario({"latency_s": {"at_most": 5.0}}, objective={"minimize": {"kl": 1.0, "helaswag": 1.0}})
    with pytest.raises(
        ScenarioError, match=r"no score 'helaswag'; did you mean 'hellaswag'\? All blocks have kl, lm_loss, top1_loss, hellaswag"
    ):
        solve_scenario(table, COSTS, scenario, PARENT)
    with pytest.raises(ScenarioError, match=r"no score 'helaswag'\. All blocks have kl, lm_loss, top1_loss$"):
        solve_scenario(SCORES, COSTS, scenario, PARENT)


def test_columns_beside_the_losses_are_scores_on_tasks() -> None:
    row = {f: getattr(SCORES[0][0], f) for f in BlockScore.__slots__}
    assert score_of_row(row) == SCORES[0][0]
    assert score_of_row({**row, "hellaswag": 0.5, "not_graded": None}) == GradedBlockScore(**row, tasks={"hellaswag": 0.5})


def test_a_pool_comes_with_the_answer_and_what_loosening_buys() -> None:
    scenario = make_scenario({"latency_s": {"at_most": 0.9, "relative_to": "parent"}}, pool={"num_solutions": 3, "min_different_layers": 2})
    found = answer_scenario(SCORES, COSTS, scenario, PARENT)
    assert len(found) == 3 and [s.objective for s in found] == sorted(s.objective for s in found)
    for i, one in enumerate(found):
        for other in found[:i]:
            assert sum(a != b for a, b in zip(one.architecture, other.architecture, strict=True)) >= 2
    assert found[0].loosened[0].is_binding and not found[1].loosened


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"structure": StructureSettings(different_from=("x",))}, "structure.different_from names 'x', which was not given"),
        ({"structure": StructureSettings(min_different_layers=4, different_from=("s",))}, "min_different_layers is 4; the parent has 3"),
        ({"pool": PoolSettings(min_different_layers=4)}, "pool.min_different_layers is 4; the parent has 3 layers"),
        ({"batch_sizes": {"at_least": 5}}, "none of target t's is left; measured are 1, 4"),
    ],
)
def test_what_means_nothing_is_refused(fields: dict[str, object], message: str) -> None:
    scenario = make_scenario({"latency_s": {"at_most": 9.0}})
    scenario = Scenario.model_validate({**scenario.model_dump(), **fields})
    earlier = {"s": make_scenario({"latency_s": {"at_most": 9.0}})}
    with pytest.raises(ScenarioError, match=message):
        answer_scenario(SCORES, COSTS, scenario, PARENT, earlier=earlier)


def test_an_earlier_scenario_without_an_answer_is_named() -> None:
    scenario = make_scenario({}, structure={"different_from": "tight"})
    tight = make_scenario({"latency_s": {"at_most": 0.1}})
    with pytest.raises(ScenarioError, match="must differ from scenario tight, which has no answer"):
        solve_scenario(SCORES, COSTS, scenario, PARENT, earlier={"tight": tight})
