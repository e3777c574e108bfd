"""A program, not a test: serve checkpoints with stock vLLM in one process and write tokens and log-probabilities.

    python vllm_logprobs.py JOBS.json OUT.json    JOBS: [{"folder", "prompts": [[token, ...], ...], "num_new", "options": {...}, "stock"?}]
"""

import gc
import json
import sys
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams
from vllm.distributed.parallel_state import cleanup_dist_env_and_memory


def serve(job: dict[str, Any]) -> list[dict[str, Any]]:
    """Generate greedily; return for each prompt the new tokens, their log-probabilities, and the prompt's from its second token on."""
    engine = LLM(job["folder"], dtype="float32", max_model_len=64, max_num_seqs=4, seed=0, kv_cache_memory_bytes=2**24, **job["options"])
    sampling = SamplingParams(temperature=0, max_tokens=job["num_new"], ignore_eos=True, logprobs=0, prompt_logprobs=0, detokenize=False)
    outputs = engine.generate([{"prompt_token_ids": prompt} for prompt in job["prompts"]], sampling, use_tqdm=False)
    results = []
    for prompt, output in zip(job["prompts"], outputs, strict=True):
        new = list(output.outputs[0].token_ids)
        results.append(
            {
                "tokens": new,
                "logprobs": [step[token].logprob for token, step in zip(new, output.outputs[0].logprobs, strict=True)],
                "prompt_logprobs": [step[token].logprob for token, step in zip(prompt[1:], output.prompt_logprobs[1:], strict=True)],
            }
        )
    if job.get("stock"):
        assert not any(name.partition(".")[0] == "puzzle_dag" for name in sys.modules), "this was to be stock vLLM"
    del engine
    gc.collect()
    cleanup_dist_env_and_memory()
    return results


if __name__ == "__main__":
    jobs, out = map(Path, sys.argv[1:])
    gc.freeze()  # what vLLM imports is hundreds of thousands of objects, and is looked through twice for every engine that ends
    out.write_text(json.dumps([serve(job) for job in json.loads(jobs.read_text())]))
