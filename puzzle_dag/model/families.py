"""The families of parents: how a transformers configuration of each is read as ours, every trait explicit."""

from collections.abc import Callable
from typing import Any

from transformers import PretrainedConfig

from puzzle_dag.model.configuration_puzzle_dag import PuzzleDagConfig

# Traits that transformers hard-codes in the family's modeling file, and those it reads from the configuration.
_BIASES: dict[str, Callable[[Any], dict[str, bool]]] = {
    "llama": lambda c: {"qkv_bias": c.attention_bias, "o_bias": c.attention_bias, "mlp_bias": c.mlp_bias},
    "mistral": lambda c: {"qkv_bias": False, "o_bias": False, "mlp_bias": False},
    "qwen2": lambda c: {"qkv_bias": True, "o_bias": False, "mlp_bias": False},
    "qwen3": lambda c: {"qkv_bias": c.attention_bias, "o_bias": c.attention_bias, "mlp_bias": False},
}
FAMILIES = tuple(_BIASES)


class UnsupportedFamilyError(ValueError):
    """The parent is of a family, or has a trait, that no variant could be built for."""


def _layer_types(config: Any) -> list[str]:
    """Return which layers slide: Qwen lists them; a Mistral slides in all layers or in none."""
    explicit = getattr(config, "layer_types", None)
    if explicit is not None:
        return list(explicit)
    sliding = getattr(config, "sliding_window", None) is not None
    return ["sliding_attention" if sliding else "full_attention"] * config.num_hidden_layers


def to_puzzle_dag_config(config: PretrainedConfig) -> PuzzleDagConfig:
    """Return the parent's configuration as ours, with the parent's own block in every layer.

    Raises:
        UnsupportedFamilyError: the family is not one of FAMILIES, or it has a trait that is not supported (an
            activation other than SiLU, a layer type other than full or sliding attention).
    """
    family = config.model_type
    if family not in FAMILIES:
        raise UnsupportedFamilyError(f"model_type is {family!r}, which is not supported; use a parent of: {', '.join(FAMILIES)}")
    if config.hidden_act != "silu":
        raise UnsupportedFamilyError(f"hidden_act is {config.hidden_act!r}, which is not supported; use a parent with silu (SwiGLU)")
    layer_types = _layer_types(config)
    unknown = sorted(set(layer_types) - {"full_attention", "sliding_attention"})
    if unknown:
        raise UnsupportedFamilyError(f"layer type {unknown[0]!r} is not supported; use a parent with full or sliding attention")
    return PuzzleDagConfig(
        family=family,
        **_BIASES[family](config),
        qk_norm=family == "qwen3",
        layer_types=layer_types,
        sliding_window=config.sliding_window if "sliding_attention" in layer_types else None,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        hidden_act=config.hidden_act,
        max_position_embeddings=config.max_position_embeddings,
        initializer_range=config.initializer_range,
        rms_norm_eps=config.rms_norm_eps,
        rope_parameters=dict(config.rope_parameters),
        tie_word_embeddings=config.tie_word_embeddings,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        dtype=config.dtype,
    )
