"""Children survive saving, load with and without this package, and a failed save leaves the old checkpoint."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_model import plain_logits
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from puzzle_dag.architecture import Block
from puzzle_dag.config import ParentSource
from puzzle_dag.model.checkpoint import (
    CheckpointMismatchError,
    architecture_of,
    child_config,
    load_checkpoint,
    register_auto_classes,
    save_checkpoint,
)
from puzzle_dag.model.modeling_puzzle_dag import PuzzleDagForCausalLM
from puzzle_dag.model.parent import load_parent, read_parent_shape

_MIXED = ("noop/w64", "kv4/w128", "linear/noop", "kv2/linear", "noop/noop", "kv1/w32")
MakeChild = Callable[..., PuzzleDagForCausalLM]

_WITHOUT_THE_PACKAGE = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "puzzle_dag":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocked())
import torch
from safetensors.torch import load_file, save_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, tokens, out = sys.argv[1:]
prompt = load_file(tokens)["tokens"]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
AutoTokenizer.from_pretrained(folder)
with torch.no_grad():
    logits = model(prompt).logits
    generated = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, min_new_tokens=6, do_sample=False)
assert "puzzle_dag" not in sys.modules
save_file({"logits": logits.contiguous(), "generated": generated.contiguous()}, out)
"""


def _tokens(model: PuzzleDagForCausalLM) -> torch.Tensor:
    return torch.randint(1, model.config.vocab_size, (2, 15), generator=torch.Generator().manual_seed(1))


def _logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(tokens).logits
    return logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_round_trip(family: str, dtype: torch.dtype, make_child: MakeChild, micro_tokenizer: Any, tmp_path: Path) -> None:
    model = make_child(family, *_MIXED).to(dtype)
    save_checkpoint(model, micro_tokenizer, tmp_path / "child")
    loaded = load_checkpoint(tmp_path / "child")
    assert loaded.dtype == dtype
    assert tuple(block.name for block in architecture_of(loaded.config)) == _MIXED
    assert torch.equal(_logits(loaded, _tokens(model)), _logits(model, _tokens(model)))
    assert load_checkpoint(tmp_path / "child", dtype="float32").dtype == torch.float32
    text = "sum: 1 + 2"
    assert AutoTokenizer.from_pretrained(tmp_path / "child")(text)["input_ids"] == micro_tokenizer(text)["input_ids"]


def test_what_a_checkpoint_holds(make_child: MakeChild, micro_tokenizer: Any, tmp_path: Path) -> None:
    save_checkpoint(make_child("qwen2", *_MIXED), micro_tokenizer, tmp_path / "child")
    written = json.loads((tmp_path / "child" / "config.json").read_text())
    assert "block_configs" not in written
    assert written["architectures"] == ["PuzzleDagForCausalLM"]
    assert written["per_layer_config"] == {
        "0": {"intermediate_size": 64, "skip": ["attention"]},
        "2": {"replace_with_linear": ["attention"], "skip": ["mlp"]},
        "3": {"num_key_value_heads": 2, "replace_with_linear": ["mlp"]},
        "4": {"skip": ["attention", "mlp"]},
        "5": {"intermediate_size": 32, "num_key_value_heads": 1},
    }
    files = {path.name for path in (tmp_path / "child").iterdir()}
    assert {"model.safetensors", "tokenizer.json", "configuration_puzzle_dag.py", "modeling_puzzle_dag.py"} <= files
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pth", ".pkl"))]
    names = set(load_file(tmp_path / "child" / "model.safetensors"))
    assert {"model.layers.3.self_attn.q_proj.bias", "model.layers.3.mlp.linear_mlp.weight"} <= names
    assert not any(name.startswith("model.layers.4.") for name in names)


def test_a_child_of_parent_blocks_has_the_parents_logits_bit_for_bit(micro_parent_folder: Path, tmp_path: Path) -> None:
    parent = load_parent(ParentSource(path=str(micro_parent_folder)), tmp_path)
    config = child_config(parent.config, (parent.block,) * parent.num_layers)
    child = PuzzleDagForCausalLM(config).eval()
    child.load_state_dict(parent.model.state_dict())
    save_checkpoint(child, parent.tokenizer, tmp_path / "child")
    reference = LlamaForCausalLM.from_pretrained(micro_parent_folder).eval()
    tokens = _tokens(child)
    assert torch.equal(_logits(load_checkpoint(tmp_path / "child"), tokens), _logits(reference, tokens))


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_auto_classes_load_a_child_with_the_package(family: str, make_child: MakeChild, micro_tokenizer: Any, tmp_path: Path) -> None:
    register_auto_classes()
    register_auto_classes()
    model = make_child(family, *_MIXED)
    save_checkpoint(model, micro_tokenizer, tmp_path / "child")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "child").eval()
    assert type(loaded) is PuzzleDagForCausalLM
    assert type(AutoConfig.from_pretrained(tmp_path / "child")) is type(model.config)
    assert torch.equal(_logits(loaded, _tokens(model)), _logits(model, _tokens(model)))


@pytest.mark.parametrize(("family", "names"), [("llama", _MIXED), ("qwen3", ("linear/w64", "kv2/noop"))])
def test_a_child_loads_and_generates_without_the_package(
    family: str, names: tuple[str, ...], make_child: MakeChild, micro_tokenizer: Any, tmp_path: Path
) -> None:
    model = make_child(family, *names)
    tokens = _tokens(model)
    save_checkpoint(model, micro_tokenizer, tmp_path / "child")
    save_file({"tokens": tokens}, tmp_path / "tokens.safetensors")
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    arguments = [tmp_path / "child", tmp_path / "tokens.safetensors", tmp_path / "out.safetensors"]
    run = subprocess.run(
        [sys.executable, "-c", _WITHOUT_THE_PACKAGE, *map(str, arguments)], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    got = load_file(tmp_path / "out.safetensors")
    assert torch.equal(got["logits"], _logits(model, tokens))
    expected = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert torch.equal(got["generated"], expected)
    written = json.loads((tmp_path / "child" / "config.json").read_text())
    tensors = load_file(tmp_path / "child" / "model.safetensors")
    torch.testing.assert_close(got["logits"][0].double(), plain_logits(tokens[0], tensors, written), atol=2e-5, rtol=0)


@pytest.mark.parametrize("names", [_MIXED, ("kv4/w128",) * 2, ("noop/noop", "linear/linear")])
def test_architecture_is_read_back(names: tuple[str, ...], family_parent_folder: dict[str, Path]) -> None:
    for folder in family_parent_folder.values():
        shape = read_parent_shape(ParentSource(path=str(folder)), Path())
        shape.num_hidden_layers, shape.layer_types = len(names), (shape.layer_types * 3)[: len(names)]
        config = child_config(shape, tuple(Block.parse(name) for name in names))
        assert tuple(block.name for block in architecture_of(config)) == names
        assert (config.num_key_value_heads, config.intermediate_size) == (4, 128)


def test_an_architecture_of_another_depth_or_of_other_heads_is_refused(micro_parent_folder: Path) -> None:
    shape = read_parent_shape(ParentSource(path=str(micro_parent_folder)), Path())
    with pytest.raises(ValueError, match="architecture has 1 layers, the parent 2"):
        child_config(shape, (Block.parse("kv4/w128"),))
    with pytest.raises(ValueError, match="layer 1: num_key_value_heads is 3"):
        child_config(shape, (Block.parse("kv4/w128"), Block.parse("kv3/w128")))


class _FullDisk:
    """A tokenizer whose files don't fit any more."""

    def save_pretrained(self, folder: Path) -> None:
        (Path(folder) / "tokenizer.json").write_text("{")
        raise OSError(28, "No space left on device")


def test_a_failed_save_leaves_the_old_checkpoint_and_nothing_half_written(
    make_child: MakeChild, micro_tokenizer: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "child"
    old = make_child("llama", "kv4/w128", "noop/w64")
    save_checkpoint(old, micro_tokenizer, folder)
    new = make_child("llama", "linear/w128", seed=12)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(new, _FullDisk(), folder)
    assert [path.name for path in tmp_path.iterdir()] == ["child"]
    assert torch.equal(_logits(load_checkpoint(folder), _tokens(old)), _logits(old, _tokens(old)))
    save_checkpoint(new, micro_tokenizer, folder)
    assert torch.equal(_logits(load_checkpoint(folder), _tokens(new)), _logits(new, _tokens(new)))


def test_what_is_no_child_is_refused(micro_parent_folder: Path, make_child: MakeChild, micro_tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no checkpoint: it holds no config\.json"):
        load_checkpoint(tmp_path)
    with pytest.raises(ValueError, match=r"model_type 'llama'.*load_parent"):
        load_checkpoint(micro_parent_folder)
    save_checkpoint(make_child("llama", "kv4/w128", "noop/w64"), micro_tokenizer, tmp_path / "child")
    path = tmp_path / "child" / "config.json"
    written = json.loads(path.read_text())
    written["per_layer_config"]["1"]["intermediate_size"] = 96
    path.write_text(json.dumps(written))
    with pytest.raises(CheckpointMismatchError):
        load_checkpoint(tmp_path / "child")
