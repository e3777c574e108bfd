"""A worker's process as its client holds it: started, read from, given more to do, ended with all that it started.

The process leads a group of its own, so that ending it ends every engine it started.
"""

import contextlib
import json
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

_START_LIMIT_S = 300.0
_EXIT_LIMIT_S = 20.0
_ABORT_LIMIT_S = 5.0
_GONE_LIMIT_S = 10.0


def wait_for_group(group: int, limit_s: float) -> None:
    """Wait until no process of a group is left, so that its memory and ports are free when this returns; at most `limit_s` seconds."""
    end_s = time.monotonic() + limit_s
    while time.monotonic() < end_s:
        try:
            os.killpg(group, 0)
        except (ProcessLookupError, PermissionError):
            return
        time.sleep(0.05)


class WorkerProcess:
    """One worker, from its start to its end. It may run one file of jobs after another (`give`)."""

    def __init__(self, command: Callable[[int], list[str]], log: Path, environment: Mapping[str, str]) -> None:
        """Start the worker.

        Args:
            command: returns the command line, given the file descriptor that events are to be sent to.
            log: file that takes what the process writes.
            environment: the process's own.
        """
        self.environment = dict(environment)
        self._has_ended = False
        self._channel, write_end = os.pipe()
        try:
            with log.open("wb") as log_file:
                self._process = subprocess.Popen(
                    command(write_end),
                    stdin=subprocess.PIPE,
                    stdout=log_file,
                    stderr=log_file,
                    env=self.environment,
                    pass_fds=(write_end,),
                    start_new_session=True,
                )
        except OSError:
            os.close(self._channel)
            raise
        finally:
            os.close(write_end)

    @property
    def status(self) -> int | None:
        """Exit status as `subprocess` tells it, None while the process runs."""
        return self._process.poll()

    def give(self, jobs_path: Path) -> None:
        """Hand a worker that is done a further file of jobs. One that has died meanwhile takes nothing; its events say so."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(f"{jobs_path}\n".encode())
            self._process.stdin.flush()

    def read_events(self, silence_limit_s: float) -> Iterator[dict[str, Any]]:
        """Yield the worker's events until it closes its end. Raises TimeoutError when it is silent for too long.

        Until its first event a new worker imports vLLM, which on a cold disk or a busy machine takes longer than a small engine.
        """
        pending, limit_s = b"", max(silence_limit_s, _START_LIMIT_S)
        with selectors.DefaultSelector() as selector:
            selector.register(self._channel, selectors.EVENT_READ)
            while True:
                if not selector.select(limit_s):
                    raise TimeoutError(f"silent for {limit_s:.0f} s")
                limit_s = silence_limit_s
                chunk = os.read(self._channel, 1 << 16)
                if not chunk:
                    return
                *lines, pending = (pending + chunk).split(b"\n")
                yield from (json.loads(line) for line in lines)

    def let_exit(self) -> None:
        """Give nothing more, and wait for the worker to exit: its own status says more than the signal that ends what it left."""
        self._close_input()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_EXIT_LIMIT_S)

    def ask_where(self) -> None:
        """Abort a group that hangs: Python's fault handler then writes into the logs where it stood."""
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(self._process.pid, signal.SIGABRT)
            self._process.wait(_ABORT_LIMIT_S)

    def end(self) -> None:
        """End the worker and every process it started, and wait until they are gone: what still runs would disturb the next engine."""
        if self._has_ended:
            return
        self._has_ended = True
        self._close_input()
        os.close(self._channel)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        wait_for_group(self._process.pid, _GONE_LIMIT_S)

    def _close_input(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
