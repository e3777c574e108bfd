"""Parent and child in turns: real vLLM with dummy weights, and which engines a made-up one is asked for."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ticking_engine import TickingEngine
from transformers import AutoConfig

from puzzle_dag.architecture import Architecture, Block
from puzzle_dag.config import Target
from puzzle_dag.costs.trial import Role, Timed, Turns, measure_in_turns
from puzzle_dag.engine.failures import EngineFailedError
from puzzle_dag.engine.hardware import HardwareMismatchError, detect_hardware
from puzzle_dag.model.configuration_puzzle_dag import PuzzleDagConfig
from puzzle_dag.model.families import to_puzzle_dag_config
from puzzle_dag.store import ArtifactStore

PARENT = (Block.parse("kv4/w128"),) * 2
CHILD = (Block.parse("kv1/w64"), Block.parse("noop/linear"))
OTHER = (Block.parse("kv1/w64"), Block.parse("kv4/w64"))
FIELDS = {"version": 1, "name": "micro", "hardware": "local-cpu", "input_length": 16, "output_length": 4, "batch_sizes": (1, 2, 4)}
TARGET = Target.model_validate(FIELDS)


@pytest.fixture
def shape(micro_parent_folder: Path) -> PuzzleDagConfig:
    return to_puzzle_dag_config(AutoConfig.from_pretrained(micro_parent_folder))


def measure(
    shape: PuzzleDagConfig, store: ArtifactStore, child: Architecture = CHILD, *, parent_batches: tuple[int, ...] = (4, 2), **options: Any
) -> Turns:
    models: dict[Role, Timed] = {"child": Timed(child, [2, 2])}
    if parent_batches:
        models["parent"] = Timed(PARENT, parent_batches)
    return measure_in_turns(shape, models, TARGET, store, turns=3, repeats=2, **options)


def test_real_engines_run_in_turns_and_only_once(shape: PuzzleDagConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("vllm")
    if detect_hardware().kind != "cpu":
        pytest.skip("the target of this test is the local CPU")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    store = ArtifactStore(tmp_path / "store")
    turns = measure(shape, store, parent_batches=(2,))
    assert len(turns.child_s(2, "total")) == len(turns.parent_s(2, "prefill")) == 3
    assert all(
        p + d == pytest.approx(t, rel=0.5) for p, d, t in zip(*(turns.child_s(2, x) for x in ("prefill", "decode", "total")), strict=True)
    )
    assert turns.child[0].kv_bytes_per_token < turns.parent[0].kv_bytes_per_token and turns.peak_rss_bytes > 0
    with monkeypatch.context() as patch:
        ticking = TickingEngine()
        ticking.install(patch)
        assert measure(shape, store, parent_batches=(2,)) == turns and ticking.jobs == []


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> TickingEngine:
    found = TickingEngine()
    found.install(monkeypatch)
    return found


def test_turns_alternate_at_the_batch_sizes_that_are_needed(shape: PuzzleDagConfig, engine: TickingEngine, tmp_path: Path) -> None:
    measure(shape, ArtifactStore(tmp_path))
    batches = [job.workload.batch_sizes for job in engine.jobs]
    assert batches == [(2, 4), (2,)] * 3 and [job.seed for job in engine.jobs] == [0, 0, 1, 1, 2, 2]


def test_a_parent_counts_beside_one_child_only(shape: PuzzleDagConfig, engine: TickingEngine, tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    first = measure(shape, store)
    engine.jobs.clear()
    measure(shape, store, OTHER)
    assert len(engine.jobs) == 6
    engine.jobs.clear()
    assert measure(shape, store) == first and not engine.jobs
    measure(shape, store, remeasure=True)
    assert len(engine.jobs) == 6


def up_to(*wanted: int) -> Callable[[Turns], int]:
    """Return what wants so many turns, one after the other; being asked once more fails the test."""
    left = list(wanted)
    return lambda _: left.pop(0)


def test_further_turns_are_run_until_no_more_are_wanted(shape: PuzzleDagConfig, engine: TickingEngine, tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    few = measure(shape, store)
    engine.jobs.clear()
    more = measure(shape, store, turns_wanted=up_to(4, 6, 6))
    assert [job.seed for job in engine.jobs] == [3, 3, 4, 4, 5, 5] and len({job.name for job in engine.jobs}) == 6
    assert len(more.child) == len(more.parent) == 6 and more.child_s(2, "total")[:3] == few.child_s(2, "total")
    engine.jobs.clear()
    assert measure(shape, store, turns_wanted=up_to(6, 1)) == more and not engine.jobs, "what was run is in the store"
    measure(shape, store, turns_wanted=up_to(5, 5), remeasure=True)
    assert len(engine.jobs) == 10, "each engine once, also where turns are added"


def test_where_further_turns_fail_the_first_tell(shape: PuzzleDagConfig, engine: TickingEngine, tmp_path: Path) -> None:
    engine.dies_after, engine.dies_of = 8, EngineFailedError((), num_jobs=6, num_done=2)
    found = measure(shape, ArtifactStore(tmp_path), turns_wanted=up_to(6))
    assert len(found.child) == len(found.parent) == 3
    engine.dies_after = 2
    with pytest.raises(EngineFailedError):
        measure(shape, ArtifactStore(tmp_path / "other"))


def test_without_a_relative_bound_the_parent_is_left_out(shape: PuzzleDagConfig, engine: TickingEngine, tmp_path: Path) -> None:
    turns = measure(shape, ArtifactStore(tmp_path), parent_batches=())
    assert len(engine.jobs) == 3 and turns.parent == () and len(turns.child_s(2, "decode")) == 3


def test_other_hardware_is_refused(shape: PuzzleDagConfig, engine: TickingEngine, tmp_path: Path) -> None:
    gpu = TARGET.model_copy(update={"hardware": "rtx4090"})
    with pytest.raises(HardwareMismatchError):
        measure_in_turns(shape, {"child": Timed(CHILD, [2])}, gpu, ArtifactStore(tmp_path), turns=3, repeats=2)
    assert not engine.jobs
