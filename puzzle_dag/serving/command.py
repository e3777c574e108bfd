"""The command that serves a child as its target's costs were measured, for people to type."""

import shlex
from pathlib import Path

from puzzle_dag.config import Target
from puzzle_dag.engine.int8 import INT8, quantization_argument

_CPU_CACHE = "1G"
"""KV cache on a CPU: by default vLLM claims 92 % of the machine's memory there, and doesn't start where less is free."""


def typed_command(folder: Path | str, target: Target) -> str:
    """Return `vllm serve` with the flags of a target's mode and precision; lengths, batch and port are the user's to choose.

    vLLM reads int8 W8A8 off the checkpoint, so for such a target the command that writes it goes before.

    Args:
        folder: the child's checkpoint, as its assets left it.
        target: what its costs were measured for.
    """
    is_int8, served = target.quantization == INT8, f"{folder}-int8" if target.quantization == INT8 else str(folder)
    options = {
        "--host": "127.0.0.1",
        "--dtype": target.dtype,
        "--quantization": quantization_argument(target.quantization),
        "--kv-cache-dtype": target.kv_cache_dtype if target.kv_cache_dtype != "auto" else None,
        "--tensor-parallel-size": str(target.tensor_parallel_size) if target.tensor_parallel_size > 1 else None,
        "--kv-cache-memory-bytes": _CPU_CACHE if target.hardware == "local-cpu" else None,
    }
    flags = [word for name, value in options.items() if value is not None for word in (name, value)]
    command = shlex.join(["vllm", "serve", served, *flags, *(["--enforce-eager"] if target.mode == "eager" else [])])
    return f"{shlex.join(['puzzle-dag', 'quantize', str(folder), served])} && {command}" if is_int8 else command
