"""The lease of the device: training and measuring never share it, whoever started them, a refresh or a command."""

import fcntl
import logging
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

log = logging.getLogger(__name__)

_LONGEST_COMMAND = 120


def _describe_self() -> str:
    """Return this process as others are told of it, e.g. "process 4711 (-m assets refresh --profile tiny)"."""
    return f"process {os.getpid()} ({shlex.join(sys.orig_argv[1:])[:_LONGEST_COMMAND]})"


@contextmanager
def lease(path: Path) -> Iterator[None]:
    """Hold the file `path`; wait for whoever holds it, and log who that is.

    Dagster's pool keeps queued runs apart, but a refresh from a terminal beside one from the UI, and `puzzle-dag measure`
    beside either, go past the queue. A lock on a file holds across processes, and the kernel frees it when its holder dies.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.warning("waiting for %s, which %s holds", path, path.read_text().strip() or "another process")
            fcntl.flock(handle, fcntl.LOCK_EX)
        handle.truncate(0)
        handle.write(f"{_describe_self()}\n")
        handle.flush()
        yield


def lease_device(root: Path) -> AbstractContextManager[None]:
    """Return the lease of the device of the project at `root`: one lock for all that trains, measures or grades there."""
    return lease(root / "var" / "device.lock")
