"""Stock vLLM, with our plugin found through its entry point, computes what our PyTorch model computes."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from puzzle_dag.model.checkpoint import save_checkpoint
from puzzle_dag.model.modeling_puzzle_dag import PuzzleDagForCausalLM

pytest.importorskip("vllm")

# Every kind of place; the first thing that runs is not an attention; 1, 2 and 4 KV heads side by side.
_MIXED = ("noop/noop", "noop/w64", "kv4/w128", "linear/noop", "kv2/linear", "kv1/w32")
_EAGER = {
    "llama": ("llama", _MIXED),
    "mistral": ("mistral", _MIXED),
    "qwen2": ("qwen2", _MIXED),
    "qwen3": ("qwen3", _MIXED),
    "no attention": ("llama", ("noop/w64", "linear/w32")),
    "nothing": ("llama", ("noop/noop", "noop/noop")),
}
_NUM_NEW = 10
MakeChild = Callable[..., PuzzleDagForCausalLM]
Served = list[list[dict[str, Any]]]


def _serve(models: list[PuzzleDagForCausalLM], options: dict[str, Any], tokenizer: Any, folder: Path) -> Served:
    jobs = []
    for index, model in enumerate(models):
        save_checkpoint(model, tokenizer, folder / f"child{index}")
        jobs.append({"folder": str(folder / f"child{index}"), "prompts": _prompts(model), "num_new": _NUM_NEW, "options": options})
    (folder / "jobs.json").write_text(json.dumps(jobs))
    arguments = [Path(__file__).with_name("vllm_logprobs.py"), folder / "jobs.json", folder / "out.json"]
    variables = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        env={**os.environ, **variables, "VLLM_CACHE_ROOT": str(folder / "cache")},
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # so that a hanging engine goes with whatever it started
    )
    try:
        _, errors = process.communicate(timeout=600)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == 0, errors[-4000:]
    served: Served = json.loads((folder / "out.json").read_text())
    return served


def _prompts(model: PuzzleDagForCausalLM) -> list[list[int]]:
    """Return three prompts of different lengths, longer than the sliding window of 8 where there is one."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(1, model.config.vocab_size, (length,), generator=generator).tolist() for length in (20, 13, 9)]


def _compare(model: PuzzleDagForCausalLM, served: list[dict[str, Any]]) -> None:
    """Compare vLLM's greedy tokens and every log-probability with one uncached pass of our model."""
    for prompt, output in zip(_prompts(model), served, strict=True):
        row = torch.tensor(prompt + output["tokens"])
        with torch.no_grad():
            expected = model(row[None], use_cache=False).logits[0, :-1].log_softmax(-1)
        assert expected[len(prompt) - 1 :].argmax(-1).tolist() == output["tokens"]
        got = torch.tensor(output["prompt_logprobs"] + output["logprobs"])
        torch.testing.assert_close(got, expected.gather(1, row[1:, None])[:, 0], atol=1e-4, rtol=0)


@pytest.fixture(scope="module")
def eager(make_child: MakeChild, micro_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All eager children, served one after the other by one process."""
    models = [make_child(family, *names) for family, names in _EAGER.values()]
    served = _serve(models, {"enforce_eager": True}, micro_tokenizer, tmp_path_factory.mktemp("eager"))
    return dict(zip(_EAGER, zip(models, served, strict=True), strict=True))


@pytest.mark.parametrize("child", _EAGER)
def test_eager_in_one_process(child: str, eager: dict[str, Any]) -> None:
    _compare(*eager[child])


@pytest.mark.slow
def test_compiled(make_child: MakeChild, micro_tokenizer: Any, tmp_path: Path) -> None:
    model = make_child("qwen3", "noop/w64", "kv4/linear", "linear/noop", "kv2/w32")
    [served] = _serve([model], {"enforce_eager": False}, micro_tokenizer, tmp_path)
    _compare(model, served)
