"""One worker process under watch: its events are read as they come, and it is ended when it falls silent.

The worker leads a process group of its own, so that ending it ends every engine it started.
"""

import contextlib
import json
import os
import re
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from puzzle_dag.engine.environment import engine_environment
from puzzle_dag.engine.hardware import Hardware
from puzzle_dag.engine.jobs import EngineJob

_LOG_TAIL_LINES = 40
_START_LIMIT_S = 300.0
_EXIT_LIMIT_S = 20.0
_ABORT_LIMIT_S = 5.0
_GONE_LIMIT_S = 10.0


class EngineRefusedError(ValueError):
    """The engine can't run what is asked for, whatever is tried; known before any engine was started."""


def worker_command(jobs_path: Path, channel: int, *, forked: bool) -> list[str]:
    """Return the command line of a worker that runs the jobs in a file and sends events to a file descriptor.

    Args:
        jobs_path: JSON list of jobs; the engines' logs go into its folder.
        channel: file descriptor for events.
        forked: each engine in a fork of the worker; otherwise in the worker itself, which then gets one job.
    """
    return [sys.executable, "-m", "puzzle_dag.engine.worker", str(jobs_path), str(channel), "forked" if forked else "alone"]


def log_path(folder: Path, job_name: str) -> Path:
    """Return where an engine's log lies: job names may have slashes, file names may not."""
    return folder / f"{re.sub(r'[^A-Za-z0-9._-]', '-', job_name)[:80]}.log"


def read_tail(path: Path) -> str:
    """Return the last lines of a log; "" where there is none."""
    if not path.is_file():
        return ""
    return "\n".join(path.read_text(errors="replace").splitlines()[-_LOG_TAIL_LINES:])


def _build_environment(jobs: Sequence[EngineJob], hardware: Hardware) -> dict[str, str]:
    """Return the worker's environment."""
    multiprocess = jobs[0].settings.multiprocess
    environment = {**engine_environment(hardware), "VLLM_ENABLE_V1_MULTIPROCESSING": "1" if multiprocess else "0"}
    if multiprocess or jobs[0].settings.tensor_parallel_size > 1:
        # Lets our own function that counts KV bytes travel to the engine's processes; they are our children.
        environment["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    return environment


def _read_events(channel: int, silence_limit_s: float) -> Iterator[dict[str, Any]]:
    """Yield the worker's events until it closes its end. Raises TimeoutError when it is silent for too long.

    Until the first event it imports vLLM, which on a cold disk or a busy machine takes longer than a small engine.
    """
    pending, limit_s = b"", max(silence_limit_s, _START_LIMIT_S)
    with selectors.DefaultSelector() as selector:
        selector.register(channel, selectors.EVENT_READ)
        while True:
            if not selector.select(limit_s):
                raise TimeoutError(f"silent for {limit_s:.0f} s")
            limit_s = silence_limit_s
            chunk = os.read(channel, 1 << 16)
            if not chunk:
                return
            *lines, pending = (pending + chunk).split(b"\n")
            yield from (json.loads(line) for line in lines)


def _ask_where(process: "subprocess.Popen[bytes]") -> None:
    """Abort a group that hangs: Python's fault handler then writes into the logs where it stood."""
    with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
        os.killpg(process.pid, signal.SIGABRT)
        process.wait(_ABORT_LIMIT_S)


def _end_group(process: "subprocess.Popen[bytes]") -> None:
    """End the worker and every process it started, and wait until they are gone: what still runs would disturb the next engine."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    end = time.monotonic() + _GONE_LIMIT_S
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() < end:
            os.killpg(process.pid, 0)
            time.sleep(0.05)


class Attempt:
    """One worker process over some jobs; those that are left in `jobs` at its end gave no result."""

    def __init__(self, jobs: Sequence[EngineJob], folder: Path, silence_limit_s: float, *, forked: bool) -> None:
        """Write the jobs into `folder`, which exists and will take the logs."""
        self.jobs = {j.name: j for j in jobs}
        self.forked = forked
        self.silence_limit_s = silence_limit_s
        self.worker_log = folder / "worker.log"
        self.jobs_path = folder / "jobs.json"
        self.jobs_path.write_text(json.dumps([j.to_json() for j in jobs]))
        self.failures: dict[str, str] = {}
        self.was_ready = False
        self.was_silent = False

    def run(self, take: Callable[[EngineJob, dict[str, Any]], None], hardware: Hardware) -> None:
        """Run the worker to its end, handing each result to `take` as it comes; what failed or hung is in `failures`.

        Raises:
            EngineRefusedError: the worker says that the engine can't run the jobs at all.
        """
        read_end, write_end = os.pipe()
        environment = _build_environment(list(self.jobs.values()), hardware)
        with self.worker_log.open("wb") as log_file:
            process = subprocess.Popen(
                worker_command(self.jobs_path, write_end, forked=self.forked),
                stdin=subprocess.DEVNULL,
                stdout=log_file,
                stderr=log_file,
                env=environment,
                pass_fds=(write_end,),
                start_new_session=True,
            )
        os.close(write_end)
        current = next(iter(self.jobs))
        try:
            for event in _read_events(read_end, self.silence_limit_s):
                if event["event"] == "start":
                    current, self.was_ready = event["name"], True
                elif event["event"] == "refused":
                    raise EngineRefusedError(event["reason"])
                elif event["event"] == "result":
                    take(self.jobs.pop(event["result"]["name"]), event["result"])
                elif event["event"] == "failed":
                    self.failures[event["name"]] = event["reason"]
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_EXIT_LIMIT_S)  # its own status says more than the signal that ends what it left
        except TimeoutError as error:
            self.was_silent = True
            _ask_where(process)
            self.failures[current] = f"the worker was {error} and was ended"
        finally:
            os.close(read_end)
            _end_group(process)
        if self.jobs and not self.failures:
            unexplained = current if current in self.jobs else next(iter(self.jobs))
            self.failures[unexplained] = f"the worker {describe_status(process.returncode)}"


def describe_status(status: int) -> str:
    """Return what became of a process, as words: "exited with status 1", "was ended by SIGKILL (...)"."""
    if status >= 0:
        return f"exited with status {status}"
    name = signal.Signals(-status).name
    # Nothing else of ours sends this signal: on a machine without enough memory the kernel does.
    hint = "; most likely the machine ran out of memory" if -status == signal.SIGKILL else ""
    return f"was ended by {name}{hint}"
