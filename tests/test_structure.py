"""Structure, pools and loosened bounds against brute force."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from itertools import combinations, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from search_instances import (
    BATCHES,
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

from puzzle_dag.architecture import Architecture, Block
from puzzle_dag.config import PoolSettings, Scenario, StructureSettings
from puzzle_dag.piece_costs import PieceCosts
from puzzle_dag.search.candidates import Candidates
from puzzle_dag.search.conflict import STRUCTURE
from puzzle_dag.search.infeasible import InfeasibleScenarioError
from puzzle_dag.search.limits import ScenarioError
from puzzle_dag.search.loosen import loosen_each
from puzzle_dag.search.pool import solve_pool
from puzzle_dag.search.problem import Problem
from puzzle_dag.search.score import BlockScore
from puzzle_dag.search.solve import prepare, solve_candidates, solve_scenario
from puzzle_dag.search.structure import Structure

Instance = tuple[list[list[BlockScore]], PieceCosts, Scenario]


def feasible(instance: Instance) -> dict[Architecture, float]:
    """Every architecture that meets the constraints at some batch size, with its objective; ScenarioError as the search."""
    table, costs, scenario = instance
    found = {}
    for batch in BATCHES if scenario.batch_sizes == "all" else scenario.batch_sizes:
        bounds = plain_bounds(scenario, costs, len(table), batch)
        for picks in product(*table):
            architecture = tuple(Block.parse(s.block) for s in picks)
            if meets(costs, architecture, bounds):
                found[architecture] = plain_objective(table, scenario.objective.minimize, picks)
    return found


def differences(first: Architecture, second: Architecture) -> int:
    return sum(a != b for a, b in zip(first, second, strict=True))


def check_conflict(error: InfeasibleScenarioError, instance: Instance, fits: Callable[[Architecture], bool]) -> None:
    """It can't be met, any set with a member less can, and each nearest value is what brute force finds."""
    table, costs, scenario = instance
    bounds = {b[0]: b for b in plain_bounds(scenario, costs, len(table), error.batch)}
    architectures = [tuple(Block.parse(s.block) for s in picks) for picks in product(*table)]

    def left(names: Sequence[str]) -> list[Architecture]:
        asked = [bounds[name] for name in names if name in bounds]
        return [a for a in architectures if meets(costs, a, asked) and (STRUCTURE not in names or fits(a))]

    assert error.conflicting and not left(error.conflicting)
    assert all(left(names) for names in combinations((*bounds, STRUCTURE), len(error.conflicting) - 1))
    assert set(error.nearest) == set(error.conflicting) - {STRUCTURE} and len(error.rows) == len(error.conflicting)
    for row in error.rows:
        if row["constraint"] != STRUCTURE:
            _, batch, length, *_ = bounds[row["constraint"]]
            others = left(str(row["while met"]).split(", "))
            assert any(row["best"] == pytest.approx(float(plain_value(row["constraint"], costs, a, batch, length))) for a in others)


PATTERNS = ("kv4/*", "*/noop", "noop/*", "*/w64", "kv1/w32", "*")


@st.composite
def structures(draw: st.DrawFn) -> Structure:
    return Structure(
        fixed=draw(st.dictionaries(st.just(0), st.sampled_from(PATTERNS))),
        forbidden=draw(st.dictionaries(st.sampled_from([None, 0]), st.lists(st.sampled_from(PATTERNS[:-1]), max_size=2))),
        homogeneous=draw(st.integers(0, 5)) == 0,
        max_distinct=draw(st.sampled_from([None, 1, 2])),
        different_from=draw(st.sampled_from([(), (PARENT,)])),
        min_different_layers=draw(st.integers(1, 3)),
    )


@settings(max_examples=250, deadline=None)
@given(instances(), structures())
def test_structure_equals_brute_force(instance: Instance, structure: Structure) -> None:
    table, costs, scenario = instance
    num_layers = len(table)
    # `different_from` was drawn for one layer: stretch it over this instance's.
    structure = Structure(
        structure.fixed,
        structure.forbidden,
        structure.homogeneous,
        structure.max_distinct,
        tuple((PARENT,) * num_layers for _ in structure.different_from),
        min(structure.min_different_layers, num_layers),
    )

    def fits(architecture: Architecture) -> bool:
        names = [b.name for b in architecture]
        for layer, name in enumerate(names):
            bad = [*structure.forbidden.get(None, ()), *structure.forbidden.get(layer, ())]
            if not fnmatchcase(name, structure.fixed.get(layer, "*")) or any(fnmatchcase(name, p) for p in bad):
                return False
        most = 1 if structure.homogeneous else structure.max_distinct or num_layers
        far = all(differences(architecture, other) >= structure.min_different_layers for other in structure.different_from)
        return len(set(names)) <= most and far

    try:
        values = [value for architecture, value in feasible(instance).items() if fits(architecture)]
    except ScenarioError:
        return
    if not values:
        with pytest.raises(ScenarioError) as raised:
            solve_candidates(structure.apply(Candidates.of(table, PARENT)), {"t": costs}, scenario)
        if isinstance(raised.value, InfeasibleScenarioError):
            check_conflict(raised.value, instance, fits)
        return
    solution = solve_candidates(structure.apply(Candidates.of(table, PARENT)), {"t": costs}, scenario)
    assert solution.objective == pytest.approx(min(values), abs=1e-9)
    assert fits(solution.architecture)
    for picks in product(*table):
        architecture = tuple(Block.parse(s.block) for s in picks)
        assert (structure.broken_by(architecture) == []) == fits(architecture)


@settings(max_examples=80, deadline=None)
@given(instances(), st.integers(1, 4), st.integers(1, 3))
def test_a_pool_is_the_best_then_the_best_that_differs(instance: Instance, num_solutions: int, least: int) -> None:
    table, costs, scenario = instance
    least = min(least, len(table))
    asked = PoolSettings(num_solutions=num_solutions, min_different_layers=least)
    scenario = scenario.model_copy(update={"pool": asked})
    candidates = prepare(table, {"t": costs}, scenario, PARENT)
    try:
        left = feasible(instance)
    except ScenarioError:
        return
    if not left:
        with pytest.raises(InfeasibleScenarioError):
            solve_pool(candidates, {"t": costs}, scenario)
        return
    pool = solve_pool(candidates, {"t": costs}, scenario)
    for solution in pool:
        assert solution.objective == pytest.approx(min(left.values()), abs=1e-9)
        left = {a: v for a, v in left.items() if differences(a, solution.architecture) >= least}
    assert len(pool) == num_solutions or not left


def test_homogeneous_takes_one_block_everywhere() -> None:
    table, costs = simple_table(4, TABLE), {"t": simple_costs(4, seconds=SECONDS)}
    scenario = make_scenario({"latency_s": {"at_most": 0.8, "relative_to": "parent"}})
    candidates = Structure(homogeneous=True).apply(Candidates.of(table, PARENT))
    assert {c.block for c in solve_candidates(candidates, costs, scenario).choices} == {"kv1/w64"}


@pytest.mark.parametrize(
    ("structure", "message"),
    [
        (Structure(fixed={7: "*"}), "layer 7 isn't there; the parent has layers 0 to 1"),
        (Structure(fixed={1: "kv3/*"}), "no block is left for layer 1; it has kv4/w64"),
        (Structure(max_distinct=0), "max_distinct is 0"),
    ],
)
def test_a_structure_that_means_nothing_is_refused(structure: Structure, message: str) -> None:
    with pytest.raises(ScenarioError, match=message):
        structure.apply(Candidates.of(simple_table(2, TABLE), PARENT))


def test_a_structure_that_allows_nothing_says_so() -> None:
    structure = Structure(fixed={0: PARENT.name, 1: "noop/noop"}, homogeneous=True)
    candidates = structure.apply(Candidates.of(simple_table(2, TABLE), PARENT))
    with pytest.raises(InfeasibleScenarioError, match=r"structure .* allows no architecture") as raised:
        solve_candidates(candidates, {"t": simple_costs(2, seconds=SECONDS)}, make_scenario({"latency_s": {"at_most": 90.0}}))
    assert raised.value.constraint is None


def test_loosening_tells_which_bound_binds_and_what_it_would_buy() -> None:
    table, costs = simple_table(4, TABLE), {"t": simple_costs(4, seconds=SECONDS)}
    scenario = make_scenario({"latency_s": {"at_most": 14.0}, "parameters": {"at_most": 1e6}, "kv_bytes_per_token": {"at_least": 1}})
    solution = solve_scenario(table, costs, scenario, PARENT)
    assert solution.objective == pytest.approx(0.3)  # 17 s for the parent; each kv1 saves 1 s
    loosened = loosen_each(Problem.of(scenario, prepare(table, costs, scenario, PARENT), costs), solution, share=0.1)
    assert [(entry.constraint, entry.is_binding) for entry in loosened] == [
        ("latency_s", True),
        ("kv_bytes_per_token", False),
        ("parameters", False),
    ]
    first = loosened[0]
    assert (first.side, first.bound, first.loosened, first.change) == ("at_most", 14.0, pytest.approx(15.4), pytest.approx(1.4))
    assert (first.gain, first.value) == (pytest.approx(0.1), pytest.approx(0.2))


def test_a_count_of_layers_is_loosened_by_a_whole_layer() -> None:
    table, costs = simple_table(4, TABLE), {"t": simple_costs(4, seconds=SECONDS)}
    scenario = make_scenario({"num_attention_layers": {"at_most": 3}})
    solution = solve_scenario(table, costs, scenario, PARENT)
    (entry,) = loosen_each(Problem.of(scenario, prepare(table, costs, scenario, PARENT), costs), solution)
    assert (solution.objective, entry.loosened, entry.gain) == (2.0, 4.0, 2.0)


def test_a_budget_of_nothing_is_loosened_by_a_share_of_what_there_is() -> None:
    """The summed kl goes from 0 to 4 x 2; 5 % of that are three layers with fewer heads, of 0.125 and a second each."""
    table, costs = simple_table(4, {**TABLE, "kv1/w64": 0.125}), {"t": simple_costs(4, seconds=SECONDS)}
    scenario = make_scenario({}, objective={"minimize": "latency", "subject_to": {"kl": {"at_most": 0.0}}})
    solution = solve_scenario(table, costs, scenario, PARENT)
    (entry,) = loosen_each(Problem.of(scenario, prepare(table, costs, scenario, PARENT), costs), solution)
    assert (entry.bound, entry.loosened, entry.step) == (0.0, pytest.approx(0.4), "5 % of its range more")
    assert (entry.gain, entry.is_binding) == (3.0, True)


def test_of_memory_one_more_gib_is_told_as_well() -> None:
    """Three layers of 4 GiB each and 2 B beside them; 11.5 GiB hold two, and 1 % more is not enough for the third."""
    costs = simple_costs(3, seconds=SECONDS)
    sizes = {piece: 2**32 if piece[2] == "w64" else 0 for piece in costs.pieces}
    large = {piece: replace(cost, weight_bytes=sizes[piece], kv_bytes_per_token=0) for piece, cost in costs.pieces.items()}
    table, costs = simple_table(3, {PARENT.name: 0.0, "kv4/noop": 0.5}), replace(costs, pieces=large)
    scenario = make_scenario({"memory_bytes": {"at_most": 11.5 * 2**30}})
    solution = solve_scenario(table, {"t": costs}, scenario, PARENT)
    told = loosen_each(Problem.of(scenario, prepare(table, {"t": costs}, scenario, PARENT), {"t": costs}), solution, share=0.01)
    assert [(x.step, x.change, x.gain) for x in told] == [("1 GiB more", 2**30, 0.5), ("1 % more", pytest.approx(0.115 * 2**30), 0.0)]


def test_a_forbidden_pattern_that_matches_nothing_is_a_mistake() -> None:
    candidates = Candidates.of(simple_table(2, TABLE), PARENT)
    with pytest.raises(ScenarioError, match=r"structure\.forbidden\.all: 'kv2/\*' matches no block; there are kv1/w64, kv4/w32"):
        Structure.of(StructureSettings(forbidden={"all": ("kv2/*",)}), candidates)
