"""Engines with and without a draft model, one after another in one process, which imports vLLM once.

Run as `python -m puzzle_dag.serving.draft_worker JOBS.json`: each job's result is written to the path that it names,
under a temporary name first. An engine that can't be made gives a result with the engine's own message in `error`.
"""

import gc
import json
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

from puzzle_dag.engine.int8 import prepare_checkpoint, quantization_argument
from puzzle_dag.engine.jobs import EngineSettings, Workload
from puzzle_dag.engine.kv_cache import size_kv_cache
from puzzle_dag.engine.worker import count_prefill_tokens
from puzzle_dag.store import write_atomically

_COUNTERS = {
    "vllm:spec_decode_num_drafts": "num_drafts",
    "vllm:spec_decode_num_draft_tokens": "num_draft_tokens",
    "vllm:spec_decode_num_accepted_tokens": "num_accepted_tokens",
}
_WARM_UP_TOKENS = 4


def _start_engine(job: dict[str, Any], scratch: Path) -> Any:
    """Start a job's engine; what vLLM must load in another form than it lies there, it finds in `scratch`."""
    from vllm import LLM

    settings, draft = EngineSettings(**job["settings"]), job["draft"]
    folder = prepare_checkpoint(Path(job["folder"]), settings.quantization, scratch / "parent")
    if draft:
        draft = {**draft, "model": str(prepare_checkpoint(Path(draft["model"]), settings.quantization, scratch / "child"))}
    prompt_length, batch = len(job["prompts"][0]), max(job["batch_sizes"])
    workload = Workload(input_length=prompt_length, output_length=job["output_length"], batch_sizes=(batch,), repeats=1)
    num_draft = draft["num_speculative_tokens"] if draft else 0
    config = json.loads((folder / "config.json").read_text())
    return LLM(
        model=str(folder),
        load_format="safetensors",
        skip_tokenizer_init=True,
        dtype=settings.dtype,
        quantization=quantization_argument(settings.quantization),
        kv_cache_dtype=settings.kv_cache_dtype,
        tensor_parallel_size=settings.tensor_parallel_size,
        enforce_eager=settings.mode == "eager",
        enable_prefix_caching=False,
        max_model_len=min(prompt_length + job["output_length"] + num_draft, config["max_position_embeddings"]),
        max_num_seqs=batch,
        max_num_batched_tokens=max(count_prefill_tokens(workload), batch * (1 + num_draft)),
        # A child never has more KV heads than its parent, so twice the parent's cache holds both.
        kv_cache_memory_bytes=(2 if draft else 1) * size_kv_cache(config, workload, settings),
        disable_log_stats=False,
        seed=0,
        speculative_config=draft,
    )


def _count_drafts(llm: Any) -> dict[str, int]:
    counts = dict.fromkeys(_COUNTERS.values(), 0)
    for metric in llm.get_metrics():
        if metric.name in _COUNTERS:
            counts[_COUNTERS[metric.name]] += int(metric.value)
    return counts


def _generate(llm: Any, prompts: list[list[int]], num_tokens: int) -> tuple[float, float, list[list[int]]]:
    """Generate greedily; return seconds until the last first token, until the end, and the new tokens of each prompt."""
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=num_tokens, ignore_eos=True, detokenize=False, temperature=0.0)
    start_s = time.monotonic()
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False)
    total_s = time.monotonic() - start_s
    tokens = [list(o.outputs[0].token_ids) for o in outputs]
    assert all(len(t) == num_tokens for t in tokens), "vLLM stopped early"
    return max(o.metrics.first_token_ts for o in outputs) - start_s, total_s, tokens


def _measure(job: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="puzzle-dag-draft-") as scratch:
        llm = _start_engine(job, Path(scratch))
    batches, prompts = job["batch_sizes"], job["prompts"]
    for batch in batches:
        _generate(llm, prompts[:batch], min(job["output_length"], _WARM_UP_TOKENS))
    times: dict[int, dict[str, Any]] = {}
    for batch in batches:
        before, seconds = _count_drafts(llm), []
        for _ in range(job["repeats"]):
            prefill_s, total_s, tokens = _generate(llm, prompts[:batch], job["output_length"])
            seconds.append((prefill_s, total_s))
        counts = {name: count - before[name] for name, count in _count_drafts(llm).items()}
        times[batch] = {"prefill_s": [p for p, _ in seconds], "total_s": [t for _, t in seconds], "tokens": tokens, **counts}
    if job["settings"]["multiprocess"]:
        llm.llm_engine.engine_core.shutdown()
    return {"times": times}


def _clean_up() -> None:
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    gc.collect()
    cleanup_dist_env_and_memory()


def main(arguments: list[str]) -> None:
    """Run the jobs that a file lists."""
    for job in json.loads(Path(arguments[0]).read_text()):
        try:
            result = _measure(job)
        except Exception as error:
            traceback.print_exc()
            result = {"error": f"{type(error).__name__}: {error}"}
        _clean_up()
        write_atomically(Path(job["result"]), json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1:])
