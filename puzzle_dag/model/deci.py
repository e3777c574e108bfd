"""The Deci / Nemotron-NAS schema, `block_configs`, derived from `per_layer_config` for engines that know no other.

What stock vLLM's DeciLMForCausalLM can't compute is refused, layer by layer: linear maps, qk-norm, an FFN before any
attention has run (it starts the residual stream at the first attention), a model without attention.
"""

from typing import Any

from puzzle_dag.architecture import FFN, Attention
from puzzle_dag.model.checkpoint import architecture_of
from puzzle_dag.model.configuration_deci import DeciLMConfig
from puzzle_dag.model.configuration_puzzle_dag import PuzzleDagConfig

ARCHITECTURE = "DeciLMForCausalLM"
_FFN_MULT_STEP = 256
_COPIED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "rope_parameters",
    "mlp_bias",
    "qkv_bias",
    "tie_word_embeddings",
    "sliding_window",
    "layer_types",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


class NotDeciError(ValueError):
    """The child doesn't fit the Deci schema; the message names every layer that doesn't, and why."""


def find_misfits(config: PuzzleDagConfig, *, as_ffn_mult: bool = False) -> list[str]:
    """Return what stock DeciLM can't compute, one sentence each; empty where the child fits."""
    misfits: list[str] = []
    blocks = architecture_of(config)
    if config.qk_norm:
        misfits.append(f"every layer: qk-norm (family {config.family})")
    if all(block.attention.kind != "gqa" for block in blocks):
        misfits.append("no layer has attention")
    attention_ran = False
    for layer, block in enumerate(blocks):
        if block.attention.kind == "linear":
            misfits.append(f"layer {layer}: linear attention")
        if block.ffn.kind == "linear":
            misfits.append(f"layer {layer}: linear FFN")
        attention_ran |= block.attention.kind == "gqa"
        if block.ffn.kind == "swiglu" and not attention_ran:
            misfits.append(f"layer {layer}: an FFN before the first attention")
        width = block.ffn.intermediate_size
        if as_ffn_mult and width % _FFN_MULT_STEP:
            misfits.append(f"layer {layer}: intermediate_size {width} is no multiple of {_FFN_MULT_STEP}, to which ffn_mult is rounded up")
    return misfits


def round_ffn_mult(ffn_mult: float, hidden_size: int) -> int:
    """Return the FFN width that readers of `ffn_mult` make of it: two thirds of ffn_mult * hidden_size, rounded up to a multiple of 256."""
    return -(-int(2 * ffn_mult * hidden_size / 3) // _FFN_MULT_STEP) * _FFN_MULT_STEP


def find_ffn_mult(intermediate_size: int, hidden_size: int) -> float:
    """Return an ffn_mult that is read as `intermediate_size`, a multiple of 256; aimed half a channel low, so that no rounding lifts it."""
    return 3 * (intermediate_size - 0.5) / (2 * hidden_size)


def _attention_config(attention: Attention, num_heads: int) -> dict[str, Any]:
    group = None if attention.kind == "noop" else num_heads // attention.kv_heads
    return {"no_op": group is None, "replace_with_linear": False, "n_heads_in_group": group}


def _ffn_config(ffn: FFN, hidden_size: int, as_ffn_mult: bool) -> dict[str, Any]:
    width = None if ffn.kind == "noop" else ffn.intermediate_size
    # Never both keys: a reader of ffn_mult takes null for no FFN, so where it would be wrong it must be missing.
    size = {"ffn_mult": width and find_ffn_mult(width, hidden_size)} if as_ffn_mult else {"intermediate_size": width}
    return {"no_op": width is None, "replace_with_linear": False, **size}


def to_deci_config(config: PuzzleDagConfig, *, as_ffn_mult: bool = False) -> dict[str, Any]:
    """Return what config.json of the child says in the Deci schema, JSON types only.

    Args:
        config: the child's configuration.
        as_ffn_mult: give FFN widths as `ffn_mult`, which older readers know alone, instead of `intermediate_size`.

    Raises:
        NotDeciError: stock DeciLM can't compute the child.
    """
    if misfits := find_misfits(config, as_ffn_mult=as_ffn_mult):
        raise NotDeciError(f"stock vLLM's DeciLM has no such block: {'; '.join(misfits)}. Serve this child with our plugin instead")
    fields = config.to_dict()
    rope = dict(config.rope_parameters)
    blocks = [
        {
            "attention": _attention_config(block.attention, config.num_attention_heads),
            "ffn": _ffn_config(block.ffn, config.hidden_size, as_ffn_mult),
        }
        for block in architecture_of(config)
    ]
    return {
        **{name: fields[name] for name in _COPIED},
        "architectures": [ARCHITECTURE],
        "auto_map": {"AutoConfig": f"{DeciLMConfig.__module__.rpartition('.')[2]}.{DeciLMConfig.__name__}"},
        "model_type": DeciLMConfig.model_type,
        "dtype": fields["dtype"],
        "block_configs": blocks,
        # Each block has its own; engines that ask for one number would take any value given here for all layers.
        "num_key_value_heads": None,
        "attention_bias": config.o_bias,
        # Readers of transformers 4 know these two, not rope_parameters.
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None if rope.get("rope_type", "default") == "default" else rope,
    }
