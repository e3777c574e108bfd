"""The held-out check's verdicts, the comparisons behind it, the benchmark's two methods, and the pictures of costs."""

import dataclasses
import json
import random
import shutil

import pytest
from micro_project import CHECKOUT
from test_report import pixels
from test_roofline import estimate, make_target
from ticking_engine import TickingEngine

from benchmarks import cost_model
from benchmarks.repeated_layer import RepeatedLayers, as_llama
from puzzle_dag.architecture import FFN, Attention, Block
from puzzle_dag.costs.comparison import Comparison, measure_noise
from puzzle_dag.costs.heldout import draw_models, judge, judged_batches
from puzzle_dag.model.configuration_puzzle_dag import PuzzleDagConfig
from puzzle_dag.report.costs import cost_panels, residual_plot

BLOCKS = [Block(a, f) for a in (Attention("gqa", 4), Attention("linear"), Attention("noop")) for f in (FFN("swiglu", 64), FFN("noop"))]
PARENT = Block.parse("kv4/w128")


def make_row(
    model: int, error: float, *, noise: float | None = 0.0, batch: int = 8, phase: str = "total", kind: str = "held out"
) -> Comparison:
    return Comparison(
        target="t", kind=kind, model=str(model), num_layers=2, batch=batch, phase=phase, predicted_s=1 + error, measured_s=1.0,
        error=error, noise=noise, num_engines=2,
    )  # fmt: skip


def make_rows(errors: list[float], **fields) -> list[Comparison]:
    return [make_row(i, e, phase=p, **fields) for i, e in enumerate(errors) for p in ("prefill", "decode", "total")]


@pytest.mark.parametrize(
    ("errors", "noise", "passed"),
    [
        ([0.029, -0.03, 0.0], 0.0, True),
        ([0.031, -0.031, 0.0], 0.0, False),  # the median
        ([0.0, 0.0, 0.08], 0.0, True),
        ([0.0, 0.0, -0.081], 0.0, False),  # the worst
        ([0.05, -0.05, 0.05], 0.042, True),  # 1.2 times the noise is 5.04 %
        ([0.05, -0.051, 0.051], 0.042, False),
        ([0.0, 0.0, 0.11], 0.1, True),
        ([0.0, 0.0, 0.121], 0.1, False),
        ([0.031, 0.031, 0.0], None, False),  # one engine each: no noise is known, the limits stand
    ],
)
def test_limits_give_way_to_noise_only(errors, noise, passed):
    assert [v.passed for v in judge(make_rows(errors, noise=noise))] == [passed] * 2


def test_only_held_out_models_at_batch_8_and_more_are_judged():
    rows = make_rows([0.5] * 3, batch=4) + make_rows([0.01] * 3, batch=8) + make_rows([0.9] * 3, kind="probe")
    assert [(v.batch, v.phase, v.num_models, v.passed) for v in judge(rows)] == [(8, "prefill", 3, True), (8, "total", 3, True)]
    assert judge(make_rows([0.9] * 3, kind="probe")) == []
    assert judged_batches([1, 4]) == [4] and judged_batches([1, 8, 32]) == [8, 32]


def test_noise_does_not_grow_with_the_number_of_engines():
    assert measure_noise([1.0]) is None and measure_noise([0.95, 1.05]) == pytest.approx(0.1)
    rng = random.Random(0)
    two, six = ([measure_noise([rng.gauss(1, 0.02) for _ in range(n)]) or 0 for _ in range(2000)] for n in (2, 6))
    assert sum(two) / sum(six) == pytest.approx(1, abs=0.05)


def test_drawn_models_differ_are_no_probes_and_can_be_served():
    probes = [(BLOCKS[0],) * 3]
    drawn = draw_models([BLOCKS] * 3, 20, known=probes)
    assert len(drawn) == len(set(drawn)) == 20 and not set(drawn) & set(probes)
    assert all(any(b.attention.kind == "gqa" for b in a) for a in drawn)
    assert draw_models([BLOCKS] * 3, 20, known=probes) == drawn != draw_models([BLOCKS] * 3, 20, known=probes, seed=1)
    assert set(draw_models([BLOCKS], 9)) == {(b,) for b in BLOCKS if b.attention.kind == "gqa"}  # there are no more


def test_a_block_that_is_added_changes_only_the_places_that_it_takes():
    new = Block(Attention("linear"), FFN("swiglu", 32))
    before, after = (draw_models([blocks] * 7, 300) for blocks in (BLOCKS, [new, *BLOCKS]))
    kept = set(before) & set(after)
    # A model stays where in none of its seven layers the new block won against six.
    assert len(kept) == pytest.approx(300 * (6 / 7) ** 7, abs=35)
    assert [m for m in before if m in kept] == [m for m in after if m in kept]
    # Those without attention gave way to others at the end.
    assert sum(new not in model for model in set(after) - kept) <= 10
    assert draw_models([BLOCKS[::-1]] * 7, 300) == before


def test_every_block_is_drawn_as_often_as_another_in_every_layer():
    drawn = draw_models([BLOCKS] * 6, 3000)  # of 46,656, less the 4,096 without attention
    for layer in range(6):
        counts = [sum(model[layer] == block for model in drawn) for block in BLOCKS]
        with_attention = [c for c, b in zip(counts, BLOCKS, strict=True) if b.attention.kind == "gqa"]
        others = [c for c, b in zip(counts, BLOCKS, strict=True) if b.attention.kind != "gqa"]
        # Attention somewhere: 1 / (1 - (2 / 3)^6) as often where it stands, and the rest shared by the others.
        expected = 3000 / 6 / (1 - (2 / 3) ** 6)
        assert with_attention == pytest.approx([expected] * 2, abs=4.5 * expected**0.5)
        assert others == pytest.approx([(3000 - 2 * expected) / 4] * 4, abs=4.5 * expected**0.5)


def test_the_rivals_engines_are_counted_and_never_fewer():
    rival = RepeatedLayers.plan(PARENT, [Attention("gqa", 1), Attention("noop")], [FFN("swiglu", 64), FFN("linear"), FFN("noop")])
    assert [len(m) for m in rival.models] == [1, *[11] * 5]  # the parent's two, kv1, w64, linear; a no-op is never measured
    for wanted in range(1, 40):
        rounds, base = rival.plan_engines(wanted)
        total = rounds * 5 + base
        assert total == max(wanted, 6) and base >= rounds


def test_the_rival_takes_every_family_for_a_llama():
    qwen = PuzzleDagConfig(
        family="qwen3",
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        qk_norm=True,
        qkv_bias=True,
        sliding_window=8,
    )
    plain = as_llama(qwen)
    assert (plain.family, plain.qk_norm, plain.qkv_bias, plain.sliding_window) == ("llama", False, False, None)
    assert set(plain.layer_types) == {"full_attention"} and plain.hidden_size == 64


@pytest.fixture(scope="module")
def bench(tmp_path_factory, micro_parent_folder):
    """The benchmark on an engine whose times add up, run twice; (engines run, output) of each."""
    root, runs = tmp_path_factory.mktemp("bench"), []
    shutil.copytree(CHECKOUT / "conf", root / "conf")
    shutil.copytree(micro_parent_folder, root / "parents" / "micro")
    with pytest.MonkeyPatch.context() as patch:
        engine = TickingEngine()
        engine.install(patch)
        for _ in range(2):
            engine.jobs.clear()
            flags = ["--root", str(root), "--profile", "micro", "--target", "micro-eager", "--engines-per-probe", "2", "--num-models", "4"]
            status = cost_model.main([*flags, "--store", str(root / "store"), "--output", str(root / "out.json")])
            runs.append((len(engine.jobs), status, json.loads((root / "out.json").read_text())))
    return runs


def test_the_benchmark_counts_what_it_starts(bench):
    (num_jobs, status, found), (again, _, same) = bench
    # The single layer is a model of both, and measured once in each of the two rounds.
    num_engines = found["our_starts"] + found["rival_starts"] - 2
    assert found["our_starts"] == 24 <= found["rival_starts"] and num_jobs == num_engines + 4 * 3
    assert again == 0 and same == found  # nothing is measured twice: a run that was stopped goes on
    assert status == 0 and all(v["passed"] for v in found["verdicts"])


def test_both_methods_are_right_where_costs_add_up(bench):
    found = bench[0][2]
    for rows in (found["ours"], found["rival"]):
        assert len(rows) == 4 * 3 and all(abs(r["error"]) < 0.01 for r in rows)
    assert [r["model"] for r in found["ours"]] == [r["model"] for r in found["rival"]]


def test_the_benchmark_tells_the_better_method_by_models(bench):
    rows = make_rows([0.02, -0.03, 0.04, 0.02, -0.05])
    half, twice = ([dataclasses.replace(r, error=factor * r.error) for r in rows] for factor in (0.5, 2.0))
    assert cost_model.pair_errors(twice, rows).is_worse and not cost_model.pair_errors(half, rows).is_worse
    same = cost_model.pair_errors(rows, rows)
    assert (same.mean, same.low, same.high, same.is_worse) == (0, 0, 0, False)
    mixed = [dataclasses.replace(r, error=r.error * (2.0 if i % 2 else 0.5)) for i, r in enumerate(rows)]
    unsure = cost_model.pair_errors(mixed, rows)
    assert unsure.low < 0 < unsure.high and not unsure.is_worse
    with pytest.raises(ValueError, match="2 or more"):
        cost_model.pair_errors(rows[:1], rows[:1])
    assert set(bench[0][2]["difference"]) == {"mean", "low", "high"}


def test_pictures_show_costs_and_errors():
    table = estimate(make_target())
    png = cost_panels(table.rows, title="made-up: analytic seconds a layer")
    assert len(png) < 60_000 and pixels(png).std() > 5
    rows = make_rows([0.01, -0.02, 0.05]) + make_rows([0.0, 0.01], kind="probe")
    assert len(residual_plot(rows, title="t")) < 60_000
    assert not (pixels(residual_plot(rows)) == pixels(residual_plot(make_rows([0.3, -0.3, 0.3])))).all()
