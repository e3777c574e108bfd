"""A target: the hardware, engine and workload that costs are measured for (conf/targets/NAME.yaml)."""

import re
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from puzzle_dag.config.reading import Name, Settings, check_name, read_settings

_VERSION = re.compile(r"\d+\.\d+(\.\d+)?([._+-]?[a-z0-9]+)*")


def _left_out(default: Any) -> Any:
    """Return a field that a dump leaves out at its default: a field that is new must not make what is stored under a dump stale."""
    return Field(default=default, exclude_if=lambda value: value == default)


class Target(Settings):
    """Hardware, engine and workload that costs are measured for."""

    version: Literal[1]
    """Version of this file format."""
    name: Name
    """The file's stem; the partition key."""
    hardware: Literal["local-cpu", "h100", "h200", "rtx4090"]
    """What the engine runs on; `local-cpu` is the machine at hand, whatever it is, and is recorded by its model name."""
    engine: Literal["vllm"] = "vllm"
    """The serving engine."""
    mode: Literal["eager", "compiled"] = "eager"
    """Eager, or compiled with CUDA graphs on GPUs: whatever will serve."""
    multiprocess: bool = False
    """Engine core in a process of its own, as `vllm serve` runs it."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Type of weights and activations."""
    quantization: str | None = None
    """Weight quantisation: vLLM's name of one that it does while loading (`fp8_per_channel`), or `w8a8_int8` for int8 weights and
    activations. Not every engine does every one: `puzzle-dag precisions` tries them on this machine."""
    kv_cache_dtype: str = "auto"
    """vLLM's name of the KV cache's type."""
    tensor_parallel_size: int = Field(default=1, gt=0)
    """GPUs a layer is spread over. Bytes in the cost table are then those of one GPU."""
    input_length: int = Field(gt=0)
    """Prompt tokens a request."""
    output_length: int = Field(gt=0)
    """Generated tokens a request."""
    batch_sizes: tuple[int, ...] = Field(min_length=1)
    """Concurrent requests that are measured."""
    probes_per_variant: int = Field(default=1, gt=0)
    """Probe models for each variant, beside the parent's four and the mixtures."""
    mixtures: int = Field(default=4, ge=0)
    """Probe models in which all variants are mixed at random, as in a child. They tell what unlike layers take more than the sum of
    what they take among their like; 0 takes that to be nothing."""
    engines_per_probe: int = Field(default=2, gt=0)
    """Engines each probe is measured in."""
    repeats: int = Field(default=5, gt=1)
    """Timed repeats an engine; the median counts."""
    heldout_models: int = Field(default=0, ge=0, exclude_if=lambda value: value == 0)
    """Random models, none of them a probe, that are measured to check what the costs predict; 8 or more tell, 0 leaves it."""
    process_per_probe: bool = _left_out(False)
    """A process that imports vLLM for every engine (some 9 s each), not forks of one: for engines that can't run in a fork."""
    engine_version: str | None = _left_out(None)
    """Version of vLLM that serves, e.g. 0.32.0; by default the one that is installed. Costs are then measured with no other."""
    strict: bool = _left_out(False)
    """Refuse costs that were measured with another engine version or mode than the one that serves, where a warning is the default."""

    @field_validator("engine_version")
    @classmethod
    def _a_version(cls, value: str | None) -> str | None:
        if value is not None and not _VERSION.fullmatch(value):
            raise ValueError(f"{value!r} is no version of an engine; write one like 0.32.0, or leave it out")
        return value

    @field_validator("batch_sizes")
    @classmethod
    def _positive_and_increasing(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if any(b <= 0 for b in value) or list(value) != sorted(set(value)):
            raise ValueError(f"{list(value)} must be positive and increasing, e.g. [1, 8, 32]")
        return value


def target_file(conf: Path, name: str) -> Path:
    """Return the path of a target's file. Raises ConfigError for a name that would leave the folder."""
    return conf / "targets" / f"{check_name(name)}.yaml"


def read_target(conf: Path, name: str) -> Target:
    """Read conf/targets/NAME.yaml. Raises ConfigError."""
    return read_settings(Target, target_file(conf, name))
