"""The frontier: the parent first, then the least score that each bound allows."""

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from search_instances import PARENT, SECONDS, TABLE, instances, make_scenario, simple_costs, simple_table

from puzzle_dag.config import Scenario
from puzzle_dag.piece_costs import PieceCosts
from puzzle_dag.search.candidates import AnyLimit
from puzzle_dag.search.frontier import sweep, with_bound
from puzzle_dag.search.limits import ScenarioError
from puzzle_dag.search.problem import Memory, Problem, is_met, keep_point, solve_points
from puzzle_dag.search.program import GAP, Outcome
from puzzle_dag.search.score import BlockScore
from puzzle_dag.search.solve import prepare, solve_scenario
from puzzle_dag.search.solver import Solver

Instance = tuple[list[list[BlockScore]], PieceCosts, Scenario]

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
    points = sweep(SCORES, COSTS, scenario, PARENT, constraint="latency_s", values=[0.5, 9.0], progress=lambda *args: told.append(args))
    assert [p.bound for p in points] == [None, 9.0]
    assert told == [(1, 2, "points"), (2, 2, "points")]


def test_only_a_one_sided_bound_can_be_swept() -> None:
    scenario = make_scenario({"latency_s": {"at_most": 5.0, "at_least": 1.0}})
    for constraint in ("latency_s", "memory_bytes"):
        with pytest.raises(ScenarioError, match=f"{constraint} must have one bound"):
            with_bound(scenario, constraint, 2.0)


def test_what_a_looser_bound_settled_is_not_solved_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tighter bound that the answer meets already costs nothing; a looser one is solved anew."""
    solved: list[Outcome] = []
    plain = Solver.solve

    def counting(solver: Solver, *args: object, **kwargs: object) -> Outcome:
        solved.append(plain(solver, *args, **kwargs))
        return solved[-1]

    monkeypatch.setattr(Solver, "solve", counting)
    scenario = make_scenario({"latency_s": {"at_most": 1.0, "relative_to": "parent"}}, batch_sizes=[4])
    points = sweep(SCORES, COSTS, scenario, PARENT, constraint="latency_s", values=[0.95, 0.93, 0.6, 0.95])
    assert [p.objective for p in points[1:]] == [points[1].objective, points[1].objective, points[3].objective, points[1].objective]
    assert points[3].objective > points[1].objective and len(solved) == 3


@settings(max_examples=200, deadline=None)
@given(instances(), st.lists(st.sampled_from(["0.5", "0.8", "1", "1.1", "1.5"]), min_size=1, max_size=3))
def test_looking_for_the_best_point_alone_finds_it(instance: Instance, factors: list[str]) -> None:
    """Batch sizes that are worse may go unsolved, and solvers are kept from one bound to the next: the answer is the same."""
    table, costs, scenario = instance
    try:
        first = Problem.of(scenario, prepare(table, {"t": costs}, scenario, PARENT), {"t": costs})
    except ScenarioError:
        return
    memory = Memory()
    for factor in factors:
        moved = [[_times(limit, Fraction(factor)) for limit in first.limits(point)] for point in first.points]
        problem = first.with_limits(moved)
        every, found = solve_points(problem), solve_points(problem, memory=memory, only_best=True)
        assert is_met(found) == is_met(every)
        if not is_met(every):
            continue
        kept = keep_point(problem, every)
        assert keep_point(problem, found) == kept and found[kept].objective == pytest.approx(every[kept].objective, abs=1e-12)
        for one, other in zip(found, every, strict=True):
            if one.status == "worse":
                # Of a point that nothing meets, the relaxation may be met, and worse.
                assert other.status == "infeasible" or other.objective >= one.bound - 1e-12
                assert one.bound > every[kept].objective * (1 + GAP) - 1e-12
            else:
                assert one.status == other.status


def _times(limit: AnyLimit, factor: Fraction) -> AnyLimit:
    for side in ("at_least", "at_most"):
        if (bound := getattr(limit, side)) is not None:
            limit = limit.with_bound(side, bound * factor)
    return limit


def test_of_a_sweep_only_the_best_batch_size_is_solved_to_the_end() -> None:
    scenario = make_scenario({"throughput_tokens_per_s": {"at_least": 1.2, "relative_to": "parent"}})
    points = sweep(SCORES, COSTS, scenario, PARENT, constraint="throughput_tokens_per_s", values=[1.5])
    solution = points[1].solution
    assert solution is not None and solution.status == "optimal" and solution.gap is not None and solution.gap <= GAP
    assert {b.status for b in solution.batches} <= {"optimal", "worse", "infeasible"}
    assert all(b.objective is None for b in solution.batches if b.status != "optimal")
