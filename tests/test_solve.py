"""The search against brute force: every architecture of small instances, in exact arithmetic."""

import json
from collections.abc import Sequence
from fractions import Fraction
from itertools import combinations, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puzzle_dag.architecture import Architecture, Block
from puzzle_dag.config import Scenario
from puzzle_dag.piece_costs import PieceCost, PieceCosts
from puzzle_dag.search.infeasible import InfeasibleScenarioError
from puzzle_dag.search.limits import ScenarioError
from puzzle_dag.search.score import BlockScore
from puzzle_dag.search.solution import Solution
from puzzle_dag.search.solve import solve_scenario

PARENT = Block.parse("kv4/w64")
ATTENTIONS, FFNS = ("kv4", "kv1", "linear", "noop"), ("w64", "w32", "noop")
BATCHES = (1, 4)
PlainBound = tuple[str, int, int, Fraction | None, Fraction | None]
"""(name, batch, length, at_least, at_most)"""
NAMES = (
    "throughput_tokens_per_s",
    "latency_s",
    "ttft_s",
    "tpot_s",
    "memory_bytes",
    "parameters",
    "kv_bytes_per_token",
    "num_attention_layers",
)


def make_scenario(constraints: dict[str, object], **fields: object) -> Scenario:
    content = {"version": 1, "name": "s", "target": "t", "constraints": constraints, "uptrain": {"tokens": 0}, **fields}
    return Scenario.model_validate(content)


def make_costs(draw_int: object, num_layers: int, *, target: str = "t") -> PieceCosts:
    """Costs from a source of integers; times are multiples of 1/64 s, so sums tie and touch limits often."""

    def piece(*, free: bool, kv: bool) -> PieceCost:
        if free:
            return PieceCost(0, 0, 0, {b: {"prefill": 0.0, "decode": 0.0} for b in BATCHES})
        seconds = {b: {"prefill": draw_int(0, 8) / 64, "decode": draw_int(0, 8) / 64} for b in BATCHES}
        return PieceCost(draw_int(0, 9), draw_int(0, 9), draw_int(1, 4) if kv else 0, seconds)

    pieces = {}
    for layer in range(num_layers):
        for name in ATTENTIONS:
            pieces[layer, "attention", name] = piece(free=name == "noop", kv=name.startswith("kv"))
        for name in FFNS:
            pieces[layer, "ffn", name] = piece(free=name == "noop", kv=False)
    constant = PieceCost(3, 5, 0, {b: {"prefill": 1 / 64, "decode": 2 / 64} for b in BATCHES})
    return PieceCosts(target, 12, 4, BATCHES, pieces, constant, "digest")


@st.composite
def instances(draw: st.DrawFn) -> tuple[list[list[BlockScore]], PieceCosts, Scenario]:
    num_layers = draw(st.integers(1, 3))
    costs = make_costs(lambda low, high: draw(st.integers(low, high)), num_layers)
    table = []
    for layer in range(num_layers):
        blocks = draw(st.sets(st.sampled_from(list(product(ATTENTIONS, FFNS))), min_size=0, max_size=6))
        names = sorted({f"{a}/{f}" for a, f in blocks} | {PARENT.name})
        table.append(
            [
                BlockScore(
                    layer,
                    name,
                    0.0 if name == PARENT.name else draw(st.integers(0, 12)) / 8,
                    draw(st.integers(8, 24)) / 8,
                    1.0 if name == PARENT.name else draw(st.integers(0, 8)) / 8,
                    64,
                    f"{layer}:{name}",
                )
                for name in names
            ]
        )
    constraints: dict[str, object] = {}
    for name in draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=3, unique=True)):
        relative = draw(st.booleans())
        share = draw(st.sampled_from([0.3, 0.5, 0.6, 0.7, 0.9, 1.0, 1.2, 1.5]))
        value = share if relative else draw(st.integers(1, 60)) / draw(st.sampled_from([1, 8]))
        bound: dict[str, object] = {draw(st.sampled_from(["at_least", "at_most"])): value}
        if draw(st.integers(0, 5)) == 0:  # both bounds, often an equality
            bound = {"at_least": value, "at_most": value if draw(st.booleans()) else value * 1.25}
        if relative:
            bound["relative_to"] = "parent"
        if draw(st.integers(0, 2)) == 0:
            bound["at"] = {"batch": draw(st.sampled_from(BATCHES))}
            if name == "memory_bytes":
                bound["at"]["length"] = draw(st.integers(1, 9))
        constraints[name] = bound
    objective = draw(st.sampled_from(["kl", "lm_loss", "top1_loss"]))
    batch_sizes = draw(st.sampled_from(["all", [4], [1, 4]]))
    return table, costs, make_scenario(constraints, objective={"minimize": objective}, batch_sizes=batch_sizes)


def plain_value(name: str, costs: PieceCosts, architecture: Architecture, batch: int, length: int) -> Fraction | float:
    """A quantity straight from its definition."""
    pieces = [costs.constant]
    for layer, block in enumerate(architecture):
        pieces += [costs.pieces[layer, "attention", block.attention.name], costs.pieces[layer, "ffn", block.ffn.name]]
    prefill = sum(Fraction(p.seconds[batch]["prefill"]) for p in pieces)
    decode = sum(Fraction(p.seconds[batch]["decode"]) for p in pieces)
    values: dict[str, Fraction | float] = {
        "throughput_tokens_per_s": batch * (12 + 4) / (prefill + decode),
        "latency_s": prefill + decode,
        "ttft_s": prefill,
        "tpot_s": decode / 3,
        "memory_bytes": sum(p.weight_bytes for p in pieces) + batch * length * sum(p.kv_bytes_per_token for p in pieces),
        "parameters": sum(p.parameters for p in pieces),
        "kv_bytes_per_token": sum(p.kv_bytes_per_token for p in pieces),
        "num_attention_layers": sum(b.attention.kind == "gqa" for b in architecture),
    }
    return values[name]


def plain_bounds(scenario: Scenario, costs: PieceCosts, num_layers: int, batch: int) -> list[PlainBound]:
    """Every constraint, by the rules in the scenario file's words."""
    parent = (PARENT,) * num_layers
    own_batches = BATCHES if scenario.batch_sizes == "all" else scenario.batch_sizes
    memory = scenario.constraints.get("memory_bytes")
    out = []
    for name, bound in scenario.constraints.items():
        at_batch = batch if bound.at is None else bound.at.batch
        length = 16 if bound.at is None or bound.at.length is None else bound.at.length
        factor = Fraction(1)
        if bound.relative_to == "parent":
            factor = plain_value(name, costs, parent, at_batch, length)
            if name == "throughput_tokens_per_s" and bound.at is None:
                fits = [
                    b
                    for b in own_batches
                    if memory is None
                    or memory.at is not None
                    or memory.relative_to is not None
                    or memory.at_most is None
                    or plain_value("memory_bytes", costs, parent, b, 16) <= Fraction(str(memory.at_most))
                ]
                if not fits:
                    raise ScenarioError("the parent does not fit")
                factor = max(plain_value(name, costs, parent, b, 16) for b in fits)
        low, high = (None if v is None else Fraction(str(v)) * factor for v in (bound.at_least, bound.at_most))
        out.append((name, at_batch, length, low, high))
    return out


def meets(costs: PieceCosts, architecture: Architecture, bounds: Sequence[PlainBound]) -> bool:
    for name, batch, length, low, high in bounds:
        value = plain_value(name, costs, architecture, batch, length)
        if (low is not None and value < low) or (high is not None and value > high):
            return False
    return True


def plain_objective(table: Sequence[Sequence[BlockScore]], objective: str, picks: Sequence[BlockScore]) -> float:
    own = [next(s for s in scores if s.block == PARENT.name) for scores in table]
    if objective == "kl":
        return sum(s.kl for s in picks)
    if objective == "top1_loss":
        return sum(1 - s.top1_agreement for s in picks)
    return sum(s.lm_loss - o.lm_loss for s, o in zip(picks, own, strict=True))


def brute_force(table: list[list[BlockScore]], costs: PieceCosts, scenario: Scenario) -> float | None:
    """Least objective over all batch sizes and architectures; None where nothing is feasible."""
    best = None
    for batch in BATCHES if scenario.batch_sizes == "all" else scenario.batch_sizes:
        bounds = plain_bounds(scenario, costs, len(table), batch)
        for picks in product(*table):
            architecture = tuple(Block.parse(s.block) for s in picks)
            if meets(costs, architecture, bounds):
                value = plain_objective(table, scenario.objective.minimize, picks)
                best = value if best is None else min(best, value)
    return best


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


def simple_costs(num_layers: int, *, seconds: dict[str, float], batches: tuple[int, ...] = BATCHES, output_length: int = 4) -> PieceCosts:
    """Every attention and FFN costs what `seconds` says by name, the same at every batch; a KV head takes 2 bytes a token."""

    def piece(name: str) -> PieceCost:
        kv = 2 * int(name[2:]) if name.startswith("kv") else 0
        phases = {b: {"prefill": seconds.get(name, 0.0), "decode": seconds.get(name, 0.0)} for b in batches}
        size = 0 if name == "noop" else 10 * len(name)
        return PieceCost(size, 2 * size, kv, phases)

    pieces = {("attention", n): piece(n) for n in ATTENTIONS} | {("ffn", n): piece(n) for n in FFNS}
    constant = PieceCost(1, 2, 0, {b: {"prefill": 0.5, "decode": 0.5} for b in batches})
    return PieceCosts("t", 12, output_length, batches, PieceCosts.same_in_every_layer(pieces, num_layers=num_layers), constant, "d")


def simple_table(num_layers: int, kl: dict[str, float]) -> list[list[BlockScore]]:
    return [
        [BlockScore(layer, name, value, 2.0 + value, 1.0 - value / 10, 64, f"{layer}:{name}") for name, value in kl.items()]
        for layer in range(num_layers)
    ]


TABLE = {PARENT.name: 0.0, "kv1/w64": 0.1, "kv4/w32": 0.2, "noop/noop": 2.0}
SECONDS = {"kv4": 1.0, "kv1": 0.5, "w64": 1.0, "w32": 0.5}


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
        ({"latency_s": {"at_most": 1.0}}, {"target": "other"}, r"'other' has no costs \(there are: t\); measure it"),
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
