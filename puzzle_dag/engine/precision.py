"""Which number types does the engine do on this hardware? Asked of the engine itself: a small one is started with each.

No list of ours would be right for long: a build may lack a kernel, a name may be taken and do nothing. What fails is reported in
the engine's own words.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from puzzle_dag.engine.client import run_engines
from puzzle_dag.engine.failures import EngineFailedError
from puzzle_dag.engine.hardware import Hardware
from puzzle_dag.engine.int8 import INT8
from puzzle_dag.engine.jobs import EngineJob, EngineResult, EngineSettings, Workload
from puzzle_dag.progress import Progress, silent

QUANTIZATIONS = (None, "fp8", "fp8_per_tensor", "fp8_per_channel", "fp8_per_block", INT8, "int8_per_channel_weight_only")
"""Weight quantisations that are tried, None for none."""
KV_CACHE_DTYPES = ("auto", "fp8")
"""Types of the KV cache that are tried."""

_WORKLOAD = Workload(input_length=8, output_length=2, batch_sizes=(1,), repeats=2)


class UnsupportedPrecisionError(ValueError):
    """A quantisation or a type of the KV cache that the engine doesn't do on this hardware."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrecisionTrial:
    """One precision, tried."""

    dtype: str
    """Type of weights and activations."""
    quantization: str | None
    """Weight quantisation; None for none."""
    kv_cache_dtype: str
    """Type of the KV cache."""
    works: bool
    """Whether an engine started with it, quantised every linear map and generated."""
    words: str
    """The engine's own words where it failed."""
    prefill_s: float | None
    """Seconds of a small prefill where it works: far more than without means no fast kernel."""


def _last_line(reason: str) -> str:
    """Return the exception of a traceback, its type and message, without the way there."""
    lines = [line for line in reason.strip().splitlines() if line and not line.startswith((" ", "Traceback"))]
    return lines[-1] if lines else reason.strip()


def try_precisions(
    config: dict[str, Any], settings: Iterable[EngineSettings], *, hardware: Hardware | None = None, progress: Progress = silent
) -> list[PrecisionTrial]:
    """Start a small engine with each of some settings, and return what became of each.

    Args:
        config: a small model's configuration, as in config.json; its weights are made up.
        settings: the precisions, in all else alike.
        hardware: this machine, by default as detected.
        progress: called after each engine.

    Raises:
        VllmMissingError: vLLM is not installed.
    """
    jobs = {name_precision(s): EngineJob(name=name_precision(s), config=config, settings=s, workload=_WORKLOAD) for s in settings}
    results: dict[str, EngineResult] = {}

    def keep(job: EngineJob, result: EngineResult) -> None:
        results[job.name] = result

    failures: dict[str, str] = {}
    try:
        run_engines(list(jobs.values()), on_result=keep, progress=progress, hardware=hardware, retry=False)
    except EngineFailedError as error:
        failures = {f.name: _last_line(f.reason) for f in error.failures}
    return [
        PrecisionTrial(
            dtype=job.settings.dtype,
            quantization=job.settings.quantization,
            kv_cache_dtype=job.settings.kv_cache_dtype,
            works=name in results,
            words=failures.get(name, "" if name in results else "was not tried, since no engine ran before it"),
            prefill_s=results[name].at(1).median_s("prefill") if name in results else None,
        )
        for name, job in jobs.items()
    ]


def name_precision(settings: EngineSettings) -> str:
    """Return e.g. "bfloat16, fp8_per_channel weights, fp8 KV cache"."""
    parts = [settings.dtype]
    parts += [f"{settings.quantization} weights"] * (settings.quantization is not None)
    parts += [f"{settings.kv_cache_dtype} KV cache"] * (settings.kv_cache_dtype != "auto")
    return ", ".join(parts)


def list_precisions(settings: EngineSettings) -> list[EngineSettings]:
    """Return the precisions that are tried: every quantisation, and the KV cache's types with plain and with int8 weights."""
    tried = [replace(settings, quantization=q, kv_cache_dtype="auto") for q in QUANTIZATIONS]
    for kv_cache_dtype in KV_CACHE_DTYPES[1:]:
        tried += [replace(settings, quantization=q, kv_cache_dtype=kv_cache_dtype) for q in (None, INT8)]
    return tried


def require_precision(job: EngineJob, hardware: Hardware) -> None:
    """Check that the engine does a job's precision here, where it is not plain: one small engine instead of a failure a probe.

    Raises:
        UnsupportedPrecisionError: it doesn't; in the engine's own words.
    """
    settings = job.settings
    if settings.quantization is None and settings.kv_cache_dtype == "auto":
        return
    config: dict[str, Any] = json.loads(json.dumps(job.config))
    (trial,) = try_precisions(shorten(config), [settings], hardware=hardware)
    if not trial.works:
        raise UnsupportedPrecisionError(
            f"{name_precision(settings)} doesn't work with this engine on {hardware.name}: {trial.words}; "
            "choose another `quantization` or `kv_cache_dtype` (`puzzle-dag precisions` tries them all here)"
        )


def shorten(config: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration of a model's first two layers."""
    layers = min(2, config["num_hidden_layers"])
    short = {**config, "num_hidden_layers": layers}
    if config.get("layer_types"):
        short["layer_types"] = config["layer_types"][:layers]
    if config.get("per_layer_config"):
        short["per_layer_config"] = {k: v for k, v in config["per_layer_config"].items() if int(k) < layers}
    return short
