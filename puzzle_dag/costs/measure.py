"""Measure a target: run the probes that the store does not hold yet, fit every variant's cost, return the table."""

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from puzzle_dag.architecture import FFN, Architecture, Attention, Block
from puzzle_dag.config import Target
from puzzle_dag.costs.agreement import check_installed
from puzzle_dag.costs.fitting import check_capacity, check_memory, check_tensor_parallel
from puzzle_dag.costs.imports import find_imported
from puzzle_dag.costs.memory import NumberTypes
from puzzle_dag.costs.probes import Probe, plan_probes, serving_config
from puzzle_dag.costs.table import CostTable
from puzzle_dag.costs.tabulate import Measurement, fit_table
from puzzle_dag.costs.trace import measure_engine_bytes, trace_provenance
from puzzle_dag.engine.client import read_engine_version, run_engines
from puzzle_dag.engine.hardware import Hardware, HardwareMismatchError, check_hardware, detect_hardware
from puzzle_dag.engine.jobs import EngineJob, EngineResult, EngineSettings, Workload
from puzzle_dag.engine.precision import require_precision
from puzzle_dag.model.configuration_puzzle_dag import PuzzleDagConfig
from puzzle_dag.progress import Progress, silent
from puzzle_dag.store import ArtifactStore, fingerprint

log = logging.getLogger(__name__)

VERSION = 4
PROBE_KIND = "probe"
"""Kind of one engine's measurement in the artifact store."""

_IRRELEVANT = ("transformers_version", "dtype", "torch_dtype", "_name_or_path", "initializer_range", "use_cache")


class WorkloadTooLongError(ValueError):
    """A target's input and output don't fit into the parent's positions."""


@dataclass(frozen=True, slots=True)
class _Planned:
    """An engine that is wanted: the job's name is its store key, `inputs` what the key was made from."""

    architecture: Architecture
    job: EngineJob
    inputs: dict[str, Any]


def _check_lengths(shape: PuzzleDagConfig, target: Target) -> None:
    length = target.input_length + target.output_length
    if length > shape.max_position_embeddings:
        raise WorkloadTooLongError(
            f"target {target.name!r}: input_length + output_length is {length}, but the parent has "
            f"{shape.max_position_embeddings} positions; shorten the target's `input_length` or `output_length`"
        )


def plain_config(shape: PuzzleDagConfig, architecture: Architecture) -> dict[str, Any]:
    """Return what config.json says of a model of `architecture`, as it is read back from JSON."""
    config: dict[str, Any] = json.loads(json.dumps(serving_config(shape, architecture)))
    return config


def describe_engine(
    config: dict[str, Any], settings: EngineSettings, workload: Workload, engine: int, hardware: Hardware, engine_version: str
) -> dict[str, Any]:
    """Return everything that determines a measurement: what its store key is made from."""
    return {
        "version": VERSION,
        "config": {k: v for k, v in config.items() if k not in _IRRELEVANT},
        "settings": asdict(settings),
        "workload": asdict(workload),
        "engine": engine,
        "engine_version": engine_version,
        "hardware": hardware.name,
        "num_threads": hardware.num_threads,
    }


def _plan_jobs(
    shape: PuzzleDagConfig, architectures: Iterable[Architecture], target: Target, hardware: Hardware, engine_version: str
) -> list[_Planned]:
    """Return every engine that is wanted. Engines of one model are far apart, so that a slow minute does not pass for a slow model."""
    settings, workload = EngineSettings.of(target), Workload.of(target)
    configs = [(a, plain_config(shape, a)) for a in architectures]
    planned = []
    for engine in range(target.engines_per_probe):
        for architecture, config in configs:
            inputs = describe_engine(config, settings, workload, engine, hardware, engine_version)
            job = EngineJob(name=fingerprint(inputs), config=config, settings=settings, workload=workload, seed=engine)
            planned.append(_Planned(architecture, job, inputs))
    return planned


def find_engine(kind: str, key: str, store: ArtifactStore) -> EngineResult | None:
    """Return what one engine measured before, None where the store lacks it."""
    found = store.find(kind, key)
    return None if found is None else EngineResult.from_json(found.metadata)


def run_and_keep(
    kind: str,
    jobs: Sequence[EngineJob],
    inputs: Mapping[str, dict[str, Any]],
    target: Target,
    hardware: Hardware,
    store: ArtifactStore,
    *,
    progress: Progress = silent,
) -> dict[str, EngineResult]:
    """Run engines and store each result the moment it is there, so that a crash loses none.

    Args:
        kind: of the artifacts.
        jobs: named by their store keys.
        inputs: key -> what it was made from.
        target: how they are served.
        hardware: this machine.
        store: where the results are kept.
        progress: called after each engine.

    Raises:
        VllmMissingError, EngineRefusedError, UnsupportedPrecisionError, EngineFailedError: as `measure_models`.
    """
    results: dict[str, EngineResult] = {}

    def keep(job: EngineJob, result: EngineResult) -> None:
        content = result.to_json()
        store.write(kind, job.name, lambda _: fingerprint(content), inputs=inputs[job.name], metadata=content)
        results[job.name] = result

    if jobs:
        require_precision(jobs[0], hardware)
    logs = store.root.parent / "logs" / "engines"
    run_engines(jobs, on_result=keep, progress=progress, hardware=hardware, process_each=target.process_per_probe, log_folder=logs)
    return results


def measure_models(
    shape: PuzzleDagConfig,
    architectures: Iterable[Architecture],
    target: Target,
    store: ArtifactStore,
    *,
    remeasure: bool = False,
    progress: Progress = silent,
) -> list[Measurement]:
    """Measure models with dummy weights in `target.engines_per_probe` engines each; what the store holds is not run again.

    Every engine's result is stored the moment it is there, so a crash loses none.

    Args:
        shape: the parent's configuration.
        architectures: the models, of any depth.
        target: how they are served and what is timed.
        store: where measurements are kept, one an engine.
        remeasure: run everything again, and replace what is stored.
        progress: called after each engine.

    Raises:
        VllmMissingError: vLLM is not installed.
        EngineVersionError: it is another version than the target names.
        HardwareMismatchError: the target is for other hardware.
        WorkloadTooLongError: the target's lengths exceed the parent's positions.
        BatchTooLargeError: a model and the largest batch don't fit into the memory.
        EngineRefusedError: the engine can't run models of this shape.
        UnsupportedPrecisionError: the engine doesn't do the target's precision on this hardware; in its own words.
        EngineFailedError: engines failed twice; all others were run and kept first.
    """
    _check_lengths(shape, target)
    hardware = detect_hardware()
    check_hardware(target, hardware)
    engine_version, architectures = read_engine_version(), list(architectures)
    check_installed(target, engine_version)
    planned = _plan_jobs(shape, architectures, target, hardware, engine_version)
    inputs = {p.job.name: p.inputs for p in planned}
    results = {} if remeasure else {key: found for key in inputs if (found := find_engine(PROBE_KIND, key, store)) is not None}
    before = [Measurement(p.architecture, results[p.job.name]) for p in planned if p.job.name in results]
    check_memory(shape, architectures, target, hardware, engine_bytes=max(0, measure_engine_bytes(shape, target, before) or 0))
    jobs = [p.job for p in planned if p.job.name not in results]
    log.info("target %s: %d engines measured before, %d to run", target.name, len(results), len(jobs))
    results |= run_and_keep(PROBE_KIND, jobs, inputs, target, hardware, store, progress=progress)
    return [Measurement(p.architecture, results[p.job.name]) for p in planned]


def plan_target(
    shape: PuzzleDagConfig, parent_block: Block, target: Target, attentions: Iterable[Attention], ffns: Iterable[FFN]
) -> tuple[Probe, ...]:
    """Return the probes of a target, as many as its settings say."""
    return plan_probes(
        parent_block,
        attentions,
        ffns,
        num_layers=shape.num_hidden_layers,
        probes_per_variant=target.probes_per_variant,
        mixtures=target.mixtures,
    )


def measure_target(
    shape: PuzzleDagConfig,
    parent_block: Block,
    target: Target,
    attentions: Iterable[Attention],
    ffns: Iterable[FFN],
    store: ArtifactStore,
    *,
    remeasure: bool = False,
    progress: Progress = silent,
) -> CostTable:
    """Measure what every variant costs on a target, with the engine that the target serves with.

    Where this machine is not the target's hardware, the costs that were imported for it are returned.

    Args:
        shape: the parent's configuration (no weights are needed: the engine makes up dummy ones).
        parent_block: the parent's own block.
        target: hardware, engine, mode and workload.
        attentions: attention variants; the parent's and the no-op may be among them.
        ffns: FFN variants, likewise.
        store: keeps each engine's measurement, so that further variants cost only their own probes.
        remeasure: measure everything again, and replace what is stored.
        progress: called after each engine.

    Raises:
        HardwareMismatchError: the target is for other hardware, and nothing was imported for it.
        ImportedCostsError: what was imported for it lacks a variant or a batch size.
        TensorParallelError: a variant doesn't split over the target's GPUs.
        UnknownDtypeError: the bytes of the target's number types are not known.
        VllmMissingError, EngineVersionError, WorkloadTooLongError, BatchTooLargeError, EngineRefusedError,
            UnsupportedPrecisionError, EngineFailedError: as `measure_models` raises them.
    """
    attentions, ffns = {parent_block.attention, *attentions}, {parent_block.ffn, *ffns}
    NumberTypes.of(target)
    check_tensor_parallel(shape, target, attentions, ffns)
    try:
        check_hardware(target, detect_hardware())
    except HardwareMismatchError as error:
        imported = find_imported(shape, target, attentions, ffns, store)
        if imported is None:
            raise HardwareMismatchError(f"{error}; or import what was measured there: `puzzle-dag costs import FILE`") from None
        return imported
    probes = plan_target(shape, parent_block, target, attentions, ffns)
    measured = measure_models(shape, [p.architecture for p in probes], target, store, remeasure=remeasure, progress=progress)
    capacity = check_capacity(shape, target, measured)
    for check in capacity:
        if not check.agrees:
            log.warning("target %s: the engine's KV cache is not what the arithmetic says: %s", target.name, check)
    table = fit_table(shape, parent_block, target, attentions, ffns, measured)
    return replace(table, provenance=trace_provenance(shape, target, measured, capacity))
