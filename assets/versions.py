"""The VERSION of the stage modules that an asset calls, read without importing them (they import torch and vLLM)."""

import ast
import importlib.util
from functools import cache
from pathlib import Path


@cache
def stage_version(module: str) -> int:
    """Return the module-level `VERSION` of a puzzle_dag module. Raises ValueError where there is none."""
    *parents, name = module.split(".")
    spec = importlib.util.find_spec(parents[0])
    assert spec is not None and spec.submodule_search_locations, "puzzle_dag is installed wherever its assets run"
    path = Path(spec.submodule_search_locations[0], *parents[1:], f"{name}.py")
    for node in ast.parse(path.read_text()).body:
        target = node.targets[0] if isinstance(node, ast.Assign) else node.target if isinstance(node, ast.AnnAssign) else None
        if isinstance(target, ast.Name) and target.id == "VERSION":
            value = ast.literal_eval(node.value)  # type: ignore[attr-defined]
            assert isinstance(value, int)
            return value
    raise ValueError(f"{module} has no VERSION; every stage with stored artifacts says `VERSION = 1`")
