"""What a variant weighs, exactly, by arithmetic: parameters, bytes of weights, bytes of KV cache a token.

The same formulas describe the modules of `puzzle_dag.model.modeling_puzzle_dag`; a test holds them together. With a
tensor-parallel size above 1 they give one GPU's share, as vLLM spreads the model's Llama: matrices are split, norms and the
biases of what is summed up are on every GPU, and so is each KV head where there are fewer heads than GPUs.
"""

from dataclasses import dataclass
from typing import Literal

from puzzle_dag.architecture import FFN, Architecture, Attention
from puzzle_dag.config import Target
from puzzle_dag.engine.int8 import INT8
from puzzle_dag.engine.kv_cache import split_kv_heads
from puzzle_dag.model.configuration_puzzle_dag import PuzzleDagConfig

_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "fp8": 1, "fp8_e4m3": 1, "fp8_e5m2": 1}
_QUANTIZED_BYTES = {"fp8": 1, "fp8_per_block": 1, "fp8_per_channel": 1, "fp8_per_tensor": 1, INT8: 1}
Scales = Literal["none", "matrix", "row", "block"]
"""What has a scale of its own in a quantised matrix; vLLM's `quantization/online/fp8.py` and `compressed_tensors_w8a8_int8.py`."""
_SCALES: dict[str, Scales] = {"fp8": "matrix", "fp8_per_tensor": "matrix", "fp8_per_channel": "row", "fp8_per_block": "block", INT8: "row"}
_SCALE_BYTES = 4
_SCALE_BLOCK = 128


class UnknownDtypeError(ValueError):
    """The bytes of a number type or of a quantisation are not known."""


@dataclass(frozen=True, slots=True)
class Size:
    """What a piece of a model weighs."""

    matrices: tuple[tuple[int, int], ...] = ()
    """Rows (outputs) and columns (inputs) of the linear maps' matrices as the engine holds them, fused ones as one; a quantisation
    shrinks these."""
    other_parameters: int = 0
    """Numbers in embeddings, norms, biases and the head, which it leaves alone."""
    kv_values_per_token: int = 0
    """Keys and values that a token leaves in the cache."""

    @property
    def matrix_parameters(self) -> int:
        """Numbers in the matrices."""
        return sum(rows * columns for rows, columns in self.matrices)

    @property
    def parameters(self) -> int:
        """All parameters."""
        return self.matrix_parameters + self.other_parameters

    def __add__(self, other: "Size") -> "Size":
        return Size(
            self.matrices + other.matrices,
            self.other_parameters + other.other_parameters,
            self.kv_values_per_token + other.kv_values_per_token,
        )


@dataclass(frozen=True, slots=True)
class NumberTypes:
    """Bytes of a number in the weights, in quantised matrices and in the KV cache, and what of a quantised matrix has a scale."""

    weight: int = 2
    matrix: int = 2
    kv: int = 2
    scales: Scales = "none"

    @staticmethod
    def of(target: Target) -> "NumberTypes":
        """Return the number types that a target serves with.

        Raises:
            UnknownDtypeError: the target's `quantization` or `kv_cache_dtype` is none whose bytes are known here.
        """
        weight = _BYTES[target.dtype]
        matrix = weight if target.quantization is None else _look_up(_QUANTIZED_BYTES, target, "quantization", target.quantization)
        kv = weight if target.kv_cache_dtype == "auto" else _look_up(_BYTES, target, "kv_cache_dtype", target.kv_cache_dtype)
        return NumberTypes(weight, matrix, kv, "none" if target.quantization is None else _SCALES[target.quantization])

    def count_scales(self, rows: int, columns: int) -> int:
        """Return the scales of a matrix, float32 numbers that the engine keeps beside it."""
        blocks = -(-rows // _SCALE_BLOCK) * -(-columns // _SCALE_BLOCK)
        return {"none": 0, "matrix": 1, "row": rows, "block": blocks}[self.scales]


def _look_up(known: dict[str, int], target: Target, field: str, name: str) -> int:
    if name not in known:
        use = ", ".join(known)
        raise UnknownDtypeError(f"target {target.name!r}: field `{field}`: the bytes of {name!r} are not known; use one of {use}")
    return known[name]


def size_attention(shape: PuzzleDagConfig, variant: Attention, tensor_parallel_size: int = 1) -> Size:
    """Return what an attention variant weighs on one GPU, its norm included."""
    if variant.kind == "noop":
        return Size()
    hidden, head_dim = shape.hidden_size, shape.head_dim
    if variant.kind == "linear":
        return Size(((hidden // tensor_parallel_size, hidden),), hidden)
    q_size = shape.num_attention_heads * head_dim // tensor_parallel_size
    kv_size = split_kv_heads(variant.kv_heads, tensor_parallel_size) * head_dim
    biases = (q_size + 2 * kv_size) * shape.qkv_bias + hidden * shape.o_bias
    matrices = (q_size + 2 * kv_size, hidden), (hidden, q_size)
    return Size(matrices, hidden + biases + 2 * head_dim * shape.qk_norm, 2 * kv_size)


def size_ffn(shape: PuzzleDagConfig, variant: FFN, tensor_parallel_size: int = 1) -> Size:
    """Return what an FFN variant weighs on one GPU, its norm included."""
    if variant.kind == "noop":
        return Size()
    hidden, width = shape.hidden_size, variant.intermediate_size // tensor_parallel_size
    if variant.kind == "linear":
        return Size(((hidden // tensor_parallel_size, hidden),), hidden)
    return Size(((2 * width, hidden), (hidden, width)), hidden + (2 * width + hidden) * shape.mlp_bias)


def size_constant(shape: PuzzleDagConfig, tensor_parallel_size: int = 1) -> Size:
    """Return what a model weighs on one GPU beside its layers: embedding, final norm, and the head where it is not tied."""
    num_tables = 1 if shape.tie_word_embeddings else 2
    rows = -(-shape.vocab_size // tensor_parallel_size)
    return Size((), rows * shape.hidden_size * num_tables + shape.hidden_size)


def size_model(shape: PuzzleDagConfig, architecture: Architecture, tensor_parallel_size: int = 1) -> Size:
    """Return what a model of `architecture` weighs on one GPU."""
    total = size_constant(shape, tensor_parallel_size)
    for block in architecture:
        total = total + size_attention(shape, block.attention, tensor_parallel_size) + size_ffn(shape, block.ffn, tensor_parallel_size)
    return total


def size_variant(shape: PuzzleDagConfig, place: Literal["attention", "ffn", "constant"], name: str, tensor_parallel_size: int = 1) -> Size:
    """Return what a variant weighs on one GPU, by its name (of the constant, any). Raises ValueError for a name that is not understood."""
    if place == "constant":
        return size_constant(shape, tensor_parallel_size)
    if place == "attention":
        return size_attention(shape, Attention.parse(name), tensor_parallel_size)
    return size_ffn(shape, FFN.parse(name), tensor_parallel_size)


def count_weight_bytes(size: Size, types: NumberTypes) -> int:
    """Return the bytes of the weights, the scales of quantised ones included."""
    num_scales = sum(types.count_scales(rows, columns) for rows, columns in size.matrices)
    return size.matrix_parameters * types.matrix + size.other_parameters * types.weight + num_scales * _SCALE_BYTES


def count_kv_bytes_per_token(size: Size, types: NumberTypes) -> int:
    """Return the bytes of KV cache that a token takes: 2 * KV heads * head_dim * bytes, over the layers with attention."""
    return size.kv_values_per_token * types.kv


def weight_bytes(shape: PuzzleDagConfig, architecture: Architecture, types: NumberTypes | None = None) -> int:
    """Return the bytes of a model's weights (bf16 by default)."""
    return count_weight_bytes(size_model(shape, architecture), types or NumberTypes())


def kv_bytes_per_token(shape: PuzzleDagConfig, architecture: Architecture, types: NumberTypes | None = None) -> int:
    """Return the bytes of KV cache that a token takes in a model (bf16 by default)."""
    return count_kv_bytes_per_token(size_model(shape, architecture), types or NumberTypes())
