"""Workers that really crash, hang and run out of memory: the real worker and client, with made-up engines in them."""

import os
import signal
import sys
import textwrap
from pathlib import Path

import pytest
from running import is_running

from puzzle_dag.engine import client, watchdog
from puzzle_dag.engine.client import run_engines
from puzzle_dag.engine.failures import EngineFailedError
from puzzle_dag.engine.jobs import EngineJob, EngineSettings, Workload
from puzzle_dag.engine.process import WorkerProcess
from puzzle_dag.engine.standby import find_standby
from puzzle_dag.engine.watchdog import EngineRefusedError, log_path

SILENCE_S = 8.0
HANG_S = 3.0
"""A shorter limit, where nothing but hanging is slow."""
# What becomes of a job is its name's first word; nothing of vLLM is imported, all else is the worker's own.
SCRIPT = """
import ctypes, os, resource, sys, time
from pathlib import Path
from puzzle_dag.engine import worker

def import_engine():
    pass

def find_refusal(jobs):
    if jobs[0].name == "quits":
        print("the worker says goodbye", flush=True)
        os._exit(3)
    return "head_dim is 30; 32 and 64 are done" if jobs[0].name.startswith("refused") else None

class Engine:
    def __init__(self, name):
        self.name = name

    def __del__(self):
        with open(os.environ["TRIES"] + "-freed", "a") as f:
            f.write(f"{self.name}\\n")

def measure(job, channel, engines):
    kind = job.name.split("-")[0]
    engines.append(Engine(job.name))
    with open(os.environ["TRIES"], "a") as f:
        f.write(f"{job.name} {os.getpid()} {os.getppid()}\\n")
    print(f"this is the log of {job.name}", flush=True)
    if kind == "crash":
        ctypes.string_at(0)
    if kind == "hang" or kind == "stuck" and open(os.environ["TRIES"]).read().count(job.name + " ") == 1:
        time.sleep(600)
    if kind == "memory":
        resource.setrlimit(resource.RLIMIT_AS, (2**33, 2**33))
        bytearray(2**36)
    if kind == "once" and open(os.environ["TRIES"]).read().count(job.name + " ") == 1:
        os.kill(os.getpid(), 9)
    times = [{"batch": 1, "prefill_s": [0.1, 0.1], "total_s": [0.2, 0.2]}]
    return {"name": job.name, "times": times, "weight_bytes": None, "kv_bytes_per_token": 0, "kv_capacity_tokens": 0,
            "peak_rss_bytes": 1, "start_s": 0.0}

worker._import_engine, worker._find_refusal, worker._measure = import_engine, find_refusal, measure
worker.main(sys.argv[1:])
"""


@pytest.fixture
def tries(monkeypatch, tmp_path):
    """The real worker with made-up engines; returns a function that lists the tries as (job, process, parent)."""
    script, counted = tmp_path / "worker.py", tmp_path / "tries"
    script.write_text(textwrap.dedent(SCRIPT))
    counted.touch()
    real = watchdog.worker_command

    def command(path: Path, channel: int, *, forked: bool) -> list[str]:
        return [sys.executable, str(script), *real(path, channel, forked=forked)[3:]]

    monkeypatch.setattr(watchdog, "worker_command", command)
    monkeypatch.setenv("TRIES", str(counted))
    return lambda: [tuple(line.split()) for line in counted.read_text().splitlines()]


def make_jobs(*names: str) -> list[EngineJob]:
    workload = Workload(input_length=8, output_length=4, batch_sizes=(1,), repeats=2)
    return [EngineJob(name=n, config={"model": n}, settings=EngineSettings(), workload=workload) for n in names]


def test_a_crash_a_hang_and_too_little_memory_lose_no_other_and_come_with_their_logs(tries, tmp_path):
    names = ("good-1", "crash", "hang", "memory", "once", "good/2")
    seen = []
    with pytest.raises(EngineFailedError) as caught:
        run_engines(make_jobs(*names), on_result=lambda j, r: seen.append(j.name), silence_limit_s=SILENCE_S, log_folder=tmp_path / "logs")
    assert sorted(seen) == ["good-1", "good/2", "once"]
    counts = {n: sum(job == n for job, *_ in tries()) for n in names}
    assert counts == {"good-1": 1, "crash": 2, "hang": 2, "memory": 2, "once": 2, "good/2": 1}
    failures = {f.name: f for f in caught.value.failures}
    assert set(failures) == {"crash", "hang", "memory"}
    for name, failure in failures.items():
        assert failure.log == log_path(tmp_path / "logs", name) and f"this is the log of {name}" in failure.log.read_text()
        assert str(failure.log) in str(caught.value)
    assert "was ended by SIGSEGV" in failures["crash"].reason and "Segmentation fault" in failures["crash"].tail
    assert f"silent for {SILENCE_S:.0f} s" in failures["hang"].reason and "in measure" in failures["hang"].tail, "it says where it stood"
    assert "MemoryError" in failures["memory"].reason and "lower the target's `batch_sizes`" in failures["memory"].describe()
    assert "of 6 engines 3 gave results" in str(caught.value)


def test_forks_share_a_worker_and_a_process_each_shares_nothing(tries):
    results = run_engines(make_jobs("a", "once", "b"), silence_limit_s=60.0)
    assert [r.name for r in results] == ["a", "once", "b"]
    forked = tries()
    # the job that crashed waits for the others, and has then a worker of its own
    assert [job for job, *_ in forked] == ["a", "once", "b", "once"] and len({parent for *_, parent in forked[:3]}) == 1
    run_engines(make_jobs("c", "d"), silence_limit_s=60.0, process_each=True)
    alone = tries()[len(forked) :]
    assert [job for job, *_ in alone] == ["c", "d"] and len({process for _, process, _ in alone}) == 2
    assert len({parent for *_, parent in alone}) == 1, "both were started by this process, not by a worker"


def test_a_fork_ends_without_freeing_its_engine(tries, tmp_path):
    run_engines(make_jobs("a", "b"), silence_limit_s=60.0)
    assert not (tmp_path / "tries-freed").exists(), "vLLM's collections of the heap take longer than a small engine's start"
    run_engines(make_jobs("c"), silence_limit_s=60.0, process_each=True)
    assert (tmp_path / "tries-freed").read_text() == "c\n", "a worker of its own ends its engine as any program does"


def test_a_process_each_survives_what_crashes_the_worker(tries, tmp_path):
    seen = []
    with pytest.raises(
        EngineFailedError, match=r"(?s)'crash' failed twice: the worker was ended by SIGSEGV.*this is the log of crash"
    ) as caught:
        run_engines(
            make_jobs("crash", "good"),
            on_result=lambda j, r: seen.append(j.name),
            process_each=True,
            log_folder=tmp_path,
            silence_limit_s=60.0,
        )
    assert seen == ["good"] and [f.name for f in caught.value.failures] == ["crash"]
    assert [job for job, *_ in tries()] == ["crash", "good", "crash"]


def test_what_is_not_to_be_tried_again_is_not(tries, tmp_path):
    with pytest.raises(EngineFailedError, match="'crash' failed once"):
        run_engines(make_jobs("crash", "good"), silence_limit_s=60.0, retry=False, log_folder=tmp_path)
    assert [job for job, *_ in tries()] == ["crash", "good"]


def test_engines_that_hang_first_lose_none_of_the_sound_ones(tries):
    """Three hang before any gave a result; each hangs once only, so all have a result in the end."""
    names = ("stuck-1", "stuck-2", "stuck-3", "good")
    results = run_engines(make_jobs(*names), silence_limit_s=HANG_S)
    assert [r.name for r in results] == list(names)
    assert [job for job, *_ in tries()] == [*names, "stuck-1", "stuck-2", "stuck-3"]


def test_what_the_engine_refuses_is_not_tried(tries):
    with pytest.raises(EngineRefusedError, match="head_dim is 30; 32 and 64 are done"):
        run_engines(make_jobs("refused", "good"), silence_limit_s=60.0)
    assert tries() == []


def test_a_worker_that_cannot_start_is_given_up(monkeypatch, tmp_path):
    monkeypatch.setattr(watchdog, "worker_command", lambda *_, **__: [sys.executable, "-c", "import no_such_engine"])
    with pytest.raises(EngineFailedError, match=r"(?s)'a' failed once.*exited with status 1.*No module named 'no_such_engine'") as caught:
        run_engines(make_jobs(*"abcdefgh"), log_folder=tmp_path, silence_limit_s=60.0)
    assert [f.name for f in caught.value.failures] == ["a", "b", "c"] and caught.value.never_tried == tuple("defgh")


def test_results_say_when_and_with_what_they_were_measured(tries):
    (result,) = run_engines(make_jobs("good"), silence_limit_s=60.0)
    assert result.measured_at is not None and result.measured_at.endswith("+00:00")
    assert result.package is not None and result.package.startswith(client.read_package_version().split()[0])


def find_workers(counted) -> list[int]:
    return [int(parent) for *_, parent in counted]


def test_while_standby_is_kept_one_worker_runs_all_that_is_asked_for(tries, tmp_path):
    with find_standby().keep():
        run_engines(make_jobs("a", "b"), silence_limit_s=60.0)
        with find_standby().keep():
            run_engines(make_jobs("c"), silence_limit_s=60.0)
        run_engines(make_jobs("d"), silence_limit_s=60.0)
        workers = set(find_workers(tries()))
        assert [job for job, *_ in tries()] == ["a", "b", "c", "d"] and len(workers) == 1 and is_running(*workers)
    assert not is_running(*workers), "it ends with the last who keeps it"
    run_engines(make_jobs("f"), silence_limit_s=60.0)
    run_engines(make_jobs("g"), silence_limit_s=60.0)
    assert len(set(find_workers(tries()))) == 3 and not any(map(is_running, find_workers(tries())))


def test_after_a_failure_a_worker_is_on_standby_no_more(tries, tmp_path):
    with find_standby().keep():
        run_engines(make_jobs("a", "once", "b"), silence_limit_s=60.0)
        first, *_, second = find_workers(tries())
        assert first != second and not is_running(first) and is_running(second), "the second try was in another worker, which was sound"
        with pytest.raises(EngineFailedError, match="silent for"):
            run_engines(make_jobs("hang", "c"), silence_limit_s=SILENCE_S, log_folder=tmp_path / "logs")
        assert not any(map(is_running, find_workers(tries())))


@pytest.mark.parametrize("is_noticed", [True, False])
def test_a_worker_that_died_on_standby_costs_no_job_a_try(tries, monkeypatch, is_noticed):
    with find_standby().keep():
        run_engines(make_jobs("b"), silence_limit_s=60.0)
        waiting = find_workers(tries())[-1]
        os.kill(waiting, signal.SIGKILL)
        if not is_noticed:
            monkeypatch.setattr(WorkerProcess, "status", None)
        run_engines(make_jobs("c"), silence_limit_s=60.0, retry=False)
        assert [job for job, *_ in tries()] == ["b", "c"] and find_workers(tries())[-1] != waiting


def test_a_worker_of_another_environment_does_not_stand_in(tries, monkeypatch):
    with find_standby().keep():
        run_engines(make_jobs("a"), silence_limit_s=60.0)
        monkeypatch.setenv("OMP_SCHEDULE", "static")
        run_engines(make_jobs("b"), silence_limit_s=60.0)
        first, second = find_workers(tries())
        assert first != second and not is_running(first) and is_running(second)


def test_a_worker_on_standby_logs_beside_the_jobs_it_was_given(tries, tmp_path):
    with find_standby().keep():
        run_engines(make_jobs("a"), silence_limit_s=60.0)
        with pytest.raises(EngineFailedError) as caught:
            run_engines(make_jobs("quits"), silence_limit_s=60.0, log_folder=tmp_path / "logs")
    assert "the worker says goodbye" in caught.value.failures[0].tail
