"""The engine worker: a process that imports vLLM once and times one engine after another.

Run as `python -m puzzle_dag.engine.worker JOBS.json FD`: events go to the file descriptor as JSON lines, vLLM's
own output to stdout and stderr. Importing vLLM takes about 9 s, so it is imported once, and each engine runs in
a fork of the process: it starts from the imported state, ends without tearing vLLM down (whose collections of
the whole heap cost more than a small engine's start), leaks nothing into the next engine, and may crash alone.
"""

import ctypes
import gc
import importlib
import json
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np

from puzzle_dag.engine.jobs import BatchTimes, EngineJob, Workload

_KV_BLOCK_TOKENS = 128
_MAX_PREFILL_TOKENS = 16_384
_WARM_UP_TOKENS = 4
_PR_SET_PDEATHSIG = 1


def _send(channel: int, event: str, **content: Any) -> None:
    os.write(channel, (json.dumps({"event": event, **content}) + "\n").encode())


def _follow_parent(death_signal: signal.Signals) -> None:
    """Ask Linux to send this process a signal when its parent ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, death_signal)


def _end_group(*_: Any) -> None:
    """End this process and all it started: it leads a group of its own, which vLLM's engine processes stay in."""
    os.killpg(0, signal.SIGKILL)


def count_prefill_tokens(workload: Workload) -> int:
    """Return the token budget of an engine step: the largest batch's whole prefill in one step, up to 16,384 tokens."""
    whole = workload.input_length * max(workload.batch_sizes)
    return max(min(whole, _MAX_PREFILL_TOKENS), workload.input_length, max(workload.batch_sizes))


def size_kv_cache(config: dict[str, Any], workload: Workload, kv_bytes_each: int) -> int:
    """Return bytes of KV cache that hold the largest batch, if every layer had as many KV heads as the widest.

    A child never has more KV heads than the configuration's global count, so this is enough for any child. One
    spare block a sequence and 8 more cover the engine's own reserve.
    """
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    kv_heads = config.get("num_key_value_heads") or heads
    blocks = -(-(workload.input_length + workload.output_length) // _KV_BLOCK_TOKENS) + 1
    num_tokens = (max(workload.batch_sizes) * blocks + 8) * _KV_BLOCK_TOKENS
    return int(num_tokens * config["num_hidden_layers"] * 2 * kv_heads * head_dim * kv_bytes_each)


def count_tensor_bytes(folder: Path) -> int:
    """Return the bytes of the tensors in a checkpoint's safetensors files, read from their headers.

    Not counted in the engine: on CPUs vLLM packs the weights into oneDNN's own layouts and drops the parameters.
    """
    num_bytes = 0
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as f:
            header = json.loads(f.read(int.from_bytes(f.read(8), "little")))
        num_bytes += sum(t["data_offsets"][1] - t["data_offsets"][0] for n, t in header.items() if n != "__metadata__")
    return num_bytes


def _read_config(job: EngineJob, scratch: Path) -> tuple[Path, dict[str, Any]]:
    """Return the checkpoint's folder and configuration; one with dummy weights is written into `scratch`."""
    if job.folder is not None:
        folder = Path(job.folder)
        return folder, json.loads((folder / "config.json").read_text())
    assert job.config is not None
    (scratch / "config.json").write_text(json.dumps(job.config))
    return scratch, job.config


def _kv_bytes_each(job: EngineJob) -> int:
    name = job.settings.dtype if job.settings.kv_cache_dtype == "auto" else job.settings.kv_cache_dtype
    return 4 if name == "float32" else 2


def _start_engine(job: EngineJob, folder: Path, config: dict[str, Any]) -> Any:
    from vllm import LLM

    workload, settings = job.workload, job.settings
    return LLM(
        model=str(folder),
        load_format="dummy" if job.folder is None else "safetensors",
        skip_tokenizer_init=True,
        dtype=settings.dtype,
        quantization=settings.quantization,
        kv_cache_dtype=settings.kv_cache_dtype,
        tensor_parallel_size=settings.tensor_parallel_size,
        enforce_eager=settings.mode == "eager",
        enable_prefix_caching=False,
        max_model_len=workload.input_length + workload.output_length,
        max_num_seqs=max(workload.batch_sizes),
        max_num_batched_tokens=count_prefill_tokens(workload),
        kv_cache_memory_bytes=size_kv_cache(config, workload, _kv_bytes_each(job)),
        disable_log_stats=False,
        seed=0,
    )


def _generate(llm: Any, prompts: list[dict[str, list[int]]], num_tokens: int) -> tuple[float, float]:
    """Generate exactly `num_tokens` for each prompt. Return seconds to the last first token, and to the end.

    The first-token time is the engine core's own stamp, on the same monotonic clock, so that prefill and decode come
    from one run: as a difference of two runs, a short decode would drown in the noise of a long prefill.
    """
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=num_tokens, ignore_eos=True, detokenize=False, temperature=0.0)
    start = time.monotonic()
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    total_s = time.monotonic() - start
    assert all(len(o.outputs[0].token_ids) == num_tokens for o in outputs), "vLLM stopped early"
    return max(o.metrics.first_token_ts for o in outputs) - start, total_s


def _time_batches(llm: Any, job: EngineJob, vocab_size: int, channel: int) -> list[BatchTimes]:
    """Time every batch size; the repeats of the sizes take turns, so that a disturbance hits one repeat of each, not all of one."""
    workload, rng = job.workload, np.random.default_rng(job.seed)
    prompts = {
        batch: [{"prompt_token_ids": row} for row in rng.integers(0, vocab_size, (batch, workload.input_length)).tolist()]
        for batch in workload.batch_sizes
    }
    for batch in workload.batch_sizes:
        _generate(llm, prompts[batch], min(workload.output_length, _WARM_UP_TOKENS))
    seconds: dict[int, list[tuple[float, float]]] = {batch: [] for batch in workload.batch_sizes}
    for _ in range(workload.repeats):
        for batch in workload.batch_sizes:
            seconds[batch].append(_generate(llm, prompts[batch], workload.output_length))
        _send(channel, "alive", name=job.name)
    return [BatchTimes(b, tuple(p for p, _ in pairs), tuple(t for _, t in pairs)) for b, pairs in seconds.items()]


def _count_kv_bytes_per_token(worker: Any) -> float:
    """Return the bytes a token takes in one of the engine's workers; runs there, since a reply of vLLM's own types never arrives."""
    return float(sum(spec.page_size_bytes / spec.block_size for spec in worker.get_kv_cache_spec().values()))


def _measure(job: EngineJob, channel: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="puzzle-dag-engine-") as scratch:
        folder, config = _read_config(job, Path(scratch))
        start = time.perf_counter()
        llm = _start_engine(job, folder, config)
        start_s = time.perf_counter() - start
        _send(channel, "alive", name=job.name)
        times = _time_batches(llm, job, config["vocab_size"], channel)
        kv_bytes = sum(llm.collective_rpc(_count_kv_bytes_per_token))
        cache = llm.llm_engine.vllm_config.cache_config
        if job.settings.multiprocess:
            llm.llm_engine.engine_core.shutdown()
    peak_kib = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return {
        "name": job.name,
        "times": [{"batch": t.batch, "prefill_s": t.prefill_s, "total_s": t.total_s} for t in times],
        "weight_bytes": None if job.folder is None else count_tensor_bytes(folder),
        "kv_bytes_per_token": round(kv_bytes),
        "kv_capacity_tokens": (cache.num_gpu_blocks or 0) * cache.block_size if kv_bytes else 0,
        "peak_rss_bytes": peak_kib * 1024,
        "start_s": start_s,
    }


def _run_forked(job: EngineJob, channel: int) -> None:
    """Run one job in a fork; whatever becomes of the fork, exactly one "result" or "failed" event is sent."""
    process = os.fork()
    if process == 0:
        status = 1
        try:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            _follow_parent(signal.SIGKILL)
            _send(channel, "result", result=_measure(job, channel))
            status = 0
        except Exception:
            traceback.print_exc()
            _send(channel, "failed", name=job.name, reason=traceback.format_exc(limit=-3))
            status = 2
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    if code not in (0, 2):
        reason = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"exited with status {code}"
        _send(channel, "failed", name=job.name, reason=f"the engine's process {reason}")


def _import_engine() -> None:
    """Import what the engines need, before the forks; on GPUs only what leaves CUDA untouched, as a fork can't use it afterwards."""
    import vllm
    from vllm.platforms import current_platform

    assert vllm.LLM is not None and vllm.SamplingParams is not None  # imported when first named
    if not current_platform.is_cpu():
        return
    importlib.import_module("vllm.v1.worker.cpu_worker")
    # A registered class spares vLLM a process of its own (10 s) to look at the plugin's model; the plugin leaves it be.
    model = importlib.import_module("puzzle_dag.model.vllm_model").PuzzleDagForCausalLM
    vllm.ModelRegistry.register_model(model.__name__, model)
    importlib.import_module("vllm.plugins").load_general_plugins()


def main(arguments: list[str]) -> None:
    """Run the jobs in a file and send their events to a file descriptor: `worker JOBS.json FD`."""
    jobs = [EngineJob.from_json(j) for j in json.loads(Path(arguments[0]).read_text())]
    channel = int(arguments[1])
    os.set_inheritable(channel, False)
    if os.getpgid(0) == os.getpid():  # started by the client: a killed client must not leave engines behind
        signal.signal(signal.SIGTERM, _end_group)
        _follow_parent(signal.SIGTERM)
    _import_engine()
    gc.collect()
    gc.freeze()
    _send(channel, "ready")
    for job in jobs:
        _send(channel, "start", name=job.name)
        _run_forked(job, channel)


if __name__ == "__main__":
    main(sys.argv[1:])
