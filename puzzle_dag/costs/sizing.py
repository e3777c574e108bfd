"""The largest batch that we say fits, held against an engine that sizes its KV cache itself within a share of the memory.

`check_capacity` holds the arithmetic against caches whose bytes we gave. Here nothing is given but a share of the memory
(vLLM's `gpu_memory_utilization`; its CPU build means main memory): what weights and engine leave of it, the engine makes its cache.
"""

import json
from dataclasses import dataclass

from puzzle_dag.architecture import Architecture
from puzzle_dag.config import Target
from puzzle_dag.costs.fitting import count_fitting_batch
from puzzle_dag.costs.probes import serving_config
from puzzle_dag.costs.tabulate import Measurement
from puzzle_dag.costs.trace import measure_engine_bytes
from puzzle_dag.engine.client import run_engines
from puzzle_dag.engine.hardware import check_hardware, detect_hardware
from puzzle_dag.engine.jobs import EngineJob, EngineSettings, Workload
from puzzle_dag.engine.kv_cache import count_reported_batch
from puzzle_dag.model.configuration_puzzle_dag import PuzzleDagConfig
from puzzle_dag.progress import Progress, silent


class MemoryShareError(ValueError):
    """A share of the memory that is none, or of memory that is not known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SizingCheck:
    """One model in a share of the memory: what we say fits, beside what the engine made room for."""

    memory_bytes: int
    """What the engine might take, on one GPU."""
    engine_bytes: int
    """What another engine of the same model took beside weights and KV cache."""
    predicted_batch: int
    """Largest batch of the target's lengths by arithmetic, with `engine_bytes` set aside."""
    reported_tokens: int
    """Tokens that the engine reports its cache to hold."""
    reported_batch: int
    """Largest batch of the target's lengths by the engine's own word; each request takes whole blocks."""


def check_sizing(
    shape: PuzzleDagConfig, architecture: Architecture, target: Target, memory_share: float, *, progress: Progress = silent
) -> SizingCheck:
    """Start two engines with dummy weights, one whose KV cache is given and one that sizes its own, and compare the batch that fits.

    Args:
        shape: the parent's configuration.
        architecture: the model's blocks; attention somewhere, or there is no cache to compare.
        target: how it is served; lengths that are whole blocks of the cache compare exactly.
        memory_share: above 0 and up to 1; it must be free, and hold the weights and the engine itself (some 0.7 GB on a CPU).
        progress: called after each engine.

    Raises:
        MemoryShareError: the share is none, or this machine's memory is not known.
        HardwareMismatchError: the target is for other hardware.
        VllmMissingError: vLLM is not installed.
        EngineFailedError: an engine failed twice, for example since the share leaves no room for a cache.
    """
    hardware = detect_hardware()
    check_hardware(target, hardware)
    if not 0 < memory_share <= 1 or not hardware.memory_bytes:
        raise MemoryShareError(f"the memory share is {memory_share}, of {hardware.memory_bytes} bytes; give one above 0 and up to 1")
    config, settings = json.loads(json.dumps(serving_config(shape, architecture))), EngineSettings.of(target)
    workload = Workload.of(target)
    given = EngineJob(name="cache given", config=config, settings=settings, workload=workload)
    own = EngineJob(name="own cache", config=config, settings=settings, workload=workload, memory_share=memory_share)
    first, second = run_engines([given, own], progress=progress, hardware=hardware, process_each=target.process_per_probe)
    engine_bytes = measure_engine_bytes(shape, target, [Measurement(architecture, first)])
    assert engine_bytes is not None
    memory_bytes, length = int(hardware.memory_bytes * memory_share), target.input_length + target.output_length
    return SizingCheck(
        memory_bytes=memory_bytes,
        engine_bytes=engine_bytes,
        predicted_batch=count_fitting_batch(shape, architecture, target, memory_bytes, engine_bytes=max(0, engine_bytes)),
        reported_tokens=second.kv_capacity_tokens,
        reported_batch=count_reported_batch(second, length),
    )
