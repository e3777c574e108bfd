"""The engine worker: one real run of vLLM, and every way in which a worker can fail, with made-up workers."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from running import is_running
from transformers import AutoConfig

from puzzle_dag.architecture import FFN, Attention, Block
from puzzle_dag.children.serve import ServingError, measure_serving
from puzzle_dag.config import ParentSource, Target
from puzzle_dag.costs import measure, sizing
from puzzle_dag.costs.fitting import CapacityCheck, check_capacity, count_fitting_batch
from puzzle_dag.costs.measure import PROBE_KIND, WorkloadTooLongError, measure_target
from puzzle_dag.costs.memory import NumberTypes, kv_bytes_per_token, weight_bytes
from puzzle_dag.costs.probes import serving_config
from puzzle_dag.costs.sizing import check_sizing
from puzzle_dag.costs.tabulate import Measurement
from puzzle_dag.engine import client, hardware, watchdog, worker
from puzzle_dag.engine.client import VllmMissingError, read_engine_version, run_engines
from puzzle_dag.engine.environment import KEEP_MEMORY, engine_environment
from puzzle_dag.engine.failures import EngineFailedError
from puzzle_dag.engine.hardware import Hardware, HardwareMismatchError, check_hardware, detect_hardware, measure_matmul_rate
from puzzle_dag.engine.jobs import EngineJob, EngineResult, EngineSettings, Workload
from puzzle_dag.engine.kv_cache import predict_capacity_tokens, size_kv_cache
from puzzle_dag.engine.worker import count_prefill_tokens, count_tensor_bytes
from puzzle_dag.model.checkpoint import child_config, save_checkpoint
from puzzle_dag.model.families import to_puzzle_dag_config
from puzzle_dag.model.modeling_puzzle_dag import PuzzleDagForCausalLM
from puzzle_dag.model.parent import load_parent
from puzzle_dag.paired_ratio import estimate_ratio
from puzzle_dag.store import ArtifactStore

SETTINGS, WORKLOAD = EngineSettings(), Workload(input_length=8, output_length=4, batch_sizes=(1, 2), repeats=2)


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Engines in tests use one thread: correctness is asked for, and the machine may be shared."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def make_target(**changes) -> Target:
    fields = {
        "version": 1, "name": "micro", "hardware": "local-cpu", "input_length": 32, "output_length": 4,
        "batch_sizes": (1, 2), "repeats": 2, "engines_per_probe": 1,
    }  # fmt: skip
    return Target(**{**fields, **changes})


def make_jobs(*names: str) -> list[EngineJob]:
    return [EngineJob(name=n, config={"vocab_size": 8}, settings=SETTINGS, workload=WORKLOAD) for n in names]


@pytest.fixture
def shape(micro_parent_folder):
    return to_puzzle_dag_config(AutoConfig.from_pretrained(micro_parent_folder))


# A made-up worker: the same protocol, no vLLM. `play(name, send)` says what becomes of a job.
FAKE = """
import json, os, sys, time, signal
jobs, channel = json.load(open(sys.argv[1])), int(sys.argv[2])
def send(event, **content): os.write(channel, (json.dumps({"event": event, **content}) + "\\n").encode())
def finish(name):
    times = [{"batch": 1, "prefill_s": [0.1, 0.2, 0.4], "total_s": [0.5, 0.7, 0.6]}]
    send("result", result={"name": name, "times": times, "weight_bytes": None, "kv_bytes_per_token": 0, "kv_capacity_tokens": 0,
                           "peak_rss_bytes": 1, "start_s": 1.0})
PLAY
print("a line for the log", flush=True)
with open(sys.argv[1] + ".calls", "a") as f: f.write(" ".join(j["name"] for j in jobs) + "\\n")
for job in jobs:
    send("start", name=job["name"])
    play(job["name"])
"""


@pytest.fixture
def fake_worker(monkeypatch, tmp_path):
    """`fake_worker(source of play)` replaces the worker; returns the file that counts its starts."""

    def install(play: str) -> Path:
        script, starts = tmp_path / "fake.py", tmp_path / "starts"
        script.write_text(FAKE.replace("PLAY", textwrap.dedent(play)).replace('sys.argv[1] + ".calls"', repr(str(starts))))
        monkeypatch.setattr(watchdog, "worker_command", lambda path, channel, **_: [sys.executable, str(script), str(path), str(channel)])
        return starts

    return install


def test_results_come_in_order_and_one_by_one(fake_worker):
    starts = fake_worker("def play(name): finish(name)")
    seen, steps = [], []
    results = run_engines(make_jobs("a", "b"), on_result=lambda j, r: seen.append((j.name, r.name)), progress=lambda *s: steps.append(s))
    assert [r.name for r in results] == ["a", "b"] and seen == [("a", "a"), ("b", "b")]
    assert steps == [(0, 2, "engines"), (1, 2, "engines"), (2, 2, "engines")]
    assert starts.read_text() == "a b\n"
    assert results[0].at(1).median_s("prefill") == 0.2 and results[0].at(1).median_s("decode") == pytest.approx(0.4)
    assert EngineResult.from_json(json.loads(json.dumps(results[0].to_json()))) == results[0]


def test_a_crash_loses_nothing_and_the_rest_is_tried_once_more(fake_worker, tmp_path):
    starts = fake_worker(f"""
        def play(name):
            if name == "b" and not os.path.exists({str(tmp_path / "crashed")!r}):
                open({str(tmp_path / "crashed")!r}, "w").close()
                os.kill(os.getpid(), signal.SIGKILL)
            finish(name)
    """)
    seen = []
    results = run_engines(make_jobs("a", "b", "c"), on_result=lambda j, r: seen.append(j.name))
    assert [r.name for r in results] == ["a", "b", "c"] and seen == ["a", "c", "b"], "what crashed waits for the others"
    assert starts.read_text() == "a b c\nc b\n"


def test_a_job_that_fails_twice_is_named_with_the_log_and_keeps_the_others(fake_worker):
    fake_worker("""
        def play(name): send("failed", name=name, reason="no such head size") if name == "b" else finish(name)
    """)
    seen = []
    with pytest.raises(EngineFailedError, match=r"(?s)'b' failed twice: no such head size.*a line for the log"):
        run_engines(make_jobs("a", "b", "c"), on_result=lambda j, r: seen.append(j.name))
    assert seen == ["a", "c"]


def test_a_silent_worker_is_ended_with_all_it_started(fake_worker, tmp_path):
    fake_worker(f"""
        import subprocess
        def play(name):
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
            with open({str(tmp_path / "pids")!r}, "a") as f: f.write(f"{{child.pid}}\\n")
            time.sleep(600)
    """)
    start = time.monotonic()
    with pytest.raises(EngineFailedError, match="'a' failed twice: the worker was silent for 5 s and was ended"):
        run_engines(make_jobs("a"), silence_limit_s=5.0)
    assert time.monotonic() - start < 60
    pids = [int(p) for p in (tmp_path / "pids").read_text().split()]
    assert pids, "a worker that has started nothing shows nothing"
    assert not any(is_running(p) for p in pids)


def test_a_worker_ends_with_its_client(tmp_path):
    """A client that is killed outright leaves no worker, and nothing that a worker started."""
    source = f"""
        import os, subprocess, sys, time
        from puzzle_dag.engine import worker
        def import_engine():
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
            open({str(tmp_path / "pids")!r}, "w").write(f"{{os.getpid()}} {{child.pid}}")
            time.sleep(600)
        worker._import_engine = import_engine
        worker.main(sys.argv[1:])
    """
    (tmp_path / "worker.py").write_text(textwrap.dedent(source))
    client_source = f"""
        import sys
        from puzzle_dag.engine import client, watchdog
        from puzzle_dag.engine.jobs import EngineJob, EngineSettings, Workload
        script = {str(tmp_path / "worker.py")!r}
        watchdog.worker_command = lambda path, channel, **_: [sys.executable, script, str(path), str(channel), "forked"]
        workload = Workload(input_length=8, output_length=4, batch_sizes=(1,), repeats=2)
        client.run_engines([EngineJob(name="a", config={{}}, settings=EngineSettings(), workload=workload)])
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(client_source)])
    deadline = time.monotonic() + 120
    while not (tmp_path / "pids").exists() or not (tmp_path / "pids").read_text().count(" "):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    process.kill()
    process.wait()
    pids = [int(p) for p in (tmp_path / "pids").read_text().split()]
    while any(is_running(p) for p in pids):
        assert time.monotonic() < deadline, "the worker outlived its client"
        time.sleep(0.1)


def test_jobs_have_one_source_and_survive_json():
    with pytest.raises(ValueError, match="exactly one of `folder`"):
        EngineJob(name="x", settings=SETTINGS, workload=WORKLOAD)
    job = make_jobs("a")[0]
    assert EngineJob.from_json(json.loads(json.dumps(job.to_json()))) == job


def test_vllm_missing_says_how_to_install(monkeypatch, shape, tmp_path):
    monkeypatch.setattr(client.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(VllmMissingError, match=r"make setup.*puzzle-dag\[cpu\].*puzzle-dag\[gpu\]"):
        measure_target(shape, Block.parse("kv4/w128"), make_target(), [], [], ArtifactStore(tmp_path))


def test_too_long_a_workload_is_refused_before_anything_runs(shape, tmp_path):
    with pytest.raises(WorkloadTooLongError, match=r"'micro'.*704.*512 positions.*input_length"):
        measure_target(shape, Block.parse("kv4/w128"), make_target(input_length=700), [], [], ArtifactStore(tmp_path))


@pytest.mark.parametrize(
    ("wanted", "kind", "name", "fits"),
    [
        ("local-cpu", "cpu", "Some CPU", True), ("local-cpu", "gpu", "NVIDIA H100", False), ("h100", "gpu", "NVIDIA H100 80GB HBM3", True),
        ("h200", "gpu", "NVIDIA H100", False), ("rtx4090", "gpu", "NVIDIA GeForce RTX 4090", True), ("h100", "cpu", "Some CPU", False),
    ],
)  # fmt: skip
def test_targets_are_measured_on_their_own_hardware(wanted, kind, name, fits):
    target, here = make_target(hardware=wanted), Hardware(kind, name, 2)
    if fits:
        check_hardware(target, here)
    else:
        with pytest.raises(HardwareMismatchError, match=f"'micro'.*`hardware` is '{wanted}'.*{name}"):
            check_hardware(target, here)


def test_threads_follow_the_environment(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert hardware.count_engine_threads() == 3
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert hardware.count_engine_threads() == len(os.sched_getaffinity(0))
    assert f"{len(os.sched_getaffinity(0))} cores" in detect_hardware().name


PAGES_OF_A_FREED_BLOCK = """
import ctypes, resource, sys
size = 48 << 20
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
def touch():
    block = libc.malloc(ctypes.c_size_t(size))
    ctypes.memset(block, 1, size)
    libc.free(block)
touch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
touch()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_an_engine_keeps_the_memory_that_it_frees(monkeypatch):
    for name in KEEP_MEMORY:
        monkeypatch.delenv(name, raising=False)
    cpu, gpu = (engine_environment(replace(detect_hardware(), kind=kind)) for kind in ("cpu", "gpu"))
    command = [sys.executable, "-c", PAGES_OF_A_FREED_BLOCK]
    faults = [int(subprocess.run(command, env=e, capture_output=True, check=True).stdout) for e in (cpu, gpu)]
    assert 4 * faults[0] < faults[1], "48 MiB are 12,288 pages, 24 where the system hands out huge ones"
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "7")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "7")
    environment = engine_environment(replace(detect_hardware(), kind="cpu"))
    assert environment["MALLOC_MMAP_MAX_"] == "7" and "VLLM_CPU_KVCACHE_SPACE" not in environment, "we size the cache"


def test_matmul_rate_is_that_of_a_product_timed_here():
    rate = measure_matmul_rate(torch.float32, seconds=0.3, size=256)
    left = torch.randn(256, 256)
    seconds = []
    for _ in range(50):
        start = time.perf_counter()
        left @ left
        seconds.append(time.perf_counter() - start)
    assert 0.3 < rate / (2 * 256**3 / min(seconds)) < 3


def test_engine_limits_never_serialise_a_batch():
    assert count_prefill_tokens(Workload(input_length=240, output_length=16, batch_sizes=(4, 16), repeats=2)) == 3840
    assert count_prefill_tokens(Workload(input_length=2048, output_length=16, batch_sizes=(64,), repeats=2)) == 16_384
    assert count_prefill_tokens(Workload(input_length=32_768, output_length=16, batch_sizes=(1,), repeats=2)) == 32_768
    config = {"num_attention_heads": 8, "hidden_size": 256, "num_hidden_layers": 3, "num_key_value_heads": 2}
    workload = Workload(input_length=240, output_length=16, batch_sizes=(16,), repeats=2)
    assert size_kv_cache(config, workload, EngineSettings()) >= 16 * 256 * 3 * 2 * 2 * 32 * 2


def test_ratio_and_its_interval():
    ratio, low, high = estimate_ratio([2.0, 2.0, 2.0], [1.0, 1.0, 1.0])
    assert ratio == low == high == pytest.approx(2.0)
    logs = torch.log(torch.tensor([2.0, 1.8, 2.3], dtype=torch.float64))
    ratio, low, high = estimate_ratio([2.0, 1.8, 2.3], [1.0, 1.0, 1.0])
    half = 4.302653 * logs.std().item() / 3**0.5  # Student's t, 2 degrees of freedom, 97.5 %
    assert ratio == pytest.approx(logs.mean().exp().item())
    assert (low, high) == (pytest.approx((logs.mean() - half).exp().item()), pytest.approx((logs.mean() + half).exp().item()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"engines": 2}, "engines is 2; .* needs 3 or more"),
        ({"batch_sizes": [1, 3]}, r"batch sizes \[3\] are none of its own, \[1, 2\]"),
        ({"children": {"parent": Path()}}, "a child is named 'parent'"),
        ({"children": {"fast": Path("nowhere")}}, "fast: nowhere is no checkpoint"),
    ],
)
def test_bad_serving_is_refused_before_anything_runs(micro_parent_folder, arguments, message):
    with pytest.raises(ServingError, match=message):
        measure_serving(micro_parent_folder, arguments.pop("children", {}), make_target(), **arguments)


def test_vllm_measures_only_what_is_missing(shape, tmp_path, monkeypatch):
    """Real vLLM: measure a target, then again (nothing runs), then one width more (one engine runs)."""
    store, ran = ArtifactStore(tmp_path / "store"), []
    real = run_engines

    def watched(jobs, **arguments):
        ran.append(len(jobs))
        return real(jobs, **arguments)

    monkeypatch.setattr(measure, "run_engines", watched)
    target, parent = make_target(mixtures=0), Block.parse("kv4/w128")
    attentions, ffns = [Attention("gqa", 4), Attention("noop")], [FFN("swiglu", 128), FFN("linear"), FFN("noop")]
    table = measure_target(shape, parent, target, attentions, ffns, store)
    again = measure_target(shape, parent, target, attentions, ffns, store)
    assert ran == [5, 0] and again == table and again.digest == table.digest
    wider = measure_target(shape, parent, target, attentions, [*ffns, FFN("swiglu", 64)], store)
    assert ran == [5, 0, 1] and wider.num_engines == 6
    assert {r.variant for r in wider.rows} - {r.variant for r in table.rows} == {"w64"}
    assert table.seconds((parent,) * 2, 2, "prefill") > 0
    assert table.rows[0].engine_version == read_engine_version() and table.rows[0].hardware == detect_hardware().name
    kept = list((tmp_path / "store" / PROBE_KIND).glob("*/*/manifest.json"))
    assert len(kept) == 6
    found = EngineResult.from_json(json.loads(kept[0].read_text())["metadata"])
    assert found.kv_capacity_tokens >= 2 * (target.input_length + target.output_length)
    assert all(len(t.reference_s) == 2 and min(t.reference_s) > 0 and (t.median_pace("prefill") or 0) > 0 for t in found.times)
    assert table.provenance is not None and table.provenance.num_engines == 5 and table.provenance.last_measured_at is not None
    checked = [CapacityCheck(**c) for c in table.provenance.capacity]
    assert len(checked) == 5 and all(c.agrees and c.predicted_batch >= 2 for c in checked), checked
    assert table.provenance.engine_bytes is not None and table.provenance.engine_bytes > 100 * 2**20


def test_vllms_own_caches_are_as_large_as_the_arithmetic_says(shape, family_parent_folder, monkeypatch):
    """Real vLLM, one worker: a cache that it sizes itself in a share of the memory, and the caches of families with windows."""
    target, names = make_target(input_length=96, output_length=32), ("kv4/w128", "kv2/linear", "kv1/noop", "noop/w64")
    mixed = tuple(Block.parse(n) for n in names)
    windowed = {f: to_puzzle_dag_config(AutoConfig.from_pretrained(family_parent_folder[f])) for f in ("mistral", "qwen2")}
    settings, workload, results = EngineSettings.of(target), Workload.of(target), {}
    further = [
        EngineJob(name=f, config=json.loads(json.dumps(serving_config(s, mixed))), settings=settings, workload=workload)
        for f, s in windowed.items()
    ]

    def together(jobs, **arguments):
        found = run_engines([*jobs, *further], **arguments)
        results.update({r.name: r for r in found[len(jobs) :]})
        return found[: len(jobs)]

    monkeypatch.setattr(sizing, "run_engines", together)
    memory_bytes = detect_hardware().memory_bytes
    found = check_sizing(shape, mixed, target, 1.5 * 2**30 / memory_bytes)
    assert found.memory_bytes == pytest.approx(1.5 * 2**30) and found.engine_bytes > 100 * 2**20
    assert 0.9 < found.predicted_batch / found.reported_batch < 1.02, found
    blindly = count_fitting_batch(shape, mixed, target, found.memory_bytes)
    assert blindly > 1.1 * found.reported_batch, "what the engine itself takes has to be set aside"

    layouts = {f: set(serving_config(s, mixed)["layer_types"]) for f, s in windowed.items()}
    assert layouts == {"mistral": {"sliding_attention"}, "qwen2": {"full_attention", "sliding_attention"}}
    for family, its_shape in windowed.items():
        (check,) = check_capacity(its_shape, target, [Measurement(mixed, results[family])])
        assert check.agrees and check.reported_tokens >= 2 * 128, (family, check)
    tokens = check_capacity(windowed["mistral"], target, [Measurement(mixed, results["mistral"])])[0].reported_tokens
    assert int(results["mistral"].kv_concurrency) == tokens // (2 * 128), "one block for the request, one more for the window's edge"


def test_vllm_serves_parent_and_child_in_turns(micro_parent_folder, shape, tmp_path):
    """Real vLLM, real weights: a child without any attention beside the parent."""
    parent = load_parent(ParentSource(path=micro_parent_folder.name), micro_parent_folder.parent)
    architecture = (Block.parse("linear/w64"), Block.parse("kv1/noop"))
    child = PuzzleDagForCausalLM(child_config(shape, architecture))
    save_checkpoint(child, parent.tokenizer, tmp_path / "child")
    target = make_target(dtype="float32")
    predicted = {"parent": {2: 0.2}, "small": {2: 0.1}}
    report = measure_serving(micro_parent_folder, {"small": tmp_path / "child"}, target, batch_sizes=[2], predicted_s=predicted)
    assert [(m.model, m.batch, m.num_engines) for m in report.models] == [("parent", 2, 3), ("small", 2, 3)]
    served, types = report.of("small", 2), NumberTypes.of(target)
    assert served.weight_bytes == weight_bytes(shape, architecture, types) == count_tensor_bytes(tmp_path / "child")
    assert served.kv_bytes_per_token == kv_bytes_per_token(shape, architecture, types)
    assert served.throughput_tokens_per_s == pytest.approx(2 * 36 / served.total_s)
    speedup = report.speedup_of("small", 2)
    assert speedup.predicted == 2.0 and speedup.low <= speedup.speedup <= speedup.high
    assert speedup.speedup == pytest.approx(report.of("parent", 2).total_s / served.total_s, rel=1.0)


def test_vllm_is_measured_compiled_with_an_engine_core_of_its_own(shape, tmp_path, monkeypatch):
    """Real vLLM as the GPUs' targets ask for it: compiled, the engine core and its worker in processes of their own."""
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    target = make_target(mode="compiled", multiprocess=True, dtype="float32")
    architecture = (Block.parse("linear/noop"), Block.parse("kv1/noop"))
    # So many tokens that the tables outweigh what an importing process takes: 2 * 1,500,000 * 64 * 4 bytes are 768 MB.
    config = {**json.loads(json.dumps(serving_config(shape, architecture))), "vocab_size": 1_500_000, "tie_word_embeddings": False}
    settings, workload = EngineSettings.of(target), Workload.of(target)
    (result,) = run_engines([EngineJob(name="child", config=config, settings=settings, workload=workload)], retry=False)
    assert [t.batch for t in result.times] == [1, 2]
    assert all(len(t.total_s) == 2 and 0 < p < s for t in result.times for p, s in zip(t.prefill_s, t.total_s, strict=True))
    assert all(len(t.reference_s) == 2 and min(t.reference_s) > 0 for t in result.times), "timed in the worker's own process"
    per_token = kv_bytes_per_token(shape, architecture, NumberTypes.of(target))
    assert result.kv_bytes_per_token == per_token and result.kv_capacity_tokens == predict_capacity_tokens(result, per_token)
    assert result.kv_capacity_tokens >= 2 * 36 and result.kv_cache_bytes == size_kv_cache(config, workload, settings)
    assert result.peak_rss_bytes > 768_000_000 and result.device_bytes is None, "the memory is that of the process with the weights"
    assert list((tmp_path / "cache").rglob("torch_aot_compile")), "nothing was compiled"


@pytest.mark.parametrize(
    ("what", "event", "reason"),
    [("return", "result", None), ("raise", "failed", "ValueError: head size 30"), ("crash", "failed", "was ended by SIGKILL")],
)
def test_each_engine_has_a_process_of_its_own(monkeypatch, what, event, reason):
    def measure_made_up(job, channel, engines):
        if what == "raise":
            raise ValueError("head size 30")
        if what == "crash":
            os.kill(os.getpid(), signal.SIGKILL)
        return {"name": job.name, "process": os.getpid()}

    monkeypatch.setattr(worker, "_measure", measure_made_up)
    read_end, write_end = os.pipe()
    worker._run_forked(make_jobs("odd")[0], write_end)
    os.close(write_end)
    with os.fdopen(read_end) as f:
        (sent,) = [json.loads(line) for line in f]
    assert sent["event"] == event
    if reason is None:
        assert sent["result"]["name"] == "odd" and sent["result"]["process"] != os.getpid()
    else:
        assert sent["name"] == "odd" and reason in sent["reason"]
