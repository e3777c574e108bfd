"""How many turns parent and child are served: further ones only where their noise leaves the speed-up open."""

import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from micro_project import Project
from ticking_engine import TickingEngine

from puzzle_dag.children.serve import PRECISION, ServingReport, measure_serving
from puzzle_dag.config import ConfigError, Target
from puzzle_dag.engine.failures import EngineFailedError
from puzzle_dag.engine.jobs import EngineJob
from puzzle_dag.paired_ratio import estimate_ratio, turns_for

TARGET = Target(version=1, name="noisy", hardware="local-cpu", input_length=16, output_length=8, batch_sizes=(1, 4))
FAST = "micro-fast"


@pytest.mark.parametrize(
    ("turns", "error", "wanted", "most", "found"),
    [
        (5, 0.04, 0.05, 20, 5),  # told well enough
        (5, 0.06, 0.05, 20, 8),  # 5 * 1.44, rounded up
        (5, 0.051, 0.05, 20, 6),  # one more at the least
        (5, 0.50, 0.05, 20, 10),  # twice as many at once
        (5, 0.50, 0.05, 7, 7),
        (5, 0.50, 0.05, 5, 5),
        (5, 0.01, 0.0, 20, 10),  # as little as can be
        (5, 0.0, 0.0, 20, 5),
    ],
)
def test_turns_grow_with_the_square_of_the_error(turns: int, error: float, wanted: float, most: int, found: int) -> None:
    assert turns_for(turns, error, wanted, most) == found


@given(st.integers(3, 9), st.floats(0, 1), st.floats(0, 1), st.integers(0, 20))
def test_asking_again_and_again_ends(turns: int, error: float, wanted: float, more: int) -> None:
    most, asked = turns + more, 0
    while (found := turns_for(turns, error, wanted, most)) > turns:
        turns, asked = found, asked + 1
        assert turns <= most and asked <= 20


class Noisy(TickingEngine):
    """Takes the child's engines up and down by `spread`, by turns of the seed."""

    spread = 0.0

    def slowness(self, job: EngineJob, config: dict[str, Any]) -> float:
        return math.exp(self.spread * (-1) ** job.seed) if job.name.startswith("child/") else 1.0


def serve(folder: Path, spread: float, monkeypatch: pytest.MonkeyPatch, **turns: int) -> tuple[ServingReport, Noisy]:
    engine = Noisy()
    engine.spread = spread
    with monkeypatch.context() as patch:
        engine.install(patch)
        return measure_serving(folder, {"child": folder}, TARGET, **turns), engine


def test_a_quiet_machine_needs_none(micro_parent_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report, engine = serve(micro_parent_folder, 0.01, monkeypatch, engines=5, further_engines=5)
    assert len(engine.jobs) == 10 and {m.num_engines for m in report.models} == {5}
    assert report.speedup_of("child", 4).reach <= math.log1p(PRECISION)


def test_a_restless_one_gets_them_and_the_interval_is_of_all(micro_parent_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report, engine = serve(micro_parent_folder, 0.06, monkeypatch, engines=4, further_engines=8)
    number = report.of("child", 4).num_engines
    assert 4 < number <= 12 and len(engine.jobs) == 2 * number
    assert [job.name for job in engine.jobs] == [f"{name}/{turn}" for turn in range(number) for name in ("parent", "child")]
    for batch in TARGET.batch_sizes:
        found = report.speedup_of("child", batch)
        child_s = [math.exp(0.06 * (-1) ** turn) for turn in range(number)]
        assert (found.speedup, found.low, found.high) == pytest.approx(estimate_ratio([1.0] * number, child_s), rel=1e-6)
    assert report.speedup_of("child", 4).reach <= math.log1p(PRECISION) or number == 12


def test_they_end_at_the_most_there_may_be(micro_parent_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report, engine = serve(micro_parent_folder, 0.5, monkeypatch, engines=3, further_engines=4)
    assert report.of("parent", 1).num_engines == 7 and len(engine.jobs) == 14
    report, engine = serve(micro_parent_folder, 0.5, monkeypatch, engines=3)
    assert report.of("parent", 1).num_engines == 3


def test_the_parent_alone_has_no_speed_up_to_tell(micro_parent_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Noisy()
    with monkeypatch.context() as patch:
        engine.install(patch)
        report = measure_serving(micro_parent_folder, {}, TARGET, engines=3, further_engines=9)
    assert report.speedups == () and len(engine.jobs) == 3


def test_where_further_turns_fail_the_first_tell(micro_parent_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Noisy(dies_after=7, dies_of=EngineFailedError((), num_jobs=4, num_done=1))
    engine.spread = 0.5
    with monkeypatch.context() as patch:
        engine.install(patch)
        report = measure_serving(micro_parent_folder, {"child": micro_parent_folder}, TARGET, engines=3, further_engines=2)
    assert {m.num_engines for m in report.models} == {3} and len(engine.jobs) == 7


def served_turns(project: Project, scenario: str) -> int:
    return project.rows(f"SELECT max(num_engines) FROM serving WHERE scenario = '{scenario}'")[0][0]


def test_a_scenario_that_bounds_no_time_is_served_as_often_as_the_profile_says(project: Project, engine: TickingEngine) -> None:
    engine.unsteadiness = 0.2
    path = project.root / "conf" / "scenarios" / f"{FAST}.yaml"
    content = yaml.safe_load((path.parent / "micro-small.yaml").read_text())
    path.write_text(yaml.safe_dump({**content, "constraints": {"throughput_tokens_per_s": {"at_least": 1.01, "relative_to": "parent"}}}))
    project.edit(project.profile_file, scenarios=["micro-small", FAST], serving={"turns": 4, "further_turns": 2})
    assert project.refresh().ok
    assert (served_turns(project, "micro-small"), served_turns(project, FAST)) == (4, 6) and project.refresh().ran == []


def test_a_first_bound_on_time_serves_the_same_child_anew(project: Project, engine: TickingEngine) -> None:
    constraints = yaml.safe_load((project.root / "conf" / "scenarios" / "micro-small.yaml").read_text())["constraints"]
    loose = {"throughput_tokens_per_s": {"at_least": 1.0}}
    project.edit(project.root / "conf" / "scenarios" / "micro-small.yaml", constraints={**constraints, **loose})
    record = project.refresh()
    assert "serving[micro-small]" in record.ran and not [item for item in record.ran if item.startswith(("child", "uptrained_child"))]
    assert served_turns(project, "micro-small") == 6 and project.refresh().ran == []


def test_fewer_than_none_is_refused(project: Project) -> None:
    project.edit(project.profile_file, serving={"further_turns": -1})
    with pytest.raises(ConfigError, match=r"micro\.yaml.*serving\.further_turns"):
        project.refresh()
