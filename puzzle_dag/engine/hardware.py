"""The machine that is measured on: its name, as costs are keyed by it, and how fast it multiplies matrices."""

import os
import platform
import subprocess
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
    memory_bytes: int = 0
    """Memory of one GPU, or what this process may use of the machine's; 0 where that is not known."""
    num_gpus: int = 0
    """GPUs that torch sees."""
    driver: str | None = None
    """Version of the GPU's driver; None on CPUs or where it is not known."""


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


def _read_node_bytes() -> int | None:
    """Return the memory of the NUMA node of this process's first core; None where the system doesn't tell."""
    core = min(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    for node in Path(f"/sys/devices/system/cpu/cpu{core}").glob("node[0-9]*"):
        try:
            words = (Path("/sys/devices/system/node") / node.name / "meminfo").read_text().split()
            return int(words[words.index("MemTotal:") + 1]) * 1024
        except (OSError, ValueError, IndexError):
            continue
    return None


def read_memory_bytes() -> int:
    """Return the bytes of main memory that an engine of this process may use.

    That is the memory of one NUMA node, which vLLM binds an engine's to, or the control group's limit where that is lower.
    """
    num_bytes = _read_node_bytes() or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(path).read_text().strip()
        except OSError:
            continue
        if text.isdigit():  # "max" where there is no limit
            num_bytes = min(num_bytes, int(text))
    return num_bytes


def _read_driver() -> str | None:
    """Return the NVIDIA driver's version as nvidia-smi says it."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return None
    return lines[0] if lines else None


def detect_hardware() -> Hardware:
    """Return this machine's GPU where torch sees one, else its processor."""
    if torch.cuda.is_available():
        memory_bytes, num_gpus = torch.cuda.get_device_properties(0).total_memory, torch.cuda.device_count()
        return Hardware("gpu", torch.cuda.get_device_name(0), 0, memory_bytes, num_gpus, _read_driver())
    return Hardware("cpu", f"{_read_cpu_name()}, {count_usable_cores()} cores", count_engine_threads(), read_memory_bytes())


def check_hardware(target: Target, hardware: Hardware) -> None:
    """Check that a target can be measured here.

    Raises:
        HardwareMismatchError: the target names a GPU and this is another, or none; or it wants the CPU and vLLM would take the GPU.
    """
    word = _GPU_WORDS.get(target.hardware)
    if word is None and hardware.kind == "cpu":
        return
    if word is not None and hardware.kind == "gpu" and word in hardware.name.lower():
        _check_num_gpus(target, hardware)
        return
    raise HardwareMismatchError(
        f"target {target.name!r}: field `hardware` is {target.hardware!r}, but this machine has {hardware.name}; "
        f"measure it on such a machine, or choose a target with `hardware: {'local-cpu' if hardware.kind == 'cpu' else '(this GPU)'}`"
    )


def _check_num_gpus(target: Target, hardware: Hardware) -> None:
    if target.tensor_parallel_size > hardware.num_gpus > 0:
        raise HardwareMismatchError(
            f"target {target.name!r}: field `tensor_parallel_size` is {target.tensor_parallel_size}, but this machine has "
            f"{hardware.num_gpus} x {hardware.name}; lower it, or measure on a machine with as many GPUs"
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
