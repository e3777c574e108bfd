"""The engine worker: a process that imports vLLM once and times one engine after another.

Run as `python -m puzzle_dag.engine.worker JOBS.json FD forked`: events go to the file descriptor as JSON lines, vLLM's
own output to stdout and stderr. When all is done, it waits for the paths of further files on its input. Importing vLLM
takes about 9 s, so it is imported once, and each engine runs in a fork of the process: it starts from the imported state,
ends without tearing vLLM down (whose collections of the whole heap cost more than a small engine's start), leaks nothing
into the next engine, and may crash alone. Each fork writes a log of its own beside JOBS.json. With `alone` in place of
`forked`, one engine runs in the worker itself.
"""

import ctypes
import faulthandler
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
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from puzzle_dag.engine.inspection import (
    check_precision,
    count_kv_bytes_per_token,
    list_group_block_tokens,
    read_device_bytes,
    read_peak_rss_bytes,
)
from puzzle_dag.engine.int8 import INT8, int8_config, prepare_checkpoint, quantization_argument
from puzzle_dag.engine.jobs import BatchTimes, EngineJob, Workload
from puzzle_dag.engine.kv_cache import count_capacity_tokens, size_kv_cache
from puzzle_dag.engine.pace import Pace
from puzzle_dag.engine.watchdog import describe_status, log_path

_MAX_PREFILL_TOKENS = 16_384
_WARM_UP_TOKENS = 4
_PR_SET_PDEATHSIG = 1
_REPORTED = 2
_STDIN = 0


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
    """Return the checkpoint's folder and configuration, in the job's precision; what is made up or converted goes into `scratch`."""
    if job.config is not None:
        config = int8_config(job.config) if job.settings.quantization == INT8 else job.config
        (scratch / "config.json").write_text(json.dumps(config))
        return scratch, config
    assert job.folder is not None
    folder = prepare_checkpoint(Path(job.folder), job.settings.quantization, scratch)
    return folder, json.loads((folder / "config.json").read_text())


def _start_engine(job: EngineJob, folder: Path, kv_cache_bytes: int | None) -> Any:
    from vllm import LLM

    workload, settings = job.workload, job.settings
    share = {} if job.memory_share is None else {"gpu_memory_utilization": job.memory_share}
    return LLM(
        model=str(folder),
        load_format="dummy" if job.folder is None else "safetensors",
        skip_tokenizer_init=True,
        dtype=settings.dtype,
        quantization=quantization_argument(settings.quantization),
        kv_cache_dtype=settings.kv_cache_dtype,
        tensor_parallel_size=settings.tensor_parallel_size,
        enforce_eager=settings.mode == "eager",
        enable_prefix_caching=False,
        max_model_len=workload.input_length + workload.output_length,
        max_num_seqs=max(workload.batch_sizes),
        max_num_batched_tokens=count_prefill_tokens(workload),
        kv_cache_memory_bytes=kv_cache_bytes,
        **share,
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
    """Time every batch size; the repeats of the sizes take turns, so that a disturbance hits one repeat of each, not all of one.

    Between any two repeats, and at both ends, the machine's own pace is timed: a repeat's reference is the mean of its two neighbours.
    """
    workload, rng = job.workload, np.random.default_rng(job.seed)
    prompts = {
        batch: [{"prompt_token_ids": row} for row in rng.integers(0, vocab_size, (batch, workload.input_length)).tolist()]
        for batch in workload.batch_sizes
    }
    for batch in workload.batch_sizes:
        _generate(llm, prompts[batch], min(workload.output_length, _WARM_UP_TOKENS))
    seconds: dict[int, list[tuple[float, float, float]]] = {batch: [] for batch in workload.batch_sizes}
    pace = Pace(llm)
    after_s = pace.time()
    for _ in range(workload.repeats):
        for batch in workload.batch_sizes:
            prefill_s, total_s = _generate(llm, prompts[batch], workload.output_length)
            before_s, after_s = after_s, pace.time()
            seconds[batch].append((prefill_s, total_s, (before_s + after_s) / 2))
        _send(channel, "alive", name=job.name)
    return [BatchTimes(batch, *zip(*repeats, strict=True)) for batch, repeats in seconds.items()]


def _measure(job: EngineJob, channel: int, engines: list[Any]) -> dict[str, Any]:
    """Return what one engine took, and leave it in `engines`: freeing an engine takes longer than starting a small one."""
    settings = job.settings
    with tempfile.TemporaryDirectory(prefix="puzzle-dag-engine-") as scratch:
        folder, config = _read_config(job, Path(scratch))
        kv_cache_bytes = size_kv_cache(config, job.workload, settings) if job.memory_share is None else None
        start = time.perf_counter()
        llm = _start_engine(job, folder, kv_cache_bytes)
        engines.append(llm)
        start_s = time.perf_counter() - start
        _send(channel, "alive", name=job.name)
        try:
            measured = _measure_started(llm, job, config["vocab_size"], channel)
        finally:
            if settings.multiprocess or settings.tensor_parallel_size > 1:
                # Processes of the engine's own outlive this one, and would hold the memory of the next engine.
                llm.llm_engine.engine_core.shutdown()
        weight_bytes = None if job.folder is None else count_tensor_bytes(folder)
    return {"name": job.name, **measured, "weight_bytes": weight_bytes, "kv_cache_bytes": kv_cache_bytes, "start_s": start_s}


def _measure_started(llm: Any, job: EngineJob, vocab_size: int, channel: int) -> dict[str, Any]:
    """Return what an engine that runs says of itself, after its precision was checked, and what it took."""
    check_precision(llm, job.settings)
    times = _time_batches(llm, job, vocab_size, channel)
    kv_bytes = sum(llm.collective_rpc(count_kv_bytes_per_token))
    device_bytes = max(llm.collective_rpc(read_device_bytes))
    peak_rss_bytes = max(*llm.collective_rpc(read_peak_rss_bytes), read_peak_rss_bytes(None))
    cache, groups = llm.llm_engine.vllm_config.cache_config, llm.collective_rpc(list_group_block_tokens)[0]
    return {
        "times": [asdict(t) for t in times],
        "kv_bytes_per_token": round(kv_bytes),
        "kv_capacity_tokens": count_capacity_tokens(cache.num_gpu_blocks or 0, groups, cache.block_size) if kv_bytes else 0,
        # None where a version of vLLM doesn't say it.
        "kv_concurrency": getattr(cache, "kv_cache_max_concurrency", None) if kv_bytes else None,
        "kv_block_tokens": cache.block_size,
        "device_bytes": round(device_bytes) or None,
        "peak_rss_bytes": round(peak_rss_bytes),
    }


def _run(job: EngineJob, channel: int, engines: list[Any]) -> int:
    """Run one job in this process and send its "result" or "failed"; return the status to exit with. Its engine stays in `engines`."""
    try:
        _send(channel, "result", result=_measure(job, channel, engines))
    except Exception:
        traceback.print_exc()
        _send(channel, "failed", name=job.name, reason=traceback.format_exc(limit=-3))
        return _REPORTED
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def _log_to(path: Path) -> None:
    """Let all that this process writes from now on go into a file, written anew."""
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)
    os.dup2(log, sys.stdout.fileno())
    os.dup2(log, sys.stderr.fileno())
    os.close(log)


def _run_forked(job: EngineJob, channel: int, log: Path | None = None) -> None:
    """Run one job in a fork, with a log of its own; whatever becomes of the fork, exactly one "result" or "failed" event is sent."""
    process = os.fork()
    if process == 0:
        status, engines = 1, list[Any]()  # alive until the process ends, which tears nothing down
        try:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            _follow_parent(signal.SIGKILL)
            os.dup2(os.open(os.devnull, os.O_RDONLY), _STDIN)  # the files of further jobs are not the engine's to read
            if log is not None:
                _log_to(log)
            status = _run(job, channel, engines)
        finally:
            os._exit(status)
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    if code not in (0, _REPORTED):
        _send(channel, "failed", name=job.name, reason=f"the engine's process {describe_status(code)}")


def _find_refusal(jobs: list[EngineJob]) -> str | None:
    """Return why no engine can run these jobs, by vLLM's own lists, or None: told now, it costs no engine's start."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return None
    sizes = importlib.import_module("vllm.v1.attention.backends.cpu_attn").CPUAttentionBackend.get_supported_head_sizes()
    for job in jobs:
        config = job.config or json.loads((Path(job.folder or "") / "config.json").read_text())
        head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        if head_dim not in sizes:
            return (
                f"head_dim is {head_dim}; the attention of vLLM's CPU build does {', '.join(map(str, sizes))}, so serve this model on a GPU"
            )
    return None


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


def _run_all(path: Path, channel: int, *, alone: bool) -> None:
    """Run the jobs in a file, unless the engine refuses them."""
    jobs = [EngineJob.from_json(j) for j in json.loads(path.read_text())]
    refusal = _find_refusal(jobs)
    if refusal is not None:
        _send(channel, "refused", reason=refusal)
        return
    _send(channel, "ready")
    for job in jobs:
        _send(channel, "start", name=job.name)
        if alone:
            _run(job, channel, [])
        else:
            _run_forked(job, channel, log_path(path.parent, job.name))


def main(arguments: list[str]) -> None:
    """Run the jobs in a file and send their events to a file descriptor: `worker JOBS.json FD forked|alone`."""
    path, channel, alone = Path(arguments[0]), int(arguments[1]), arguments[2] == "alone"
    os.set_inheritable(channel, False)
    faulthandler.enable()  # a crash, and the signal that ends an engine that hangs, leave a traceback in the log
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    if os.getpgid(0) == os.getpid():  # started by the client: a killed client must not leave engines behind
        signal.signal(signal.SIGTERM, _end_group)
        _follow_parent(signal.SIGTERM)
    _import_engine()
    gc.collect()
    gc.freeze()
    _run_all(path, channel, alone=alone)
    if alone:
        return
    _send(channel, "done")
    for line in sys.stdin:
        further = Path(line.rstrip("\n"))
        _log_to(further.parent / "worker.log")
        _run_all(further, channel, alone=False)
        _send(channel, "done")


if __name__ == "__main__":
    main(sys.argv[1:])
