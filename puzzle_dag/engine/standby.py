"""A worker on standby: it has imported vLLM, which takes some 10 s, and waits for the next engines that somebody wants.

A refresh measures in many assets, one after another. While it keeps standby, they share one worker; each engine still runs
in a fork of its own, which is all that engines of one asset have of each other, too.
"""

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from puzzle_dag.engine.process import WorkerProcess


class Standby:
    """At most one worker that waits, for as long as somebody keeps it."""

    def __init__(self) -> None:
        """Nobody keeps it, and nobody waits."""
        self._num_keepers = 0
        self._waiting: list[WorkerProcess] = []

    @contextmanager
    def keep(self) -> Iterator[None]:
        """Let workers wait inside the `with`; the one that does when the last of several ends is ended."""
        self._num_keepers += 1
        try:
            yield
        finally:
            self._num_keepers -= 1
            if not self._num_keepers:
                while self._waiting:
                    self._waiting.pop().end()

    def find(self, environment: Mapping[str, str]) -> WorkerProcess | None:
        """Return the worker that waits, whose it then no longer is; None where there is none, or one of another environment.

        The other is ended, and so is one that died.
        """
        while self._waiting:
            worker = self._waiting.pop()
            if worker.status is None and worker.environment == dict(environment):
                return worker
            worker.end()
        return None

    def give_back(self, worker: WorkerProcess) -> bool:
        """Let a worker that is done wait for more. Return False, and leave it to the caller, where nobody keeps standby."""
        if not self._num_keepers or self._waiting:
            return False
        self._waiting.append(worker)
        return True


@functools.cache
def find_standby() -> Standby:
    """Return this process's standby: assets and the library's functions between them need not hand it on."""
    return Standby()
