"""Digests of files that a person brings, remembered by size and time of change: a checkpoint is not read at every refresh."""

import json
from pathlib import Path

from puzzle_dag.store import digest_file, write_atomically


def digest_files(paths: list[Path], memory: Path) -> dict[str, str]:
    """Return name -> digest; a file whose size and time of change are those that `memory` (a JSON file) holds is not read again."""
    known = json.loads(memory.read_text()) if memory.exists() else {}
    seen = {}
    for path in paths:
        stat = path.stat()
        mark = f"{stat.st_size}/{stat.st_mtime_ns}"
        old_mark, digest = known.get(str(path), ("", ""))
        seen[str(path)] = (mark, digest if mark == old_mark else digest_file(path))
    if seen != {k: tuple(v) for k, v in known.items()}:
        write_atomically(memory, json.dumps(seen))
    return {path.name: seen[str(path)][1] for path in paths}
