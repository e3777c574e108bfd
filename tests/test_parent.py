"""A parent in our model computes what transformers' own model computes, bit for bit, and is told apart by its digests."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILY_NAMES
from huggingface_hub import snapshot_download
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from puzzle_dag.config import ParentSource
from puzzle_dag.model.checkpoint import CheckpointMismatchError
from puzzle_dag.model.families import UnsupportedFamilyError
from puzzle_dag.model.parent import Parent, ParentNotFoundError, load_parent, read_parent_shape, read_tokenizer

_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def _load(folder: Path, **keywords: Any) -> Parent:
    return load_parent(ParentSource(path=folder.name), folder.parent, **keywords)


def _assert_same_logits(folder: Path, dtype: torch.dtype) -> None:
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    parent = _load(folder)
    assert parent.model.dtype == reference.dtype == dtype
    tokens = torch.randint(0, parent.config.vocab_size, (2, 24), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected, got = reference(tokens).logits, parent.model(tokens).logits
    assert expected.float().std() > 0.1
    assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_parent_logits_are_transformers_bit_for_bit(family: str, dtype: torch.dtype, save_parent: Callable[..., Path]) -> None:
    _assert_same_logits(save_parent(family, dtype=dtype), dtype)


@pytest.mark.parametrize(
    ("family", "traits"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 2}),
        ("llama", {"rope_parameters": _LLAMA3_ROPE, "tie_word_embeddings": True}),
        ("llama", {"max_shard_size": "100KB"}),
        ("mistral", {"sliding_window": None, "head_dim": 48, "num_key_value_heads": 1}),
        ("qwen2", {"use_sliding_window": False, "tie_word_embeddings": True}),
        ("qwen3", {"attention_bias": True, "num_attention_heads": 5, "num_key_value_heads": 5}),
    ],
)
def test_traits_keep_the_logits_bit_for_bit(family: str, traits: dict[str, Any], save_parent: Callable[..., Path]) -> None:
    folder = save_parent(family, **traits)
    assert ("max_shard_size" in traits) == (folder / "model.safetensors.index.json").exists()
    _assert_same_logits(folder, torch.float32)


def test_what_a_parent_says_of_itself(save_parent: Callable[..., Path]) -> None:
    folder = save_parent("qwen3", num_key_value_heads=2)
    parent = _load(folder)
    assert (parent.num_layers, parent.kv_heads, parent.intermediate_size, parent.block.name) == (2, 2, 128, "kv2/w128")
    assert not parent.model.training
    attention, ffn = parent.layer_state(1, "attention"), parent.layer_state(1, "ffn")
    projections = {f"self_attn.{n}_proj.weight" for n in "qkvo"}
    assert set(attention) == {"input_layernorm.weight", "self_attn.q_norm.weight", "self_attn.k_norm.weight", *projections}
    assert set(ffn) == {"post_attention_layernorm.weight", *(f"mlp.{n}_proj.weight" for n in ("gate", "up", "down"))}
    stored = load_file(folder / "model.safetensors")
    assert all(torch.equal(t, stored[f"model.layers.1.{n}"]) for n, t in {**attention, **ffn}.items())
    text = "copy: a b c"
    assert parent.tokenizer.decode(parent.tokenizer(text)["input_ids"]) == text


def test_shape_is_read_without_weights(micro_parent_folder: Path, tmp_path: Path) -> None:
    shutil.copy(micro_parent_folder / "config.json", tmp_path / "config.json")
    shape = read_parent_shape(ParentSource(path="."), tmp_path)
    assert (shape.num_hidden_layers, shape.num_key_value_heads, shape.intermediate_size) == (2, 4, 128)
    assert shape.rope_parameters["rope_theta"] == 50_000.0


def test_digest_is_of_the_stored_tensors_whatever_the_dtype(micro_parent_folder: Path) -> None:
    stored, computed = _load(micro_parent_folder), _load(micro_parent_folder, dtype="bfloat16")
    assert computed.model.dtype == torch.bfloat16
    assert stored.digest == computed.digest
    assert stored.layer_digests == computed.layer_digests


def test_one_changed_weight_changes_its_layer_and_the_whole(micro_parent_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(micro_parent_folder, tmp_path / "changed")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] += 1e-3
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    before, after = _load(micro_parent_folder), _load(folder)
    assert before.digest != after.digest
    assert before.layer_digest(0) == after.layer_digest(0)
    assert before.layer_digest(1) != after.layer_digest(1)


def test_another_rope_is_another_parent(micro_parent_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(micro_parent_folder, tmp_path / "rope")
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 10_000.0
    (folder / "config.json").write_text(json.dumps(config))
    before, after = _load(micro_parent_folder), _load(folder)
    assert before.digest != after.digest
    assert before.layer_digest(0) != after.layer_digest(0)


def test_sharding_does_not_change_the_digest(save_parent: Callable[..., Path]) -> None:
    assert _load(save_parent("llama")).digest == _load(save_parent("llama", max_shard_size="100KB")).digest


def test_missing_folder_and_folder_without_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ParentNotFoundError, match=r"nowhere does not exist.*give the folder"):
        load_parent(ParentSource(path="nowhere"), tmp_path)
    with pytest.raises(ParentNotFoundError, match=r"holds no config\.json"):
        read_parent_shape(ParentSource(path="."), tmp_path)


def test_checkpoint_without_safetensors(micro_parent_folder: Path, tmp_path: Path) -> None:
    shutil.copy(micro_parent_folder / "config.json", tmp_path / "config.json")
    with pytest.raises(ParentNotFoundError, match=r"holds no \*\.safetensors; convert"):
        load_parent(ParentSource(path="."), tmp_path)


@pytest.mark.parametrize("lacking", ["model.layers.1.mlp.up_proj.weight", "lm_head.weight"])
def test_an_incomplete_checkpoint_is_refused(lacking: str, micro_parent_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(micro_parent_folder, tmp_path / "cut")
    tensors = load_file(folder / "model.safetensors")
    del tensors[lacking]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointMismatchError, match=f"lacks {lacking}"):
        _load(folder)


def test_a_hub_id_that_cannot_be_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ParentNotFoundError, match="nobody/nothing can't be read"):
        read_parent_shape(ParentSource(hub="nobody/nothing"), tmp_path)


@pytest.fixture
def hub(family_parent_folder: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """`hub(family)` puts a parent where a download of org/FAMILY at revision "v1" leaves one; the hub itself can't be reached."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))

    def download(family: str) -> str:
        folder, commit = tmp_path / f"models--org--{family}", "0123456789abcdef" * 2 + "01234567"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "v1").write_text(commit)
        shutil.copytree(family_parent_folder[family], folder / "snapshots" / commit)
        return f"org/{family}"

    return download


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_a_parent_by_hub_id_is_the_one_of_its_folder(
    family: str, family_parent_folder: dict[str, Path], hub: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []

    def listen(repo_id: str, **options: Any) -> str:
        asked.append({"repo_id": repo_id, **options})
        return snapshot_download(repo_id, **options)

    monkeypatch.setattr("puzzle_dag.model.parent.snapshot_download", listen)
    source, folder = ParentSource(hub=hub(family), revision="v1"), family_parent_folder[family]
    assert read_parent_shape(source, tmp_path).to_dict() == read_parent_shape(ParentSource(path=str(folder)), tmp_path).to_dict()
    assert read_tokenizer(source, tmp_path)("sum: 1 + 2") == read_tokenizer(ParentSource(path=str(folder)), tmp_path)("sum: 1 + 2")
    assert asked == [], "neither needs the weights"
    loaded, local = load_parent(source, tmp_path), _load(folder)
    assert (loaded.digest, loaded.layer_digests, loaded.block) == (local.digest, local.layer_digests, local.block)
    (request,) = asked
    assert (request["repo_id"], request["revision"]) == (f"org/{family}", "v1")
    # A download brings all that a parent is read from, and no second copy of its weights.
    files = [p.name for p in folder.iterdir()]
    wanted = filter_repo_objects([*files, "pytorch_model.bin", "model.gguf"], allow_patterns=request["allow_patterns"])
    assert sorted(wanted) == sorted(files)


def test_a_revision_that_was_never_downloaded_is_named(hub: Callable[[str], str], tmp_path: Path) -> None:
    with pytest.raises(ParentNotFoundError, match="org/llama can't be read"):
        read_parent_shape(ParentSource(hub=hub("llama"), revision="v2"), tmp_path)


def test_unsupported_family_is_named_before_weights_are_looked_for(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(UnsupportedFamilyError, match=r"gpt2.*llama, mistral, qwen2, qwen3"):
        load_parent(ParentSource(path="."), tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "never_heard_of"}))
    with pytest.raises(UnsupportedFamilyError, match="llama, mistral, qwen2, qwen3"):
        load_parent(ParentSource(path="."), tmp_path)


def test_code_of_the_checkpoint_runs_only_where_the_source_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder, trace = tmp_path / "remote", tmp_path / "it_ran"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": {"AutoConfig": "configuration_own.OwnConfig"}}))
    code = f"""
from pathlib import Path
from transformers import LlamaConfig
Path({str(trace)!r}).touch()
class OwnConfig(LlamaConfig):
    model_type = "own"
"""
    (folder / "configuration_own.py").write_text(code)
    with pytest.raises(UnsupportedFamilyError, match="trust_remote_code"):
        read_parent_shape(ParentSource(path="remote"), tmp_path)
    assert not trace.exists()
    with pytest.raises(UnsupportedFamilyError, match="model_type is 'own'"):
        read_parent_shape(ParentSource(path="remote", trust_remote_code=True), tmp_path)
    assert trace.exists()
