"""A smallest conflict: the one that trying every set would find, for a small part of the solves, and only where somebody is told."""

from collections.abc import Sequence
from itertools import combinations, product
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from search_instances import PARENT, SECONDS, TABLE, make_scenario, simple_costs, simple_table

from puzzle_dag.search import conflict
from puzzle_dag.search.conflict import Feasibility, smallest_conflict
from puzzle_dag.search.foreign_candidates import ForeignCandidates, ForeignLibrary, ForeignLimit
from puzzle_dag.search.frontier import sweep
from puzzle_dag.search.infeasible import InfeasibleScenarioError
from puzzle_dag.search.limits import as_written
from puzzle_dag.search.pool import solve_pool
from puzzle_dag.search.program import Outcome
from puzzle_dag.search.solve import prepare, solve_scenario

SCORES, COSTS = simple_table(2, TABLE), {"t": simple_costs(2, seconds=SECONDS)}


@pytest.fixture
def solves(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many programs are solved to explain something, in the one entry."""
    count, minimise = [0], conflict.minimise

    def counted(*arguments: object, **options: object) -> Outcome:
        count[0] += 1
        return minimise(*arguments, **options)

    monkeypatch.setattr(conflict, "minimise", counted)
    return count


def first_conflict(library: ForeignLibrary, limits: Sequence[ForeignLimit]) -> tuple[tuple[ForeignLimit, ...], int]:
    """The first set that can't be met, the smallest first, and how many sets had to be tried for it."""
    totals = [{x.name: sum(pick[x.name] for pick in picks) for x in limits} for picks in product(*(v.values() for v in library.values()))]
    # The limits that each choice meets; a set can be met if one of them holds it.
    met = {frozenset(i for i, x in enumerate(limits) if total[x.name] <= x.at_most) for total in totals}
    tried = 0
    for size in range(len(limits) + 1):
        for subset in combinations(range(len(limits)), size):
            tried += 1
            if not any(own.issuperset(subset) for own in met):
                return tuple(limits[i] for i in subset), tried
    return (), tried


def crowded(*sizes: int) -> tuple[ForeignLibrary, list[ForeignLimit]]:
    """In each layer every variant has one number too many, so that the layer's limits conflict, and no fewer of them."""
    names = [[f"m{layer}_{i}" for i in range(size)] for layer, size in enumerate(sizes)]
    flat = [name for own in names for name in own]
    library = {str(layer): {name: {other: float(other == name) for other in flat} for name in own} for layer, own in enumerate(names)}
    return library, [ForeignLimit(name, at_most=as_written(0.0)) for name in flat]


def drawn(seed: int, tightness: float) -> tuple[ForeignLibrary, list[ForeignLimit]]:
    """Three layers of eight variants with twelve numbers each, and a bound for each of these."""
    random, names = Random(seed), [f"m{i}" for i in range(12)]
    library = {str(layer): {str(v): {name: random.randint(0, 99) for name in names} for v in range(8)} for layer in range(3)}
    return library, [ForeignLimit(name, at_most=as_written(float(round(random.uniform(0.7, 1.3) * tightness * 150)))) for name in names]


@pytest.mark.parametrize(
    ("instance", "size", "num_sets", "most_solves"),
    [
        (crowded(5, 4, 3), 3, 299, 40),
        (crowded(7, 5), 5, 1586, 40),
        (crowded(12), 12, 4096, 40),
        (drawn(2, 0.9), 4, 480, 40),
        (drawn(0, 1.1), 6, 1885, 40),
    ],
)
def test_twelve_limits_take_a_small_part_of_the_solves(
    solves: list[int], instance: tuple[ForeignLibrary, list[ForeignLimit]], size: int, num_sets: int, most_solves: int
) -> None:
    """Solving for one set after the other, the smallest first, would take `num_sets` solves."""
    expected, tried = first_conflict(*instance)
    assert (len(expected), tried) == (size, num_sets)
    found = smallest_conflict(Feasibility(ForeignCandidates.of(instance[0])), instance[1])
    assert found is not None and found.limits == expected
    assert 0 < solves[0] <= most_solves


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_equals_trying_every_set(data: st.DataObject) -> None:
    names = [f"m{i}" for i in range(data.draw(st.integers(1, 5)))]
    numbers = st.fixed_dictionaries({name: st.integers(0, 3) for name in names})
    layers = data.draw(st.lists(st.lists(numbers, min_size=1, max_size=4), min_size=1, max_size=3))
    library = {str(i): {str(k): own for k, own in enumerate(variants)} for i, variants in enumerate(layers)}
    limits = [ForeignLimit(name, at_most=as_written(float(data.draw(st.integers(0, 4))))) for name in names]
    found = smallest_conflict(Feasibility(ForeignCandidates.of(library)), limits)
    expected, _ = first_conflict(library, limits)
    assert (() if found is None else found.limits) == expected


def test_the_structure_is_a_member_of_a_conflict_that_is_none_without_it() -> None:
    """Both layers alike take 4.5 s at least with an attention; without that, one layer alone can be left out."""
    structure = {"homogeneous": True, "forbidden": {"0": "noop/noop"}}
    scenario = make_scenario({"latency_s": {"at_most": 5.0}}, structure=structure)
    with pytest.raises(InfeasibleScenarioError) as raised:
        solve_scenario(SCORES, COSTS, scenario, PARENT)
    error = raised.value
    assert error.conflicting == ("latency_s", "structure") and error.constraint == "latency_s" and error.best_value == 7.0
    assert [(row["constraint"], row["best"]) for row in error.rows] == [("latency_s", 7.0), ("structure", None)]
    assert error.rows[1]["asked"] == "no noop/noop in layer 0, the same block in every layer"
    assert "the best value with structure met is 7" in str(error)
    assert "Each of latency_s, structure could be met without the others" in str(error)


def test_a_conflict_of_limits_alone_does_not_blame_the_structure() -> None:
    scenario = make_scenario({"latency_s": {"at_most": 0.5}}, structure={"max_distinct": 1})
    with pytest.raises(InfeasibleScenarioError) as raised:
        solve_scenario(SCORES, COSTS, scenario, PARENT)
    assert raised.value.conflicting == ("latency_s",) and "structure asks" not in str(raised.value)


def test_nothing_is_explained_where_nobody_is_told(solves: list[int]) -> None:
    scenario = make_scenario({"latency_s": {"at_most": 5.0}})
    points = sweep(SCORES, COSTS, scenario, PARENT, constraint="latency_s", values=[0.1, 9.0, 0.2])
    assert [point.bound for point in points] == [None, 9.0]
    everything = make_scenario({"latency_s": {"at_most": 1.5}}, pool={"num_solutions": 9})
    assert len(solve_pool(prepare(SCORES, COSTS, everything, PARENT), COSTS, everything)) == 1, "only no layers at all take so little"
    assert solves == [0]
    with pytest.raises(InfeasibleScenarioError):
        nothing = make_scenario({"latency_s": {"at_most": 0.5}}, pool={"num_solutions": 2})
        solve_pool(prepare(SCORES, COSTS, nothing, PARENT), COSTS, nothing)
    assert solves[0] > 0
