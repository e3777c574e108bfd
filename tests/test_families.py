"""Each family's traits are read off transformers' own configuration and written out explicitly."""

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import FAMILY_NAMES
from transformers import GPT2Config, LlamaConfig, MistralConfig, MixtralConfig, Qwen2Config, Qwen3Config

from puzzle_dag.model.configuration_puzzle_dag import PuzzleDagConfig
from puzzle_dag.model.families import FAMILIES, UnsupportedFamilyError, to_puzzle_dag_config

_SHAPE: dict[str, Any] = {"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}


def test_the_tested_families_are_the_supported_ones() -> None:
    assert set(FAMILY_NAMES) == set(FAMILIES)


@pytest.mark.parametrize(
    ("config", "traits"),
    [
        (LlamaConfig(**_SHAPE), {"qkv_bias": False, "o_bias": False, "mlp_bias": False, "qk_norm": False, "sliding_window": None}),
        (LlamaConfig(**_SHAPE, attention_bias=True, mlp_bias=True), {"qkv_bias": True, "o_bias": True, "mlp_bias": True}),
        (LlamaConfig(**_SHAPE, head_dim=64, rms_norm_eps=3e-6), {"head_dim": 64, "rms_norm_eps": 3e-6}),
        (MistralConfig(**_SHAPE, sliding_window=16), {"sliding_window": 16, "layer_types": ["sliding_attention"] * 3, "head_dim": 32}),
        (MistralConfig(**_SHAPE, sliding_window=None), {"sliding_window": None, "layer_types": ["full_attention"] * 3}),
        (Qwen2Config(**_SHAPE), {"qkv_bias": True, "o_bias": False, "head_dim": 32, "sliding_window": None}),
        (
            Qwen2Config(**_SHAPE, use_sliding_window=True, sliding_window=16, max_window_layers=2),
            {"sliding_window": 16, "layer_types": ["full_attention", "full_attention", "sliding_attention"]},
        ),
        (Qwen3Config(**_SHAPE), {"qk_norm": True, "qkv_bias": False, "o_bias": False, "head_dim": 128}),
        (Qwen3Config(**_SHAPE, attention_bias=True, tie_word_embeddings=True), {"o_bias": True, "tie_word_embeddings": True}),
    ],
)
def test_traits(config: Any, traits: dict[str, Any]) -> None:
    ours = to_puzzle_dag_config(config)
    assert {name: getattr(ours, name) for name in traits} == traits
    assert ours.family == config.model_type


def test_scaled_rope_is_carried_over() -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    assert to_puzzle_dag_config(LlamaConfig(**_SHAPE, rope_parameters=rope)).rope_parameters == rope


@pytest.mark.parametrize("config", [GPT2Config(), MixtralConfig(**_SHAPE)])
def test_another_family_is_refused_and_the_supported_ones_are_listed(config: Any) -> None:
    with pytest.raises(UnsupportedFamilyError, match=f"{config.model_type}.*llama, mistral, qwen2, qwen3"):
        to_puzzle_dag_config(config)


def test_a_trait_that_no_variant_has_is_refused() -> None:
    with pytest.raises(UnsupportedFamilyError, match=r"hidden_act is 'gelu'.*silu"):
        to_puzzle_dag_config(LlamaConfig(**_SHAPE, hidden_act="gelu"))
    with pytest.raises(UnsupportedFamilyError, match="chunked_attention"):
        to_puzzle_dag_config(Qwen3Config(**_SHAPE, layer_types=["full_attention", "chunked_attention", "full_attention"]))


def _mixed() -> PuzzleDagConfig:
    overrides = {0: {"num_key_value_heads": 1}, 1: {"skip": ["attention"], "replace_with_linear": ["mlp"]}, 2: {"intermediate_size": 96}}
    return PuzzleDagConfig(**_SHAPE, head_dim=32, intermediate_size=256, per_layer_config=overrides)


@pytest.mark.parametrize(
    "carry",
    [
        copy.deepcopy,
        lambda c: pickle.loads(pickle.dumps(c)),
        lambda c: PuzzleDagConfig(**{k: v for k, v in json.loads(c.to_json_string()).items() if k != "model_type"}),
    ],
    ids=["deepcopy", "pickle", "json"],
)
def test_a_config_survives_being_carried(carry: Callable[[PuzzleDagConfig], PuzzleDagConfig]) -> None:
    carried = carry(_mixed())
    assert carried.to_dict() == _mixed().to_dict()
    assert [layer.num_key_value_heads for layer in carried.per_layer_config] == [1, 2, 2]
    assert carried.per_layer_config[1].skip == ["attention"]
    assert carried.per_layer_config[1].replace_with_linear == ["mlp"]
    assert [layer.intermediate_size for layer in carried.per_layer_config] == [256, 256, 96]


def test_what_decides_the_computation_is_written_even_where_it_is_the_default(tmp_path: Path) -> None:
    PuzzleDagConfig().save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    needed = "family qkv_bias o_bias mlp_bias qk_norm sliding_window layer_types head_dim rope_parameters rms_norm_eps hidden_act"
    needed += " num_attention_heads num_key_value_heads intermediate_size tie_word_embeddings max_position_embeddings replace_with_linear"
    assert set(needed.split()) <= set(written)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({0: {"num_key_value_heads": 3}}, "layer 0: num_key_value_heads is 3.*divisor of num_attention_heads, 4"),
        ({1: {"skip": ["ffn"]}}, "layer 1: place 'ffn'.*attention or mlp"),
        ({2: {"skip": ["mlp"], "replace_with_linear": ["mlp"]}}, "layer 2: mlp is in both"),
        ({2: {"intermediate_size": 0}}, r"layer 2: intermediate_size is 0.*skip: \[mlp\]"),
        ({3: {"intermediate_size": 64}}, r"range \[0, 3\)"),
        ({0: {"replace_by_linear": ["mlp"]}}, "replace_by_linear"),
    ],
)
def test_a_layer_that_cannot_be_built_is_refused(overrides: dict[int, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PuzzleDagConfig(**_SHAPE, head_dim=32, intermediate_size=256, per_layer_config=overrides)
