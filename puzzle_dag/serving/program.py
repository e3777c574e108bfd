"""A program that we start beside us: a process group of its own, its output in a file, and an end that leaves nothing running."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from puzzle_dag.engine.process import wait_for_group

_LOG_TAIL_LINES = 40
_GRACE_S = 15.0
_GONE_LIMIT_S = 5.0


class Program:
    """A running program, as a context manager; leaving the context ends it and all that it started."""

    def __init__(self, command: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
        """Prepare to run `command`, its stdout and stderr going to the file `log`."""
        self.command, self.log, self._environment = list(command), log, dict(environment)
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "Program":
        """Start it."""
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "puzzle_dag.serving.follow", *self.command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environment,
                start_new_session=True,
            )
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """End it."""
        self.stop()

    @property
    def status(self) -> int | None:
        """Exit status, or None while it runs."""
        assert self._process is not None
        return self._process.poll()

    @property
    def process_group(self) -> int:
        """Id of its process group."""
        assert self._process is not None
        return self._process.pid

    def tail(self) -> str:
        """Return the last lines of its output, headed."""
        lines = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        return "\n".join([f"--- end of {self.log.name} ---", *lines[-_LOG_TAIL_LINES:]])

    def stop(self) -> None:
        """Ask the group to end; after 15 s, or for what the leader left behind, end it."""
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_GRACE_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        wait_for_group(self._process.pid, _GONE_LIMIT_S)
