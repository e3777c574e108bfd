"""Trace measurements to where they come from: the machine, the engine, the dates, and what the engine itself took of the memory."""

from collections.abc import Iterable
from dataclasses import asdict

from puzzle_dag.config import Target
from puzzle_dag.costs.fitting import CapacityCheck
from puzzle_dag.costs.memory import NumberTypes, count_weight_bytes, size_model
from puzzle_dag.costs.provenance import Provenance, describe_shape, digest_shape
from puzzle_dag.costs.tabulate import Measurement
from puzzle_dag.model.configuration_puzzle_dag import PuzzleDagConfig


def measure_engine_bytes(shape: PuzzleDagConfig, target: Target, measured: Iterable[Measurement]) -> int | None:
    """Return the median of what engines took beside weights and KV cache; None where the cache's size was not kept."""
    found, types = [], NumberTypes.of(target)
    for measurement in measured:
        result = measurement.result
        if result.kv_cache_bytes is None:
            continue
        weights = count_weight_bytes(size_model(shape, measurement.architecture, target.tensor_parallel_size), types)
        found.append((result.device_bytes or result.peak_rss_bytes) - weights - result.kv_cache_bytes)
    return sorted(found)[len(found) // 2] if found else None


def trace_provenance(shape: PuzzleDagConfig, target: Target, measured: list[Measurement], capacity: Iterable[CapacityCheck]) -> Provenance:
    """Return where a target's measurements come from."""
    first, times = measured[0].result, sorted(m.result.measured_at for m in measured if m.result.measured_at is not None)
    packages = sorted({m.result.package for m in measured if m.result.package is not None})
    return Provenance(
        shape_digest=digest_shape(shape),
        shape=describe_shape(shape),
        hardware=first.hardware,
        driver=first.driver,
        engine_version=first.engine_version,
        package=", ".join(packages) or None,
        first_measured_at=times[0] if len(times) == len(measured) else None,
        last_measured_at=times[-1] if times else None,
        num_probes=len({m.architecture for m in measured}),
        num_engines=len(measured),
        engine_bytes=measure_engine_bytes(shape, target, measured),
        engine_peak_bytes=max(m.result.peak_rss_bytes for m in measured),
        capacity=tuple(asdict(c) for c in capacity),
    )
