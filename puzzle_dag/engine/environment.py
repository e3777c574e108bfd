"""The environment of every process that runs vLLM for us, whether it is measured, served or benchmarked over HTTP."""

import os

from puzzle_dag.engine.hardware import Hardware

KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(16 * 2**30)}
"""Makes glibc's allocator keep what is freed. By default it gives large blocks back to the system, and each page of the next one
costs a fault. A model whose layers are all alike asks for the same sizes again and is spared most of that; a heterogeneous child is
not, in one engine more than in another: a prefill of 3,840 tokens then takes up to 1.4 times as long (`python -m
benchmarks.allocator`), and costs don't add up. vLLM's own advice for CPUs, another allocator by LD_PRELOAD, does the same."""


def engine_environment(hardware: Hardware) -> dict[str, str]:
    """Return the environment of a process that runs vLLM; what the user's own environment sets goes first.

    Threads are as many as the cores and not bound to them ("nobind"): vLLM's "auto" gives one core of each engine away
    to a scheduler process, half of a two-core machine, and binding suffers where something else shares the cores.
    At the end of a parallel region OpenMP's threads spin for some 16 ms by default; beside a busy neighbour engines then
    take minutes where they need seconds, so they spin for some 50 us.
    """
    environment = {**os.environ, "VLLM_NO_USAGE_STATS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    # Gigabytes that would take the place of the cache that we size, or that an engine sizes itself.
    environment.pop("VLLM_CPU_KVCACHE_SPACE", None)
    environment.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    environment.setdefault("GOMP_SPINCOUNT", "1000")
    if hardware.kind == "cpu":
        environment = KEEP_MEMORY | environment
        environment["OMP_NUM_THREADS"] = str(hardware.num_threads)
    return environment
