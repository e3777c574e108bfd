"""How much KV cache an engine is given, and how many tokens that holds by arithmetic, to be held against what the engine says."""

from collections.abc import Iterable
from fractions import Fraction
from typing import Any

from puzzle_dag.engine.jobs import EngineResult, EngineSettings, Workload

_BLOCK_TOKENS = 128
_SPARE_BLOCKS = 8
_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


def _count_kv_bytes_each(settings: EngineSettings) -> int:
    """Return the bytes of a number in the KV cache. Raises KeyError for a type that is not known."""
    name = settings.dtype if settings.kv_cache_dtype == "auto" else settings.kv_cache_dtype
    return 1 if name.startswith("fp8") else _BYTES[name]


def split_kv_heads(kv_heads: int, tensor_parallel_size: int) -> int:
    """Return the KV heads of one GPU: vLLM spreads them over the GPUs, and gives each one where there are fewer heads than GPUs."""
    return max(1, -(-kv_heads // tensor_parallel_size)) if kv_heads else 0


def _kv_heads_of_layers(config: dict[str, Any]) -> list[int]:
    """Return each layer's KV heads, 0 where it keeps no cache.

    Where some layers see all tokens and some a window, vLLM pads their caches to common pages, so each counts as the widest.
    """
    widest = int(config.get("num_key_value_heads") or config["num_attention_heads"])
    if len(set(config.get("layer_types") or ())) > 1:
        return [widest] * config["num_hidden_layers"]
    own, heads = config.get("per_layer_config") or {}, []
    for index in range(config["num_hidden_layers"]):
        layer = own.get(str(index)) or {}
        without = "attention" in (*(layer.get("skip") or ()), *(layer.get("replace_with_linear") or ()))
        heads.append(0 if without else int(layer.get("num_key_value_heads") or widest))
    return heads if any(heads) else [widest]


def size_kv_cache(config: dict[str, Any], workload: Workload, settings: EngineSettings) -> int:
    """Return bytes of KV cache, on one GPU, that hold the largest batch of a model.

    Args:
        config: as in config.json; a child's `per_layer_config` says each layer's KV heads.
        workload: what is served. One spare block a sequence and 8 more cover the engine's own reserve.
        settings: the cache's number type, and the GPUs that its heads are spread over.
    """
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    heads = sum(split_kv_heads(h, settings.tensor_parallel_size) for h in _kv_heads_of_layers(config))
    blocks = -(-(workload.input_length + workload.output_length) // _BLOCK_TOKENS) + 1
    num_tokens = (max(workload.batch_sizes) * blocks + _SPARE_BLOCKS) * _BLOCK_TOKENS
    return int(num_tokens * 2 * heads * head_dim * _count_kv_bytes_each(settings))


def count_capacity_tokens(num_blocks: int, group_block_tokens: Iterable[int], block_tokens: int) -> int:
    """Return the tokens that a KV cache holds, as the engine laid it out, where none has left a layer's window yet.

    Args:
        num_blocks: blocks of the whole pool.
        group_block_tokens: tokens of a block in each group of layers; each draws its blocks from the pool.
        block_tokens: what the result is rounded down to.
    """
    blocks_per_token = sum(Fraction(1, tokens) for tokens in group_block_tokens)
    return int(num_blocks / blocks_per_token) // block_tokens * block_tokens if blocks_per_token else 0


def predict_capacity_tokens(result: EngineResult, kv_bytes_per_token: int) -> int | None:
    """Return the tokens that an engine's KV cache should hold, by arithmetic; None where the measurement says too little.

    Args:
        result: what the engine reported.
        kv_bytes_per_token: bytes that a token takes on one GPU, by arithmetic.
    """
    if result.kv_cache_bytes is None or result.kv_block_tokens is None or not kv_bytes_per_token:
        return None
    return result.kv_cache_bytes // (result.kv_block_tokens * kv_bytes_per_token) * result.kv_block_tokens


def count_largest_batch(capacity_tokens: int, length: int, block_tokens: int) -> int:
    """Return how many sequences of `length` tokens a KV cache holds at once; each takes whole blocks."""
    return capacity_tokens // (-(-length // block_tokens) * block_tokens)


def count_reported_batch(result: EngineResult, length: int) -> int:
    """Return how many sequences of `length` tokens an engine's KV cache holds at once: by its own word, or by its tokens."""
    if result.kv_concurrency is not None:
        return int(result.kv_concurrency)
    return count_largest_batch(result.kv_capacity_tokens, length, result.kv_block_tokens or 1)
