"""The lease of the device: training and measuring never share it, whoever started them."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def lease(path: Path) -> Iterator[None]:
    """Hold the device; wait for whoever holds it.

    Dagster's pool keeps queued runs apart, but a refresh from a terminal beside one from the UI goes past the
    queue. A lock on a file holds across processes, and the kernel frees it when its holder dies.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
