"""Which release of this package runs: its version and, in a checkout, the commit."""

import subprocess
from functools import cache
from pathlib import Path

import puzzle_dag


@cache
def read_package_version() -> str:
    """Return e.g. "0.1.0", and in a checkout "0.1.0 at 1a2b3c4d5e6f", with "(changed)" where tracked files differ from the commit."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return puzzle_dag.__version__
    git = ["git", "-C", str(root)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True, timeout=20)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):  # no git here, or a checkout of somebody else's
        return puzzle_dag.__version__
    return f"{puzzle_dag.__version__} at {head.stdout.strip()}{' (changed)' if changed.stdout.strip() else ''}"
