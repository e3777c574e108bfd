"""Bytes by arithmetic, against the parameters that the model really has and the caches that it really keeps."""

import pytest
import torch
from transformers import AutoConfig, DynamicCache

from puzzle_dag.architecture import FFN, Attention, Block
from puzzle_dag.config import Target
from puzzle_dag.costs.memory import (
    NumberTypes,
    UnknownDtypeError,
    count_weight_bytes,
    kv_bytes_per_token,
    size_constant,
    size_model,
    size_variant,
    weight_bytes,
)
from puzzle_dag.model.checkpoint import child_config
from puzzle_dag.model.families import to_puzzle_dag_config
from puzzle_dag.model.modeling_puzzle_dag import PuzzleDagForCausalLM

ATTENTIONS = ("kv4", "kv2", "kv1", "linear", "noop")
FFNS = ("w128", "w96", "w32", "linear", "noop")


def make_target(**changes) -> Target:
    fields = {"version": 1, "name": "t", "hardware": "local-cpu", "input_length": 8, "output_length": 4, "batch_sizes": (1, 2)}
    return Target(**{**fields, **changes})


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("index", range(5))
def test_parameters_are_those_of_the_model(family_parent_folder, family, index):
    shape = to_puzzle_dag_config(AutoConfig.from_pretrained(family_parent_folder[family]))
    architecture = (Block(Attention.parse(ATTENTIONS[index]), FFN.parse(FFNS[index])), Block.parse(f"kv{shape.num_key_value_heads}/w64"))
    with torch.device("meta"):
        model = PuzzleDagForCausalLM(child_config(shape, architecture))
    assert size_model(shape, architecture).parameters == sum(p.numel() for p in model.parameters())
    assert weight_bytes(shape, architecture, NumberTypes(weight=4, matrix=4)) == sum(p.numel() * 4 for p in model.parameters())
    assert size_model(shape, architecture).parameters == size_constant(shape).parameters + sum(
        size_variant(shape, place, name).parameters
        for block in architecture
        for place, name in (("attention", block.attention.name), ("ffn", block.ffn.name))
    )


def test_kv_bytes_are_those_of_the_cache(micro_parent_folder):
    shape = to_puzzle_dag_config(AutoConfig.from_pretrained(micro_parent_folder))
    architecture = (Block.parse("kv2/w128"), Block.parse("kv1/linear"))
    model = PuzzleDagForCausalLM(child_config(shape, architecture)).eval()
    cache = DynamicCache()
    model(torch.arange(7)[None], past_key_values=cache, use_cache=True)
    kept = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    assert kv_bytes_per_token(shape, architecture, NumberTypes(kv=4)) * 7 == kept * 4
    assert kv_bytes_per_token(shape, (Block.parse("linear/w128"), Block.parse("noop/noop"))) == 0


def test_number_types_of_a_target():
    assert NumberTypes.of(make_target()) == NumberTypes(2, 2, 2)
    assert NumberTypes.of(make_target(dtype="float32")) == NumberTypes(4, 4, 4)
    assert NumberTypes.of(make_target(kv_cache_dtype="fp8")) == NumberTypes(2, 2, 1)
    assert NumberTypes.of(make_target(quantization="fp8")) == NumberTypes(2, 1, 2, "matrix")


@pytest.mark.parametrize(("field", "value"), [("quantization", "awq-ish"), ("kv_cache_dtype", "int3")])
def test_unknown_number_types_are_refused(field, value):
    with pytest.raises(UnknownDtypeError, match=f"{field}.*{value}.*fp8"):
        NumberTypes.of(make_target(**{field: value}))


def test_quantisation_shrinks_matrices_only(micro_parent_folder):
    shape = to_puzzle_dag_config(AutoConfig.from_pretrained(micro_parent_folder))
    types = NumberTypes.of(make_target(quantization="fp8"))
    assert count_weight_bytes(size_constant(shape), types) == 2 * size_constant(shape).parameters
    size = size_variant(shape, "ffn", "w128")
    assert count_weight_bytes(size, types) == 3 * 64 * 128 + 2 * 64 + 2 * 4


@pytest.mark.parametrize(
    ("quantization", "attention_scales", "ffn_scales"),
    [
        ("fp8_per_tensor", 2, 2),  # the fused query, key and value, and the output; gate with up, and down
        ("fp8_per_channel", (4 + 2 * 2) * 32 + 64, 2 * 160 + 64),
        ("w8a8_int8", (4 + 2 * 2) * 32 + 64, 2 * 160 + 64),
        ("fp8_per_block", 2 * 1 + 1 * 1, 3 * 1 + 1 * 2),  # 256 x 64 and 64 x 128; 320 x 64 and 64 x 160
    ],
)
def test_scales_are_counted(micro_parent_folder, quantization, attention_scales, ffn_scales):
    shape = to_puzzle_dag_config(AutoConfig.from_pretrained(micro_parent_folder))
    types, plain = NumberTypes.of(make_target(quantization=quantization)), NumberTypes(2, 1, 2)
    for place, name, num_scales in (("attention", "kv2", attention_scales), ("ffn", "w160", ffn_scales)):
        size = size_variant(shape, place, name)
        assert count_weight_bytes(size, types) == count_weight_bytes(size, plain) + 4 * num_scales
    # On two GPUs a split output has half of the rows and with them of the scales, a summed one all of both.
    if quantization == "w8a8_int8":
        share = size_variant(shape, "ffn", "w160", 2)
        assert count_weight_bytes(share, types) == count_weight_bytes(share, plain) + 4 * (160 + 64)
