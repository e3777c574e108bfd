"""What a running engine is asked: the bytes of its KV cache and of its GPU, and whether a quantisation reached its linear maps.

The functions that take a worker run inside the engine's own processes.
"""

import resource
from typing import Any

from puzzle_dag.engine.jobs import EngineSettings


class NotQuantizedError(ValueError):
    """The engine took the name of a quantisation and did nothing to the model's linear maps."""


def count_kv_bytes_per_token(worker: Any) -> float:
    """Return the bytes a token takes in one of the engine's workers; runs there, since a reply of vLLM's own types never arrives."""
    return float(sum(spec.page_size_bytes / spec.block_size for spec in worker.get_kv_cache_spec().values()))


def list_group_block_tokens(worker: Any) -> list[int]:
    """Return the tokens of a block in each group of layers of a worker's KV cache; runs there.

    Layers that see the same tokens are one group. Where some see all and some a window, vLLM makes several, whose blocks are as
    many bytes and come out of one pool: a token then takes a share of a block in each.
    """
    return [int(group.kv_cache_spec.block_size) for group in worker.model_runner.kv_cache_config.kv_cache_groups]


def _list_unquantized(worker: Any) -> list[str]:
    """Return the linear maps of an engine's worker that run unquantised; runs there."""
    from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod

    model = worker.model_runner.model
    return [n for n, m in model.named_modules() if isinstance(m, LinearBase) and isinstance(m.quant_method, UnquantizedLinearMethod)]


def check_precision(llm: Any, settings: EngineSettings) -> None:
    """Check that a quantisation that was asked for reached every linear map: vLLM skips what a method doesn't know, silently.

    Raises:
        NotQuantizedError: it did not; names one of the maps.
    """
    if settings.quantization is None:
        return
    plain = sorted({name for names in llm.collective_rpc(_list_unquantized) for name in names})
    if plain:
        raise NotQuantizedError(
            f"quantization is {settings.quantization!r}, and vLLM started, but left {len(plain)} linear maps as they were, "
            f"{plain[0]} for one: what would be measured is {settings.dtype}"
        )


def read_peak_rss_bytes(worker: Any) -> float:
    """Return the largest resident memory that a worker's process has had; runs there.

    From outside it can't be told: an engine's own workers are our children's children, and are not waited for.
    """
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def read_device_bytes(worker: Any) -> float:
    """Return the bytes in use on a worker's GPU, 0 where there is none; runs there."""
    import torch

    if not torch.cuda.is_available():
        return 0.0
    free, total = torch.cuda.mem_get_info()
    return float(total - free)
