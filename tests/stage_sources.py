"""What each stage's VERSION vouches for: its module's code and that of its package which it imports, docstrings aside.

`python tests/stage_sources.py` records the state of today in tests/stage_sources.json; do that after raising a VERSION,
or after a change that you know to leave every stored result as it is.
"""

import ast
import hashlib
import json
from pathlib import Path

CHECKOUT = Path(__file__).parents[1]
RECORD = Path(__file__).with_suffix(".json")


def stages() -> dict[str, int]:
    """Return module -> VERSION of every stage."""
    found = {}
    for path in sorted((CHECKOUT / "puzzle_dag").rglob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if _is_version(node) and isinstance(node, ast.Assign):
                found[".".join(path.relative_to(CHECKOUT).with_suffix("").parts)] = ast.literal_eval(node.value)
    return found


def _file(module: str) -> Path:
    return CHECKOUT.joinpath(*module.split(".")).with_suffix(".py")


def _imports(module: str) -> set[str]:
    """Return the modules of its own package that a module imports, itself aside."""
    package = module.rpartition(".")[0]
    names = {node.module for node in ast.walk(ast.parse(_file(module).read_text())) if isinstance(node, ast.ImportFrom) and node.module}
    return {n for n in names if n.rpartition(".")[0] == package and _file(n).exists()} - {module}


def _is_version(node: ast.stmt) -> bool:
    return isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "VERSION"


def _code(module: str) -> str:
    tree = ast.parse(_file(module).read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            # strings that stand alone are documentation, and the version is not part of what it vouches for
            node.body = [s for s in node.body if not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant)) and not _is_version(s)]
    return ast.dump(tree)


def digest(module: str, versions: dict[str, int]) -> str:
    """Return the digest of what a stage's VERSION vouches for; modules with a VERSION of their own vouch for themselves."""
    seen, todo = {module}, [module]
    while todo:
        for found in _imports(todo.pop()) - seen - set(versions):
            seen.add(found)
            todo.append(found)
    return hashlib.sha256("\n".join(_code(m) for m in sorted(seen)).encode()).hexdigest()


def current() -> dict[str, dict[str, int | str]]:
    """Return the state of today."""
    versions = stages()
    return {module: {"version": version, "source": digest(module, versions)} for module, version in versions.items()}


if __name__ == "__main__":
    RECORD.write_text(json.dumps(current(), indent=1, sort_keys=True) + "\n")
