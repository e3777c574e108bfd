"""One worker under watch: its events are read as they come, and it is ended when it falls silent."""

import json
import re
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from puzzle_dag.engine.environment import engine_environment
from puzzle_dag.engine.hardware import Hardware
from puzzle_dag.engine.jobs import EngineJob
from puzzle_dag.engine.process import WorkerProcess
from puzzle_dag.engine.standby import find_standby

_LOG_TAIL_LINES = 40


class EngineRefusedError(ValueError):
    """The engine can't run what is asked for, whatever is tried; known before any engine was started."""


def worker_command(jobs_path: Path, channel: int, *, forked: bool) -> list[str]:
    """Return the command line of a worker that runs the jobs in a file and sends events to a file descriptor.

    Args:
        jobs_path: JSON list of jobs; the engines' logs go into its folder.
        channel: file descriptor for events.
        forked: each engine in a fork of the worker, which then reads paths of further files from its input; otherwise in
            the worker itself, which gets one job.
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


class Attempt:
    """One worker over some jobs; those that are left in `jobs` at its end gave no result."""

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
        self._current = next(iter(self.jobs))

    def run(self, take: Callable[[EngineJob, dict[str, Any]], None], hardware: Hardware) -> None:
        """Let a worker run the jobs, the one on standby or a new one, handing each result to `take` as it comes.

        What failed or hung is in `failures`.

        Raises:
            EngineRefusedError: the worker says that the engine can't run the jobs at all.
        """
        environment = _build_environment(list(self.jobs.values()), hardware)
        worker = find_standby().find(environment) if self.forked else None
        if worker is not None:
            worker.give(self.jobs_path)
        if worker is None or not self._follow(worker, take):  # or it died while it waited, and tried none of the jobs
            worker = WorkerProcess(lambda fd: worker_command(self.jobs_path, fd, forked=self.forked), self.worker_log, environment)
            self._follow(worker, take)
        if self.jobs and not self.failures:
            unexplained = self._current if self._current in self.jobs else next(iter(self.jobs))
            self.failures[unexplained] = f"the worker {describe_status(worker.status or 0)}"

    def _follow(self, worker: WorkerProcess, take: Callable[[EngineJob, dict[str, Any]], None]) -> bool:
        """Heed a worker's events until it is done; it is then on standby, or ended. Return False where it said nothing before it ended.

        After a failure it is ended: what crashed may have left processes behind, and the second try is to be in another.
        """
        has_spoken = is_done = is_on_standby = False
        try:
            for event in worker.read_events(self.silence_limit_s):
                has_spoken, is_done = True, event["event"] == "done"
                if is_done:
                    break
                self._heed(event, take)
            if not is_done:
                worker.let_exit()
            elif not self.failures:
                is_on_standby = find_standby().give_back(worker)
        except TimeoutError as error:
            self.was_silent = True
            worker.ask_where()
            self.failures[self._current] = f"the worker was {error} and was ended"
        finally:
            if not is_on_standby:
                worker.end()
        return has_spoken or self.was_silent

    def _heed(self, event: dict[str, Any], take: Callable[[EngineJob, dict[str, Any]], None]) -> None:
        if event["event"] == "start":
            self._current, self.was_ready = event["name"], True
        elif event["event"] == "refused":
            raise EngineRefusedError(event["reason"])
        elif event["event"] == "result":
            take(self.jobs.pop(event["result"]["name"]), event["result"])
        elif event["event"] == "failed":
            self.failures[event["name"]] = event["reason"]


def describe_status(status: int) -> str:
    """Return what became of a process, as words: "exited with status 1", "was ended by SIGKILL (...)"."""
    if status >= 0:
        return f"exited with status {status}"
    name = signal.Signals(-status).name
    # Nothing else of ours sends this signal: on a machine without enough memory the kernel does.
    hint = "; most likely the machine ran out of memory" if -status == signal.SIGKILL else ""
    return f"was ended by {name}{hint}"
