"""Stock vLLM, with our plugin found through its entry point, computes what our PyTorch model computes: whole rows of logits.

The engine core in a process of its own has its test beside the server, which always runs it so (test_vllm_serve.py).
"""

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

from puzzle_dag.children.export import export_deci
from puzzle_dag.children.fuse import fuse_model
from puzzle_dag.model.checkpoint import save_checkpoint
from puzzle_dag.model.configuration_puzzle_dag import PuzzleDagConfig
from puzzle_dag.model.modeling_puzzle_dag import PuzzleDagForCausalLM

pytest.importorskip("vllm")

# Every kind of place; the first thing that runs is not an attention; 1, 2 and 4 KV heads side by side; and, where a run is given,
# its FFNs fused into one that is wider than the parent's.
_MIXED = ("noop/noop", "noop/w64", "kv4/w128", "linear/noop", "kv2/linear", "kv1/w32", "noop/w128", "noop/w64")
# What stock vLLM's DeciLM can compute.
_DECI = ("noop/noop", "kv4/w128", "noop/w96", "kv1/noop", "noop/noop", "kv2/w32")
# As many kinds of place in as few layers as may be, since every piece of a layer is compiled: linear attention and FFN, 2 and 4 KV heads,
# an FFN that is fused from two, and so a layer of which nothing is left.
_SHORT = ("linear/w64", "kv4/w32", "noop/w64", "kv2/linear")
_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
_CHILDREN = {
    **{f"{family}, eager": (family, _MIXED, range(5, 8)) for family in _FAMILIES},
    "no attention, eager": ("llama", ("noop/w64", "linear/w32"), None),
    "nothing, eager": ("llama", ("noop/noop", "noop/noop"), None),
    "exported, eager": ("llama", _DECI, range(1, 3)),
    **{f"{family}, compiled": (family, _SHORT, range(1, 3)) for family in _FAMILIES},
}
_NUM_NEW = 10
MakeChild = Callable[..., PuzzleDagForCausalLM]
Served = list[list[dict[str, Any]]]


def _write_job(model: PuzzleDagForCausalLM, tokenizer: Any, folder: Path, *, exported: bool = False, **options: Any) -> dict[str, Any]:
    """Write a checkpoint, or its export in the Deci schema, into `folder`; return the job that serves it with some options of vLLM."""
    save_checkpoint(model, tokenizer, folder / "child")
    if exported:
        export_deci(folder / "child", folder / "deci")
    return {"folder": str(folder / ("deci" if exported else "child")), "prompts": _prompts(model), "num_new": _NUM_NEW, "options": options}


def _serve(jobs: list[dict[str, Any]], folder: Path, *, plugins: bool = True, multiprocess: bool = False) -> Served:
    """Serve checkpoints one after the other by one process."""
    (folder / "jobs.json").write_text(json.dumps([{**job, "stock": not plugins} for job in jobs]))
    arguments = [Path(__file__).with_name("vllm_logits.py"), folder / "jobs.json", folder / "out.pt"]
    variables = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    if multiprocess:  # each worker is bound to a NUMA node of its own unless told otherwise
        variables |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    if not plugins:
        variables["VLLM_PLUGINS"] = ""
    process = subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        env={**os.environ, **variables, "VLLM_CACHE_ROOT": str(folder.parent / "vllm_cache")},
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # so that a hanging engine goes with whatever it started
    )
    try:
        _, errors = process.communicate(timeout=1200)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == 0, errors[-4000:]
    served: Served = torch.load(folder / "out.pt")
    return served


def _prompts(model: PuzzleDagForCausalLM) -> list[list[int]]:
    """Return three prompts of different lengths, longer than the sliding window of 8 where there is one."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(1, model.config.vocab_size, (length,), generator=generator).tolist() for length in (20, 13, 9)]


def _compare(model: PuzzleDagForCausalLM, served: list[dict[str, Any]]) -> None:
    """Compare vLLM's greedy tokens, and the logits of the whole vocabulary at every position, with one uncached pass of our model."""
    for prompt, output in zip(_prompts(model), served, strict=True):
        row = torch.tensor(prompt + output["tokens"])
        with torch.no_grad():
            expected = model(row[None], use_cache=False).logits[0, :-1]
        assert expected[len(prompt) - 1 :].argmax(-1).tolist() == output["tokens"]
        torch.testing.assert_close(output["logits"], expected, atol=1e-4, rtol=0)


@pytest.fixture(scope="module")
def in_one_process(make_child: MakeChild, micro_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Every child and what vLLM says of it; one process serves all, as importing vLLM takes 9 s."""
    folder, models, jobs = tmp_path_factory.mktemp("in-one-process"), [], []
    for index, (name, (family, names, run)) in enumerate(_CHILDREN.items()):
        model = make_child(family, *names)
        models.append(model if run is None else fuse_model(model, [run]))
        modes: dict[str, Any] = {"exported": name.startswith("exported"), "enforce_eager": name.endswith("eager")}
        jobs.append(_write_job(models[-1], micro_tokenizer, folder / str(index), **modes))
    return dict(zip(_CHILDREN, zip(models, _serve(jobs, folder), strict=True), strict=True))


@pytest.mark.parametrize("child", _CHILDREN)
def test_in_one_process(child: str, in_one_process: dict[str, Any]) -> None:
    _compare(*in_one_process[child])


def _tie_head(model: PuzzleDagForCausalLM) -> PuzzleDagForCausalLM:
    fields = model.config.to_dict()
    fields.pop("model_type")
    tied = PuzzleDagForCausalLM(PuzzleDagConfig(**{**fields, "tie_word_embeddings": True})).eval()
    tied.load_state_dict({name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}, strict=False)
    return tied


def test_exports_in_stock_vllm_without_our_plugin(make_child: MakeChild, micro_tokenizer: Any, tmp_path: Path) -> None:
    """The Llama has an FFN that is wider than its parent's and a tied head, the Qwen2 biases and a sliding window in some layers."""
    models = [_tie_head(fuse_model(make_child("llama", *_DECI), [range(1, 3)])), make_child("qwen2", *_DECI)]
    options: dict[str, Any] = {"exported": True, "enforce_eager": True, "trust_remote_code": True}
    jobs = [_write_job(model, micro_tokenizer, tmp_path / str(index), **options) for index, model in enumerate(models)]
    for model, outputs in zip(models, _serve(jobs, tmp_path, plugins=False), strict=True):
        _compare(model, outputs)


@pytest.mark.slow
@pytest.mark.skipif("PUZZLE_DAG_TEST_PARALLEL" not in os.environ, reason="PUZZLE_DAG_TEST_PARALLEL is not set: minutes on two cores")
@pytest.mark.parametrize("option", ["", "tensor_parallel_size", "pipeline_parallel_size"])
def test_in_several_processes(option: str, make_child: MakeChild, micro_tokenizer: Any, tmp_path: Path) -> None:
    model = fuse_model(make_child("qwen3", *_MIXED), [range(5, 8)])
    # Eager pipelines fail on vLLM's CPU build with its own Llama as well: what a stage receives is only made room for while it compiles.
    options: dict[str, Any] = {"enforce_eager": option != "pipeline_parallel_size", **({option: 2} if option else {})}
    [served] = _serve([_write_job(model, micro_tokenizer, tmp_path, **options)], tmp_path, multiprocess=True)
    _compare(model, served)
