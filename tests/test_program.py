"""The integer program itself: items over runs of layers, rows of every kind, degenerate and hard cases, by brute force."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puzzle_dag.search.program import Item, Program, Row, SolverError, drop_dominated
from puzzle_dag.search.solver import Solver, minimise

Drawn = tuple[Program, np.ndarray]


@st.composite
def programs(draw: st.DrawFn, *, count_names: bool = True) -> Drawn:
    """Small programs with items over one layer and over runs; whole numbers, so that ties and exact hits are common."""
    num_layers = draw(st.integers(1, 5))
    items, costs = [], []
    for layer in range(num_layers):
        for _ in range(draw(st.integers(0 if num_layers > 1 else 1, 3))):
            length = draw(st.sampled_from([1, 1, 1, 2, 3]))
            if layer + length <= num_layers:
                items.append(Item(draw(st.sampled_from("abc")), tuple(range(layer, layer + length))))
                costs.append(draw(st.integers(-5, 20)))
    items.append(Item("all", tuple(range(num_layers))))
    costs.append(draw(st.integers(0, 60)))
    rows = []
    for number in range(draw(st.integers(0, 3))):
        coefficients = np.array([float(draw(st.integers(0, 9))) for _ in items])
        middle = draw(st.integers(0, 30))
        bounds = draw(st.sampled_from([(-np.inf, middle), (middle, np.inf), (middle, middle), (middle, middle + 4)]))
        rows.append(Row(f"row {number}", coefficients, *bounds))
    most = draw(st.sampled_from([None, None, 1, 2])) if count_names else None
    return Program(num_layers, tuple(items), tuple(rows), most), np.array(costs, dtype=float)


def covers(program: Program, first: int = 0, taken: tuple[int, ...] = ()) -> Iterator[tuple[int, ...]]:
    """Every way to cover the layers from `first` on."""
    if first == program.num_layers:
        yield taken
    for index, item in enumerate(program.items):
        if item.layers[0] == first:
            yield from covers(program, item.layers[-1] + 1, (*taken, index))


def is_met(program: Program, chosen: tuple[int, ...]) -> bool:
    names = {program.items[i].name for i in chosen}
    sums = [sum(row.coefficients[i] for i in chosen) for row in program.rows]
    in_bounds = all(row.lower <= s <= row.upper for row, s in zip(program.rows, sums, strict=True))
    return in_bounds and (program.max_distinct is None or len(names) <= program.max_distinct)


@settings(max_examples=400, deadline=None)
@given(programs())
def test_equals_brute_force(drawn: Drawn) -> None:
    program, costs = drawn
    found = {chosen: sum(costs[i] for i in chosen) for chosen in covers(program) if is_met(program, chosen)}
    outcome = minimise(program, costs)
    if not found:
        assert (outcome.status, outcome.chosen) == ("infeasible", ())
        return
    assert outcome.status == "optimal"
    assert outcome.chosen in found
    assert outcome.objective == pytest.approx(min(found.values()), abs=1e-9)
    assert outcome.bound <= outcome.objective
    assert outcome.objective - outcome.bound <= 1e-6 * max(1.0, abs(outcome.objective))


def best_value(program: Program, costs: np.ndarray) -> float:
    return min((float(sum(costs[i] for i in chosen)) for chosen in covers(program) if is_met(program, chosen)), default=np.inf)


@settings(max_examples=300, deadline=None)
@given(programs(), st.lists(st.integers(-12, 12), min_size=1, max_size=4))
def test_a_kept_solver_is_as_exact_under_every_other_bound(drawn: Drawn, moves: list[int]) -> None:
    """To and fro, through infeasible bounds as well; and what is worse than asked for is proven to be."""
    program, costs = drawn
    solver = Solver(program, costs)
    for move in (0, *moves, 0):
        moved = replace(program, rows=tuple(replace(r, lower=r.lower + move, upper=r.upper + move) for r in program.rows))
        if not solver.fits(moved, costs):
            assert any(max(np.abs(r.coefficients).max(), abs(r.upper)) > 8 or move for r in moved.rows), (
                "only another scale asks for another"
            )
            continue
        expected, outcome = best_value(moved, costs), solver.solve(moved)
        assert outcome.status == ("optimal" if np.isfinite(expected) else "infeasible")
        if outcome.chosen:
            assert is_met(moved, outcome.chosen) and outcome.objective == pytest.approx(expected, abs=1e-9)
            assert solver.relax(moved) <= expected + 1e-9
            worse = solver.solve(moved, worse_than=expected - 1e-3)
            assert (worse.status == "worse" and worse.bound > expected - 1e-3) or worse.objective == outcome.objective
            assert solver.solve(moved, worse_than=expected).objective == outcome.objective


def test_a_kept_solver_knows_what_it_was_made_for() -> None:
    items = (Item("a", (0,)), Item("b", (0,)))
    row, costs = Row("r", np.array([1.0, 2.0]), upper=2.0), np.array([3.0, 1.0])
    solver = Solver(Program(1, items, (row,)), costs)
    assert solver.fits(Program(1, items, (replace(row, upper=1.0),)), costs)
    assert not solver.fits(Program(1, items, (replace(row, lower=1.0),)), costs), "another side is bounded"
    assert not solver.fits(Program(1, items, (replace(row, upper=100.0),)), costs), "another scale"
    assert not solver.fits(Program(1, items, (replace(row, coefficients=np.array([1.0, 3.0])),)), costs)
    assert not solver.fits(Program(1, items, (row, row)), costs) and not solver.fits(Program(1, items, (row,), 1), costs)
    assert not solver.fits(Program(1, items, (row,)), np.array([3.0, 2.0]))


@settings(max_examples=200, deadline=None)
@given(programs(count_names=False))
def test_what_is_dropped_is_never_missed(drawn: Drawn) -> None:
    """Without the dropped items the best is as good, whatever the bounds are: only which sides are bounded matters."""
    program, costs = drawn
    kept = set(drop_dominated(program, costs).tolist())
    values = {chosen: sum(costs[i] for i in chosen) for chosen in covers(program) if is_met(program, chosen)}
    if values:
        assert min(values.values()) == min((v for c, v in values.items() if set(c) <= kept), default=np.inf)


def test_of_equal_items_one_is_kept_and_names_that_count_keep_all() -> None:
    items = (Item("a", (0,)), Item("b", (0,)), Item("c", (0,)))
    row = Row("r", np.array([1.0, 1.0, 2.0]), upper=5.0)
    assert drop_dominated(Program(1, items, (row,)), np.array([3.0, 3.0, 3.0])).tolist() == [0]
    assert drop_dominated(Program(1, items, (row,), 1), np.array([3.0, 3.0, 3.0])).tolist() == [0, 1, 2]
    equal = Row("r", np.array([1.0, 1.0, 2.0]), lower=1.0, upper=5.0)
    assert drop_dominated(Program(1, items, (equal,)), np.array([3.0, 3.0, 3.0])).tolist() == [0, 2]


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_the_scale_of_costs_and_rows_does_not_matter(scale: float) -> None:
    """Seconds of microseconds, bytes of a 70B model: the optimum is the same."""
    rng = np.random.default_rng(0)
    items = tuple(Item(f"v{k}", (layer,)) for layer in range(6) for k in range(4))
    costs, amounts = rng.integers(1, 50, 24).astype(float), rng.integers(1, 50, 24).astype(float)
    plain = minimise(Program(6, items, (Row("r", amounts, upper=100.0),)), costs)
    scaled = minimise(Program(6, items, (Row("r", amounts * scale, upper=100.0 * scale),)), costs * scale)
    assert scaled.chosen == plain.chosen
    assert scaled.objective == pytest.approx(plain.objective * scale)


def test_a_huge_score_beside_small_ones_does_not_blur_the_gap() -> None:
    """No-op blocks may score ten thousand times what the good ones do; the proof must hold for the small sums."""
    rng = np.random.default_rng(1)
    items = tuple(Item(f"v{k}", (layer,)) for layer in range(20) for k in range(5))
    costs = np.where(np.arange(100) % 5 == 4, 50.0, rng.random(100) * 1e-3)
    amounts = rng.random(100)
    program = Program(20, items, (Row("r", amounts, upper=8.0),))
    outcome = minimise(program, costs)
    small = minimise(Program(20, items, (Row("r", amounts, upper=8.0),)), np.where(costs > 1, 1.0, costs))
    assert outcome.objective == pytest.approx(small.objective, rel=1e-9)
    assert outcome.gap <= 1e-6


def test_a_choice_that_breaks_a_limit_by_rounding_is_cut_off() -> None:
    items = (Item("tempting", (0,)), Item("sound", (0,)))
    row = Row("r", np.array([1.0 + 1e-12, 0.5]), upper=1.0)
    program, costs = Program(1, items, (row,)), np.array([1.0, 2.0])
    assert minimise(program, costs).chosen == (0,), "within the solver's tolerance"
    assert minimise(program, costs, is_met=lambda chosen: chosen != (0,)).chosen == (1,)
    assert minimise(program, costs, is_met=lambda chosen: False).status == "infeasible"


def test_endless_near_misses_end_in_an_error() -> None:
    items = tuple(Item(f"v{k}", (layer,)) for layer in range(8) for k in range(2))
    with pytest.raises(SolverError, match="within rounding of a limit"):
        minimise(Program(8, items), np.arange(16.0), is_met=lambda chosen: False)


def test_out_of_time_is_said() -> None:
    rng = np.random.default_rng(2)
    items = tuple(Item(f"v{k}", (layer,)) for layer in range(60) for k in range(30))
    amounts = rng.integers(10**6, 10**7, 1800).astype(float)
    goal = float(amounts.reshape(60, 30)[:, 7].sum())
    program = Program(60, items, (Row("exactly", amounts, lower=goal, upper=goal),))
    outcome = minimise(program, amounts + rng.random(1800), time_limit_s=0.02)
    assert outcome.status == "time_limit"


def test_a_layer_that_nothing_covers_is_infeasible() -> None:
    assert minimise(Program(2, (Item("a", (0,)),)), np.array([1.0])).status == "infeasible"
