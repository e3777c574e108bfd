"""Children in the Deci / Nemotron-NAS schema: what is written, and what is refused. Loading in stock vLLM: test_vllm_plugin.py."""

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer

from puzzle_dag import cli
from puzzle_dag.children.export import export_deci
from puzzle_dag.model.checkpoint import CheckpointMismatchError, save_checkpoint
from puzzle_dag.model.deci import NotDeciError, find_ffn_mult, find_misfits, round_ffn_mult, to_deci_config
from puzzle_dag.model.modeling_puzzle_dag import PuzzleDagForCausalLM

MakeChild = Callable[..., PuzzleDagForCausalLM]
_FITTING = ("noop/noop", "kv4/w64", "noop/w300", "kv1/noop", "kv2/w128")


def test_export_says_of_every_block_what_it_is(make_child: MakeChild, micro_tokenizer: Any, tmp_path: Path) -> None:
    save_checkpoint(make_child("llama", *_FITTING), micro_tokenizer, tmp_path / "child")
    assert cli.main(["export", str(tmp_path / "child"), "--format", "deci", "--out", str(tmp_path / "deci")]) == 0
    written = json.loads((tmp_path / "deci" / "config.json").read_text())
    assert (written["architectures"], written["model_type"]) == (["DeciLMForCausalLM"], "nemotron-nas")
    assert written["rope_parameters"]["rope_theta"] == written["rope_theta"] == 50_000.0
    assert [block["attention"]["n_heads_in_group"] for block in written["block_configs"]] == [None, 1, None, 4, 2]
    assert [block["ffn"]["intermediate_size"] for block in written["block_configs"]] == [None, 64, 300, None, 128]
    assert [block["attention"]["no_op"] for block in written["block_configs"]] == [True, False, True, False, False]
    assert [block["ffn"]["no_op"] for block in written["block_configs"]] == [True, False, False, True, False]
    assert not {"per_layer_config", "replace_with_linear", "family"} & set(written)
    tensors = (tmp_path / "child" / "model.safetensors").read_bytes()
    assert (tmp_path / "deci" / "model.safetensors").read_bytes() == tensors
    assert not list((tmp_path / "deci").glob("*puzzle_dag*")) and (tmp_path / "deci" / "tokenizer.json").is_file()
    assert AutoTokenizer.from_pretrained(tmp_path / "deci").vocab_size > 0


def test_shipped_configuration_survives_what_engines_do_to_it(make_child: MakeChild, micro_tokenizer: Any, tmp_path: Path) -> None:
    save_checkpoint(make_child("qwen2", *_FITTING), micro_tokenizer, tmp_path / "child")
    export_deci(tmp_path / "child", tmp_path / "deci")
    config = AutoConfig.from_pretrained(tmp_path / "deci", trust_remote_code=True)
    assert type(config).__module__.startswith("transformers_modules")
    config.save_pretrained(tmp_path / "again")
    again = AutoConfig.from_pretrained(tmp_path / "deci", trust_remote_code=True)
    for other in (again, copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert other.to_dict() == config.to_dict()
        first, second = other.block_configs[:2]
        assert first.attention.no_op and first.ffn.no_op
        assert not hasattr(first.attention, "n_heads_in_group") and not hasattr(first.ffn, "ffn_mult")
        assert (second.attention.n_heads_in_group, second.ffn.intermediate_size) == (1, 64)
    assert config.qkv_bias and not config.attention_bias
    assert config.layer_types == ["full_attention", "sliding_attention"] * 2 + ["full_attention"]


def test_ffn_mult_is_read_back_as_the_width() -> None:
    for hidden_size in (64, 192, 4096, 5120, 8192, 16384):
        for width in range(256, 6 * hidden_size + 256, 256):
            assert round_ffn_mult(find_ffn_mult(width, hidden_size), hidden_size) == width


def test_ffn_mult_instead_of_the_width(make_child: MakeChild) -> None:
    config = make_child("llama", "kv4/w512", "noop/noop").config
    blocks = to_deci_config(config, as_ffn_mult=True)["block_configs"]
    assert round_ffn_mult(blocks[0]["ffn"]["ffn_mult"], config.hidden_size) == 512
    assert blocks[1]["ffn"]["ffn_mult"] is None
    assert all("intermediate_size" not in block["ffn"] for block in blocks)


@pytest.mark.parametrize(
    ("family", "names", "as_ffn_mult", "misfits"),
    [
        ("llama", _FITTING, False, []),
        ("llama", ("kv4/w64", "linear/w64", "noop/linear"), False, ["layer 1: linear attention", "layer 2: linear FFN"]),
        ("llama", ("noop/w64", "noop/noop", "kv4/w64"), False, ["layer 0: an FFN before the first attention"]),
        ("llama", ("noop/noop", "noop/noop"), False, ["no layer has attention"]),
        ("qwen3", ("kv4/w64",), False, ["every layer: qk-norm (family qwen3)"]),
        (
            "llama",
            ("kv4/w256", "kv4/w300"),
            True,
            ["layer 1: intermediate_size 300 is no multiple of 256, to which ffn_mult is rounded up"],
        ),
    ],
)
def test_what_does_not_fit_is_named_with_its_layer(
    family: str, names: tuple[str, ...], as_ffn_mult: bool, misfits: list[str], make_child: MakeChild
) -> None:
    config = make_child(family, *names).config
    assert find_misfits(config, as_ffn_mult=as_ffn_mult) == misfits
    if misfits:
        with pytest.raises(NotDeciError, match=misfits[0].split(" (")[0]):
            to_deci_config(config, as_ffn_mult=as_ffn_mult)


def test_bad_input_leaves_nothing(
    make_child: MakeChild, micro_tokenizer: Any, micro_parent_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_checkpoint(make_child("llama", "kv4/w64", "linear/w64"), micro_tokenizer, tmp_path / "linear")
    save_checkpoint(make_child("llama", "kv4/w64", "noop/w64"), micro_tokenizer, tmp_path / "short")
    tensors = load_file(tmp_path / "short" / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "short" / "model.safetensors", metadata={"format": "pt"})
    out = tmp_path / "deci"
    for folder, message in (
        (tmp_path / "linear", "layer 1: linear attention"),
        (micro_parent_folder, "model_type 'llama'"),
        (tmp_path, "holds no config.json"),
        (tmp_path / "short", "model.layers.1.mlp.up_proj.weight is missing, the configuration asks for (64, 64)"),
    ):
        assert cli.main(["export", str(folder), "--format", "deci", "--out", str(out)]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(CheckpointMismatchError):
        export_deci(tmp_path / "short", out)
    with pytest.raises(ValueError, match="exists; name a folder"):
        export_deci(tmp_path / "short", tmp_path / "linear")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["linear", "short"]
