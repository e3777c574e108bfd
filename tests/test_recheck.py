"""Solutions added up again: each kind of fault is found, and what a search answers has none."""

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from search_instances import PARENT, SECONDS, TABLE, make_scenario, simple_costs, simple_table
from wide_instances import Instance, wide_instances

from puzzle_dag.search.answer import answer_scenario
from puzzle_dag.search.limits import ScenarioError
from puzzle_dag.search.recheck import recheck_solutions
from puzzle_dag.search.solution import Solution

COSTS, SCORES = {"t": simple_costs(3, seconds=SECONDS)}, simple_table(3, TABLE)
FIRST = make_scenario({"latency_s": {"at_most": 0.9, "relative_to": "parent"}})
ASKED = make_scenario(
    {"latency_s": {"at_most": 0.9, "relative_to": "parent"}, "num_attention_layers": {"at_least": 1}},
    objective={"minimize": "kl", "subject_to": {"lm_loss": {"at_most": 2.5}}},
    structure={
        "fixed": {0: "*/w*"},
        "forbidden": {2: "noop/noop"},
        "max_distinct": 2,
        "different_from": ["first"],
        "min_different_layers": 2,
    },
    pool={"num_solutions": 2, "min_different_layers": 2},
    batch_sizes=[4],
)


def recheck(solutions: list[Solution], *, is_refined: bool = False) -> str:
    found = recheck_solutions(SCORES, COSTS, ASKED, PARENT, solutions, earlier={"first": FIRST}, is_refined=is_refined)
    return "; ".join(found.wrong)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(wide_instances())
def test_what_a_search_answers_holds(instance: Instance) -> None:
    table, costs, scenario = instance
    try:
        solutions = answer_scenario(table, costs, scenario, PARENT)
    except ScenarioError:
        return
    found = recheck_solutions(table, costs, scenario, PARENT, solutions)
    assert found.wrong == () and found.limits == solutions[0].limits


def with_blocks(*blocks: str) -> Callable[[list[Solution]], list[Solution]]:
    """Replace the best solution's blocks by scored ones, and say what their scores add up to."""

    def change(solutions: list[Solution]) -> list[Solution]:
        picks = [next(s for s in SCORES[i] if s.block == block) for i, block in enumerate(blocks)]
        choices = tuple(replace(c, block=s.block, digest=s.digest, score=s.kl) for c, s in zip(solutions[0].choices, picks, strict=True))
        return [replace(solutions[0], choices=choices, objective=sum(s.kl for s in picks), bound=0.0)]

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_blocks("noop/noop", "kv1/w64", "kv1/w64"), "layer 0 has noop/noop, which `fixed` or `forbidden` rules out"),
        (with_blocks("kv1/w64", "kv1/w64", "noop/noop"), "layer 2 has noop/noop, which `fixed` or `forbidden` rules out"),
        (with_blocks("kv1/w64", "kv4/w32", "kv4/w64"), "3 different blocks where 2 may be"),
        (with_blocks("kv4/w64", "kv4/w64", "kv4/w64"), r"latency_s is 13; asked for latency_s at most 11\.7"),
        (with_blocks("kv4/w64", "noop/noop", "noop/noop"), r"lm_loss is 4; asked for lm_loss at most 2\.5"),
        (lambda found: [found[0], found[0]], "solutions 1 and 2 differ in 0 layers, not 2"),
        (lambda found: [found[0], replace(found[1], objective=0.0)], "solution 2: kl is .*, not 0"),
        (lambda found: [replace(found[0], bound=found[0].objective + 1)], "bound"),
        (lambda found: [replace(found[0], batch=1)], "batch 1 is none that may serve"),
        (lambda found: [replace(found[0], batch=3)], "batch is 3.*not measured"),
        (lambda found: [replace(found[0], choices=found[0].choices[:2])], r"covers the layers \[0, 1\], not each of 3 once"),
        (lambda found: [replace(found[0], choices=(replace(found[0].choices[0], digest="x"), *found[0].choices[1:]))], "none of those"),
    ],
)
def test_every_fault_of_a_solution_is_found(change: Callable[[list[Solution]], list[Solution]], message: str) -> None:
    solutions = answer_scenario(SCORES, COSTS, ASKED, PARENT, earlier={"first": FIRST})
    assert len(solutions) == 2 and recheck(solutions) == ""
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(recheck(change(solutions)))


def test_a_refinement_may_come_to_the_child_that_the_search_had_to_differ_from() -> None:
    solutions = answer_scenario(SCORES, COSTS, ASKED, PARENT, earlier={"first": FIRST})
    first = answer_scenario(SCORES, COSTS, FIRST, PARENT)[0]
    measured = replace(solutions[0], choices=first.choices, objective=0.123, bound=None, status="feasible")
    assert recheck([measured], is_refined=True) == ""
    assert "0 layers differ from an answer that 2 must differ from" in recheck([measured])
