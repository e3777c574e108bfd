"""The machine that is measured on: its name, as costs are keyed by it, and how fast it multiplies matrices."""

import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from puzzle_dag.config import Target

_GPU_WORDS = {"h100": "h100", "h200": "h200", "rtx4090": "rtx 4090"}


class HardwareMismatchError(ValueError):
    """A target wants other hardware than this machine has."""


@dataclass(frozen=True, slots=True)
class Hardware:
    """What an engine on this machine runs on."""

    kind: Literal["cpu", "gpu"]
    """Processor or GPU."""
    name: str
    """Model name, precise enough to key costs by it."""
    num_threads: int
    """CPU threads an engine uses; 0 on GPUs."""


def _read_cpu_name() -> str:
    """Return e.g. "Intel(R) Xeon(R) Processor (6/143/8)": model name and family/model/stepping, since clouds hide the former."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    fields: dict[str, str] = {}
    for line in text.split("\n\n", 1)[0].splitlines():
        key, _, value = line.partition(":")
        fields[key.strip()] = value.strip()
    name = fields.get("model name") or platform.machine()
    steps = "/".join(fields[k] for k in ("cpu family", "model", "stepping") if k in fields)
    return f"{name} ({steps})" if steps else name


def count_usable_cores() -> int:
    """Return the number of cores that this process may run on (affinity, not the machine's total)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def count_engine_threads() -> int:
    """Return the CPU threads that an engine gets: OMP_NUM_THREADS where it is set, else every usable core."""
    given = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    return int(given) if given.isdigit() and int(given) > 0 else count_usable_cores()


def detect_hardware() -> Hardware:
    """Return this machine's GPU where torch sees one, else its processor."""
    if torch.cuda.is_available():
        return Hardware("gpu", torch.cuda.get_device_name(0), 0)
    return Hardware("cpu", f"{_read_cpu_name()}, {count_usable_cores()} cores", count_engine_threads())


def check_hardware(target: Target, hardware: Hardware) -> None:
    """Check that a target can be measured here.

    Raises:
        HardwareMismatchError: the target names a GPU and this is another, or none; or it wants the CPU and vLLM would take the GPU.
    """
    word = _GPU_WORDS.get(target.hardware)
    if word is None and hardware.kind == "cpu":
        return
    if word is not None and hardware.kind == "gpu" and word in hardware.name.lower():
        return
    raise HardwareMismatchError(
        f"target {target.name!r}: field `hardware` is {target.hardware!r}, but this machine has {hardware.name}; "
        f"measure it on such a machine, or choose a target with `hardware: {'local-cpu' if hardware.kind == 'cpu' else '(this GPU)'}`"
    )


def measure_matmul_rate(dtype: torch.dtype = torch.bfloat16, seconds: float = 2.0, *, size: int = 2048) -> float:
    """Return this machine's matrix-product rate in flop/s: the fastest product of two [size, size] matrices within `seconds`.

    Two flops a multiply-add. The fastest counts, since a neighbour on the machine only ever adds time.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    fastest_s, end = float("inf"), time.perf_counter() + seconds
    with torch.inference_mode():
        left @ right
        while time.perf_counter() < end:
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            left @ right
            if device == "cuda":
                torch.cuda.synchronize()
            fastest_s = min(fastest_s, time.perf_counter() - start)
    return 2.0 * size**3 / fastest_s
