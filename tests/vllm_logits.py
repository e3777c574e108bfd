"""A program, not a test: serve checkpoints with stock vLLM and write its tokens and logits.

    python vllm_logits.py JOBS.json OUT.pt    JOBS: [{"folder", "prompts": [[token, ...], ...], "num_new", "options": {...}, "stock"}]
"""

import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch
from vllm import LLM, SamplingParams
from vllm.distributed.parallel_state import cleanup_dist_env_and_memory


def _row(entries: dict[int, Any]) -> list[float]:
    """Return a position's logits in the order of the vocabulary."""
    return [entries[token].logprob for token in range(len(entries))]


def serve(job: dict[str, Any]) -> list[dict[str, Any]]:
    """Generate greedily; return for each prompt the new tokens, and the logits [positions, vocabulary] that predict all but the first."""
    limits = {"max_model_len": 64, "max_num_seqs": 4, "kv_cache_memory_bytes": 2**24}
    engine = LLM(job["folder"], dtype="float32", seed=0, logprobs_mode="raw_logits", max_logprobs=-1, **limits, **job["options"])
    wanted = {"logprobs": -1, "prompt_logprobs": -1, "detokenize": False}
    sampling = SamplingParams(temperature=0, max_tokens=job["num_new"], ignore_eos=True, **wanted)
    outputs = engine.generate([{"prompt_token_ids": prompt} for prompt in job["prompts"]], sampling, use_tqdm=False)
    results = []
    for output in outputs:
        rows = [_row(entries) for entries in (*output.prompt_logprobs[1:], *output.outputs[0].logprobs)]
        results.append({"tokens": list(output.outputs[0].token_ids), "logits": torch.tensor(rows)})
    if job["stock"]:
        assert not any(name.partition(".")[0] == "puzzle_dag" for name in sys.modules), "this was to be stock vLLM"
    del engine
    gc.collect()
    cleanup_dist_env_and_memory()
    return results


if __name__ == "__main__":
    jobs, out = map(Path, sys.argv[1:])
    gc.freeze()  # what vLLM imports is hundreds of thousands of objects, and is looked through twice for every engine that ends
    torch.save([serve(job) for job in json.loads(jobs.read_text())], out)
