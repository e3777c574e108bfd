"""What is asked of the engine worker and what it answers; plain values that travel as JSON."""

import statistics
from dataclasses import asdict, dataclass
from typing import Any, Literal

from puzzle_dag.config import Target


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """How an engine is started: the fields of a target that say how it serves."""

    mode: Literal["eager", "compiled"] = "eager"
    """Eager, or compiled (with CUDA graphs on GPUs)."""
    multiprocess: bool = False
    """The engine core in a process of its own."""
    dtype: str = "bfloat16"
    """Type of weights and activations."""
    quantization: str | None = None
    """vLLM's name of a weight quantisation, or `w8a8_int8`."""
    kv_cache_dtype: str = "auto"
    """vLLM's name of the KV cache's type."""
    tensor_parallel_size: int = 1
    """GPUs a layer is spread over."""

    @staticmethod
    def of(target: Target) -> "EngineSettings":
        """Return the settings that a target serves with."""
        return EngineSettings(
            mode=target.mode,
            multiprocess=target.multiprocess,
            dtype=target.dtype,
            quantization=target.quantization,
            kv_cache_dtype=target.kv_cache_dtype,
            tensor_parallel_size=target.tensor_parallel_size,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What is timed in each engine."""

    input_length: int
    """Prompt tokens a request."""
    output_length: int
    """Generated tokens a request."""
    batch_sizes: tuple[int, ...]
    """Concurrent requests; the engine admits the largest at once, so no batch is ever served one by one."""
    repeats: int
    """Timed repeats of each batch size."""

    @staticmethod
    def of(target: Target) -> "Workload":
        """Return the workload of a target."""
        return Workload(
            input_length=target.input_length, output_length=target.output_length, batch_sizes=target.batch_sizes, repeats=target.repeats
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineJob:
    """One engine to start and time: a checkpoint with its weights, or a configuration with random ones."""

    name: str
    """Unique among the jobs of a call."""
    folder: str | None = None
    """Checkpoint folder whose weights are loaded; exactly one of this and `config`."""
    config: dict[str, Any] | None = None
    """Model configuration as in config.json; its weights are vLLM's dummies (small random numbers)."""
    settings: EngineSettings
    """How the engine is started."""
    workload: Workload
    """What is timed."""
    seed: int = 0
    """Seed of the prompts' random token ids."""
    memory_share: float | None = None
    """Share of the memory that the engine may take, so that it sizes its KV cache itself; None gives it one for the largest batch."""

    def __post_init__(self) -> None:
        """Check that there is exactly one source of the model."""
        if (self.folder is None) == (self.config is None):
            raise ValueError(f"engine job {self.name!r}: give exactly one of `folder` (a checkpoint) and `config` (dummy weights)")

    def to_json(self) -> dict[str, Any]:
        """Return JSON types only."""
        return asdict(self)

    @staticmethod
    def from_json(content: dict[str, Any]) -> "EngineJob":
        """Undo `to_json`."""
        workload = {**content["workload"], "batch_sizes": tuple(content["workload"]["batch_sizes"])}
        return EngineJob(**{**content, "settings": EngineSettings(**content["settings"]), "workload": Workload(**workload)})


@dataclass(frozen=True, slots=True)
class BatchTimes:
    """The timed repeats of one batch size in one engine."""

    batch: int
    """Concurrent requests."""
    prefill_s: tuple[float, ...]
    """Seconds from sending the batch until its last request has its first token, one a repeat."""
    total_s: tuple[float, ...]
    """Seconds until the whole batch is generated, one a repeat."""
    reference_s: tuple[float, ...] = ()
    """Seconds of the fixed work of `engine.pace`, the mean of just before and just after each repeat; empty where an older version of
    this package measured."""

    def __post_init__(self) -> None:
        """Check that each repeat has its reference, or none has. Raises ValueError."""
        if self.reference_s and len(self.reference_s) != len(self.total_s):
            raise ValueError(f"batch {self.batch}: {len(self.reference_s)} references of {len(self.total_s)} repeats")

    @property
    def decode_s(self) -> tuple[float, ...]:
        """Seconds from the last first token to the end, one a repeat."""
        return tuple(t - p for p, t in zip(self.prefill_s, self.total_s, strict=True))

    def median_s(self, phase: str) -> float:
        """Return the median seconds of "prefill", "decode" or "total"."""
        return statistics.median(self._repeats_s(phase))

    def median_pace(self, phase: str) -> float | None:
        """Return the median over the repeats of a phase's time in multiples of its reference's; None where there is no reference."""
        if not self.reference_s:
            return None
        return statistics.median(s / r for s, r in zip(self._repeats_s(phase), self.reference_s, strict=True))

    def _repeats_s(self, phase: str) -> tuple[float, ...]:
        return {"prefill": self.prefill_s, "decode": self.decode_s, "total": self.total_s}[phase]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineResult:
    """What one engine measured."""

    name: str
    """The job's name."""
    times: tuple[BatchTimes, ...]
    """One entry a batch size."""
    weight_bytes: int | None
    """Bytes of the tensors in the checkpoint; None for dummy weights."""
    kv_bytes_per_token: int
    """Bytes of KV cache a token takes, from the engine's own cache layout, summed over the tensor-parallel workers."""
    kv_capacity_tokens: int
    """Tokens the KV cache has room for, where none has left a layer's window yet."""
    peak_rss_bytes: int
    """Largest resident memory of the engine's process or of one of its workers."""
    start_s: float
    """Seconds to start the engine."""
    engine_version: str
    """Distribution and version of the engine."""
    hardware: str
    """Name of the machine's processor or GPU."""
    num_threads: int
    """CPU threads of the engine (0 on GPUs)."""
    kv_cache_bytes: int | None = None
    """Bytes that the engine was given for its KV cache, on one GPU; None where it sized that itself (`EngineJob.memory_share`), or where
    an older version of this package measured."""
    kv_block_tokens: int | None = None
    """Tokens of a block of that cache."""
    kv_concurrency: float | None = None
    """Requests of the workload's lengths that the engine says its cache holds at once; None where it or this package doesn't say."""
    device_bytes: int | None = None
    """Most memory in use on one GPU when the engine had run; None on CPUs."""
    driver: str | None = None
    """Version of the GPU's driver; None on CPUs."""
    package: str | None = None
    """Version, and commit in a checkout, of this package."""
    measured_at: str | None = None
    """When, as ISO 8601 in UTC."""

    def at(self, batch: int) -> BatchTimes:
        """Return the times at a batch size. Raises KeyError where it was not measured."""
        for times in self.times:
            if times.batch == batch:
                return times
        raise KeyError(f"batch {batch} was not measured; there are {[t.batch for t in self.times]}")

    def to_json(self) -> dict[str, Any]:
        """Return JSON types only."""
        return asdict(self)

    @staticmethod
    def from_json(content: dict[str, Any]) -> "EngineResult":
        """Undo `to_json`."""
        times = tuple(
            BatchTimes(t["batch"], *(tuple(t.get(name, ())) for name in ("prefill_s", "total_s", "reference_s"))) for t in content["times"]
        )
        return EngineResult(**{**content, "times": times})
