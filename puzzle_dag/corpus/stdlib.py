"""Python's own standard library, read from the machine it runs on and never committed.

Files are split into "train" and "heldout" by a hash of their path inside the library, so that the split is the
same on every machine and no held-out file was ever trained on.
"""

import hashlib
import os
import platform
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

Split = Literal["train", "heldout"]

_SKIPPED_FOLDERS = frozenset({"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__", "pydoc_data"})
_HELDOUT_PERCENT = 10


def python_version() -> str:
    """Return the version whose library is read, e.g. "3.11.7"; it belongs into every record of the corpus."""
    return platform.python_version()


def split_of(relative_path: str) -> Split:
    """Return the split of a file from a hash of its path below the library folder."""
    digest = hashlib.sha256(relative_path.encode()).digest()
    return "heldout" if int.from_bytes(digest[:4], "big") % 100 < _HELDOUT_PERCENT else "train"


def _modules_below(root: Path) -> list[Path]:
    paths: list[Path] = []
    for folder, subfolders, files in os.walk(root):
        # Not even looked into: what is installed in site-packages is many times the library.
        subfolders[:] = [name for name in subfolders if name not in _SKIPPED_FOLDERS]
        paths += [Path(folder, name) for name in files if name.endswith(".py")]
    return sorted(paths)


def read_stdlib(split: Split, folder: Path | None = None) -> Iterator[tuple[str, str]]:
    """Yield `(relative path, text)` of the library's modules in `split`, in sorted order.

    Raises:
        FileNotFoundError: there is no library folder (an embedded or zipped Python).
    """
    root = folder or Path(sysconfig.get_paths()["stdlib"])
    if not root.is_dir():
        raise FileNotFoundError(f"standard library folder {root} not found: this Python ships it as an archive; use a full CPython")
    for path in _modules_below(root):
        relative = path.relative_to(root).as_posix()
        if split_of(relative) == split:
            try:
                yield relative, path.read_text(encoding="utf-8")
            except UnicodeDecodeError:  # a handful of files declare another encoding on purpose
                continue
