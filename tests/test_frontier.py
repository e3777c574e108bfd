"""The frontier: the parent first, then the least score that each bound allows."""

import pytest
from search_instances import PARENT, SECONDS, TABLE, make_scenario, simple_costs, simple_table

from puzzle_dag.search import problem
from puzzle_dag.search.frontier import sweep, with_bound
from puzzle_dag.search.limits import ScenarioError
from puzzle_dag.search.solve import solve_scenario

COSTS = {"t": simple_costs(3, seconds=SECONDS)}
SCORES = simple_table(3, TABLE)


@pytest.mark.parametrize(
    ("constraint", "side", "values"),
    [
        ("throughput_tokens_per_s", "at_least", [1.0, 1.2, 1.5, 2.0]),
        ("latency_s", "at_most", [1.0, 0.8, 0.6, 0.4]),
        ("memory_bytes", "at_most", [1.0, 0.9, 0.6, 0.4]),
    ],
)
def test_each_point_is_the_scenario_solved_at_that_bound(constraint: str, side: str, values: list[float]) -> None:
    scenario = make_scenario({constraint: {side: values[0], "relative_to": "parent"}, "parameters": {"at_least": 10}})
    points = sweep(SCORES, COSTS, scenario, PARENT, constraint=constraint, values=values)
    assert [p.bound for p in points] == [None, *values]
    parent = points[0]
    assert (parent.objective, parent.solution, parent.batch) == (0.0, None, 4)
    for value, point in zip(values, points[1:], strict=True):
        alone = make_scenario({constraint: {side: value, "relative_to": "parent"}, "parameters": {"at_least": 10}})
        expected = solve_scenario(SCORES, COSTS, alone, PARENT)
        assert (point.objective, point.batch) == (expected.objective, expected.batch)
        assert point.solution is not None and point.solution.digest == expected.digest
        assert point.to_json()["architecture"] == [c.block for c in expected.choices]
    objectives = [p.objective for p in points[1:]]
    assert objectives == sorted(objectives), "a tighter bound never scores better"
    assert objectives[0] == 0.0 < objectives[-1]


def test_a_bound_that_nothing_meets_gives_no_point() -> None:
    scenario = make_scenario({"latency_s": {"at_most": 5.0}})
    told: list[tuple[int, int, str]] = []
    points = sweep(
        SCORES, COSTS, scenario, PARENT, constraint="latency_s", values=[0.5, 9.0], progress=lambda *args: told.append(args)
    )
    assert [p.bound for p in points] == [None, 9.0]
    assert told == [(1, 2, "points"), (2, 2, "points")]


def test_only_a_one_sided_bound_can_be_swept() -> None:
    scenario = make_scenario({"latency_s": {"at_most": 5.0, "at_least": 1.0}})
    for constraint in ("latency_s", "memory_bytes"):
        with pytest.raises(ScenarioError, match=f"{constraint} must have one bound"):
            with_bound(scenario, constraint, 2.0)


def test_what_a_looser_bound_settled_is_not_solved_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tighter bound that the answer meets already costs nothing; a looser one is solved anew."""
    solved: list[float] = []
    plain = problem.minimise

    def counting(*args: object, **kwargs: object) -> object:
        solved.append(1)
        return plain(*args, **kwargs)

    monkeypatch.setattr(problem, "minimise", counting)
    scenario = make_scenario({"latency_s": {"at_most": 1.0, "relative_to": "parent"}}, batch_sizes=[4])
    points = sweep(SCORES, COSTS, scenario, PARENT, constraint="latency_s", values=[0.95, 0.93, 0.6, 0.95])
    assert [p.objective for p in points[1:]] == [points[1].objective, points[1].objective, points[3].objective, points[1].objective]
    assert points[3].objective > points[1].objective and len(solved) == 3
