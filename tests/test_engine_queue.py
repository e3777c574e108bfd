"""Which engine is tried next where some fail: the queue alone, driven by made-up attempts; real workers have their own tests."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from puzzle_dag.engine.jobs import EngineJob, EngineSettings, Workload
from puzzle_dag.engine.queue import EngineQueue
from puzzle_dag.engine.watchdog import Attempt, log_path

WORKLOAD = Workload(input_length=8, output_length=4, batch_sizes=(1,), repeats=2)


def make_jobs(*names: str) -> list[EngineJob]:
    """One model a name; after "#" stands the number of a further engine, after "*" the model's layers."""
    jobs = []
    for name in names:
        model, _, layers = name.partition("#")[0].partition("*")
        config = {"model": model, "num_hidden_layers": int(layers or 1)}
        jobs.append(EngineJob(name=name, config=config, settings=EngineSettings(), workload=WORKLOAD))
    return jobs


def drive(jobs: Sequence[EngineJob], folder: Path, becomes: Callable[[str, int], str], *, retry: bool = True, num_each: int | None = None):
    """Play a queue to its end. `becomes(name, try)` says "good", "crash", "hang" or "unstarted"; returns the queue, results, tries."""
    queue, results, tries = EngineQueue(jobs, folder, folder / "kept", retry=retry), [], []
    while queue.waiting:
        taken = [queue.waiting.popleft() for _ in range(num_each or len(queue.waiting))]
        attempt = Attempt(taken, folder, 300.0, forked=num_each is None)
        for job in taken:
            fate = becomes(job.name, tries.count(job.name) + 1)
            attempt.was_ready = fate != "unstarted"
            if fate != "unstarted":
                tries.append(job.name)
                log_path(folder, job.name).write_text(f"try {tries.count(job.name)} of {job.name}")
            if fate == "good":
                results.append(job.name)
                del attempt.jobs[job.name]
            else:
                attempt.failures[job.name] = fate
                attempt.worker_log.write_text(f"worker of {job.name}")
                attempt.was_silent = fate == "hang"
            if fate in ("hang", "unstarted"):
                break
        queue.settle(attempt, any_result=bool(results))
        assert len(tries) <= 100, "it must end"
    return queue, results, tries


def by_kind(name: str, _: int) -> str:
    return name.partition("-")[0]


@pytest.mark.parametrize("num_each", [None, 1])
@pytest.mark.parametrize("num_hanging", range(7))
def test_no_sound_model_is_lost_wherever_the_hanging_ones_stand(tmp_path: Path, num_hanging: int, num_each: int | None) -> None:
    names = [f"hang-{i}" for i in range(num_hanging)] + ["good-1", "crash-1", "good-2", "good-1#2", "good-2#2"]
    for order in (names, names[::-1], sorted(names, key=lambda n: n[-1])):
        queue, results, tries = drive(make_jobs(*order), tmp_path, by_kind, num_each=num_each)
        assert sorted(results) == ["good-1", "good-1#2", "good-2", "good-2#2"]
        assert all(tries.count(n) == (1 if n.startswith("good") else 2) for n in names)
        assert {f.name for f in queue.failures} == {n for n in names if not n.startswith("good")}
        assert all(f.num_tries == 2 and f.tail == f"{'worker' if num_each else 'try 2'} of {f.name}" for f in queue.failures)
        assert queue.never_tried == ()


def test_where_all_hang_each_model_is_tried_the_smallest_twice_and_all_are_named(tmp_path: Path) -> None:
    names = ("hang-a*5", "hang-b*2", "hang-c*9", "hang-d*8", "hang-e*4", "hang-a*5#2", "hang-b*2#2", "hang-e*4#2")
    queue, results, tries = drive(make_jobs(*names), tmp_path, by_kind)
    assert results == [] and tries == ["hang-a*5", "hang-b*2", "hang-c*9", "hang-e*4", "hang-d*8", "hang-b*2"]
    assert {f.name: f.num_tries for f in queue.failures} == {n: 2 if n == "hang-b*2" else 1 for n in tries}
    assert all(f.log == log_path(tmp_path / "kept", f.name) and f.name in f.tail for f in queue.failures)
    assert queue.never_tried == ("hang-a*5#2", "hang-b*2#2", "hang-e*4#2")


def test_a_machine_that_hung_for_a_while_gives_all_results_in_the_end(tmp_path: Path) -> None:
    tried: list[str] = []

    def becomes(name: str, _: int) -> str:
        tried.append(name)
        return "hang" if len(tried) <= 5 else "good"  # every model once; the first second try works

    names = [f"m-{i}" for i in range(5)] + [f"m-{i}#2" for i in range(5)]
    queue, results, _ = drive(make_jobs(*names), tmp_path, becomes)
    assert sorted(results) == sorted(names) and queue.failures == [] and queue.never_tried == ()


def test_what_is_tried_once_only_is_not_tried_again_and_loses_nothing(tmp_path: Path) -> None:
    names = ("hang-1", "hang-2", "hang-3", "hang-4", "good-1")
    queue, results, tries = drive(make_jobs(*names), tmp_path, by_kind, retry=False)
    assert results == ["good-1"] and tries == list(names)
    assert [(f.name, f.num_tries) for f in queue.failures] == [(f"hang-{i}", 1) for i in range(1, 5)] and queue.never_tried == ()


def test_a_worker_that_never_starts_is_not_waited_for_once_a_model(tmp_path: Path) -> None:
    queue, results, tries = drive(make_jobs(*"abcdefgh"), tmp_path, lambda *_: "unstarted")
    assert results == tries == [] and [f.name for f in queue.failures] == ["a", "b", "c"]
    assert queue.never_tried == tuple("defgh") and all("worker of" in f.tail for f in queue.failures)
