"""The loaded parent, kept between the partitions that one process runs: reading 16 GB a layer would take the day."""

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from puzzle_dag.config import ParentSource

if TYPE_CHECKING:
    from puzzle_dag.model.parent import Parent


@lru_cache(maxsize=1)
def load_parent_once(root: Path, source: ParentSource, version: str, dtype: str | None, device: str) -> "Parent":
    """Load a parent, or return the one loaded last if that was it. `version` is what tells changed files apart."""
    from puzzle_dag.model.parent import load_parent

    return load_parent(source, root, dtype=dtype, device=device)
