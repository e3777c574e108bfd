"""Does it fit? What is checked before an engine is started: that a target's variants split over its GPUs, and fit their memory."""

from collections.abc import Iterable
from dataclasses import dataclass

from puzzle_dag.architecture import FFN, Architecture, Attention
from puzzle_dag.config import Target
from puzzle_dag.costs.memory import NumberTypes, count_kv_bytes_per_token, count_weight_bytes, size_model
from puzzle_dag.costs.tabulate import Measurement
from puzzle_dag.engine.hardware import Hardware
from puzzle_dag.engine.kv_cache import count_largest_batch, count_reported_batch, predict_capacity_tokens
from puzzle_dag.model.configuration_puzzle_dag import PuzzleDagConfig


class TensorParallelError(ValueError):
    """A variant that vLLM can't spread over a target's GPUs."""


class BatchTooLargeError(ValueError):
    """A target's largest batch that the hardware's memory can't hold."""


def check_tensor_parallel(shape: PuzzleDagConfig, target: Target, attentions: Iterable[Attention], ffns: Iterable[FFN]) -> None:
    """Check that vLLM can spread every variant over a target's GPUs: heads and channels split evenly, or KV heads repeat evenly.

    Raises:
        TensorParallelError: names the variant and what would fit.
    """
    size = target.tensor_parallel_size
    if size == 1:
        return
    where = f"target {target.name!r}: field `tensor_parallel_size` is {size}"
    if shape.num_attention_heads % size:
        raise TensorParallelError(f"{where}, which doesn't divide the parent's {shape.num_attention_heads} attention heads; use a divisor")
    for attention in attentions:
        if attention.kind == "gqa" and attention.kv_heads % size and size % attention.kv_heads:
            raise TensorParallelError(
                f"{where}: attention {attention.name} has {attention.kv_heads} KV heads, which {size} GPUs neither share nor repeat; "
                "take it out of the search space, or use a size that divides them or is a multiple of them"
            )
        if attention.kind == "linear" and shape.hidden_size % size:
            raise TensorParallelError(f"{where}, which doesn't divide the hidden size {shape.hidden_size} that linear attention splits")
    for ffn in ffns:
        width = shape.hidden_size if ffn.kind == "linear" else ffn.intermediate_size
        if width % size:
            fix = "raise `width_multiple` to a multiple of the size, or use a size that divides it"
            raise TensorParallelError(f"{where}: FFN {ffn.name} splits {width} channels, which don't divide evenly; {fix}")


def count_fitting_batch(
    shape: PuzzleDagConfig, architecture: Architecture, target: Target, memory_bytes: int, *, engine_bytes: int = 0
) -> int:
    """Return the largest batch of a target's lengths whose weights and KV cache fit into one GPU's memory, 0 where not one does.

    A model without any attention keeps no cache, so every batch fits; then the target's largest is returned.

    Args:
        shape: the parent's configuration.
        architecture: the model's blocks.
        target: lengths, number types and tensor-parallel size.
        memory_bytes: what the engine may take.
        engine_bytes: what of it the engine itself takes, as it was measured (`Provenance.engine_bytes`); 0 before that.
    """
    size = size_model(shape, architecture, target.tensor_parallel_size)
    types = NumberTypes.of(target)
    left = memory_bytes - engine_bytes - count_weight_bytes(size, types)
    each = count_kv_bytes_per_token(size, types) * (target.input_length + target.output_length)
    if left < 0:
        return 0
    return left // each if each else max(target.batch_sizes)


def check_memory(
    shape: PuzzleDagConfig, architectures: Iterable[Architecture], target: Target, hardware: Hardware, *, engine_bytes: int = 0
) -> None:
    """Check that each model's weights and the KV cache of the target's largest batch fit into what the engine leaves of the memory.

    Raises:
        BatchTooLargeError: names the target, what is needed and there, and the largest batch that would fit.
    """
    if not hardware.memory_bytes:
        return
    batch = max(target.batch_sizes)
    taken = f", of which the engine itself takes {engine_bytes / 2**30:.1f}" if engine_bytes else ""
    for architecture in architectures:
        fitting = count_fitting_batch(shape, architecture, target, hardware.memory_bytes, engine_bytes=engine_bytes)
        if fitting >= batch:
            continue
        length, there = target.input_length + target.output_length, hardware.memory_bytes / 2**30
        if fitting:
            fix = f"at most {fitting} fit beside the weights: lower `batch_sizes` or the lengths, or raise `tensor_parallel_size`"
        else:
            fix = "its weights alone, or not one request more, don't fit: raise `tensor_parallel_size`, or quantise"
        raise BatchTooLargeError(
            f"target {target.name!r}: field `batch_sizes`: {batch} requests of {length} tokens to a model of {len(architecture)} layers "
            f"don't fit into the {there:.1f} GiB of {hardware.name}{taken}; {fix}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class CapacityCheck:
    """One model's KV cache: what the arithmetic says it holds, beside what the engine says."""

    num_layers: int
    """Layers of the model."""
    kv_bytes_per_token: int
    """Bytes that a token takes on one GPU, by arithmetic."""
    engine_kv_bytes_per_token: int
    """The same as the engine's own cache layout has it."""
    kv_cache_bytes: int
    """Bytes that the cache was given."""
    predicted_tokens: int
    """Tokens that it should hold."""
    reported_tokens: int
    """Tokens that the engine reports."""
    predicted_batch: int
    """Largest batch of the target's lengths, from the prediction."""
    reported_batch: int
    """Largest batch by the engine's own word. vLLM reserves a block more a request where layers see a window."""

    @property
    def agrees(self) -> bool:
        """Whether arithmetic and engine say the same."""
        return (self.kv_bytes_per_token, self.predicted_tokens) == (self.engine_kv_bytes_per_token, self.reported_tokens)


def check_capacity(shape: PuzzleDagConfig, target: Target, measured: Iterable[Measurement]) -> tuple[CapacityCheck, ...]:
    """Hold the arithmetic of memory against what engines reported of their KV caches, one entry a model that keeps a cache.

    Measurements of former versions of this package, which didn't keep the cache's size, are left out.
    """
    length, types, found = target.input_length + target.output_length, NumberTypes.of(target), {}
    for measurement in measured:
        size, result = size_model(shape, measurement.architecture, target.tensor_parallel_size), measurement.result
        each = count_kv_bytes_per_token(size, types)
        predicted = predict_capacity_tokens(result, each)
        if predicted is None or measurement.architecture in found:
            continue
        assert result.kv_block_tokens is not None and result.kv_cache_bytes is not None
        found[measurement.architecture] = CapacityCheck(
            num_layers=len(measurement.architecture),
            kv_bytes_per_token=each,
            engine_kv_bytes_per_token=result.kv_bytes_per_token // target.tensor_parallel_size,
            kv_cache_bytes=result.kv_cache_bytes,
            predicted_tokens=predicted,
            reported_tokens=result.kv_capacity_tokens,
            predicted_batch=count_largest_batch(predicted, length, result.kv_block_tokens),
            reported_batch=count_reported_batch(result, length),
        )
    return tuple(found.values())
