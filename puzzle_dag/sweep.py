"""Clear the store of what nothing uses any more: folders that a crash left half written, and artifacts long unused.

An artifact stays if any record under var/ names its key, or if it was written or read lately: a store that forgets what an
edited configuration will ask for again tomorrow saves disk and wastes hours. When it was read, the file system says (its
atime, which Linux renews once a day); where that is turned off, the time of writing counts.
"""

import re
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path

_HASH = re.compile(r"[0-9a-f]{64}")
_GIVEN_KINDS = ("imported_costs",)
"""Kinds of artifacts that came from elsewhere: nothing here could make them again."""
_PARTIAL_AGE_S = 3600.0
_DAY_S = 86_400.0


@dataclass(slots=True)
class Sweep:
    """What a sweep found."""

    num_kept: int = 0
    """Artifacts that stay."""
    kept_bytes: int = 0
    """Their size."""
    removed: list[Path] = field(default_factory=list)
    """Folders that were removed (or would be, in a dry run)."""
    removed_bytes: int = 0
    """Their size."""


def _num_bytes(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def _named_hashes(var: Path) -> set[str]:
    """Return every SHA-256 that a record of any profile names."""
    return {match for path in var.glob("*/records/**/*.json") for match in _HASH.findall(path.read_text())}


def _untouched_s(folder: Path, now_s: float) -> float:
    """Return how long nothing in a folder has been written. Times of reading don't count: looking for them is a reading."""
    return now_s - max(p.stat().st_mtime for p in (folder, *folder.rglob("*")))


def _unused_s(manifest: Path, now_s: float) -> float:
    """Return how long a manifest has been neither written nor read."""
    stat = manifest.stat()
    return now_s - max(stat.st_atime, stat.st_mtime)


def sweep(var: Path, *, unused_days: float, dry: bool = False) -> Sweep:
    """Remove what nothing uses from `var`/store.

    Args:
        var: folder of all that was made.
        unused_days: artifacts that no record names go when nobody has written or read them for this long.
        dry: only say what would go.
    """
    found, named, now_s = Sweep(), _named_hashes(var), time.time()
    for folder in sorted((var / "store").glob("*/*/*")):
        if folder.parent.parent.name in _GIVEN_KINDS and not folder.name.startswith(".partial-"):
            goes = False
        elif folder.name.startswith(".partial-"):
            goes = _untouched_s(folder, now_s) > _PARTIAL_AGE_S
        else:  # the manifest is not opened: that would count as a use
            manifest = folder / "manifest.json"
            goes = folder.name not in named and manifest.is_file() and _unused_s(manifest, now_s) > unused_days * _DAY_S
        size = _num_bytes(folder)
        if not goes:
            found.num_kept, found.kept_bytes = found.num_kept + 1, found.kept_bytes + size
            continue
        found.removed.append(folder)
        found.removed_bytes += size
        if not dry:
            shutil.rmtree(folder)
    return found
