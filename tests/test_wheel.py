"""What `pip install` brings: a wheel with our package alone, whose entry points vLLM and the shell find."""

import importlib.metadata
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[1]
BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the wheel holds. It is built from a copy, as a build leaves files in the checkout, and without a package index."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("puzzle_dag", "assets", "resources"):  # all that is importable, so that what shall not be packed could be
        shutil.copytree(CHECKOUT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(CHECKOUT / name, source)
    built = subprocess.run([sys.executable, "-c", BUILD, str(out)], cwd=source, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr[-2000:]
    (wheel,) = out.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(out / "installed")
    return out / "installed"


def test_it_holds_our_package_and_nothing_beside_it(installed: Path) -> None:
    assert {path.name.partition("-")[0] for path in installed.iterdir()} == {"puzzle_dag"}
    packed = {path.relative_to(installed / "puzzle_dag") for path in (installed / "puzzle_dag").rglob("*") if path.is_file()}
    there = (path.relative_to(CHECKOUT / "puzzle_dag") for path in (CHECKOUT / "puzzle_dag").rglob("*") if path.is_file())
    assert packed == {path for path in there if "__pycache__" not in path.parts}


def test_vllm_and_the_shell_find_their_entry_points(installed: Path) -> None:
    (distribution,) = importlib.metadata.distributions(path=[str(installed)])
    found = {(e.group, e.name): e.value for e in distribution.entry_points}
    assert found == {
        ("vllm.general_plugins", "puzzle_dag"): "puzzle_dag.model.vllm_plugin:register",
        ("console_scripts", "puzzle-dag"): "puzzle_dag.cli:main",
    }
    assert all(callable(e.load()) for e in distribution.entry_points)
