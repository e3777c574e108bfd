"""How a refresh deals with failures, selections, failed checks and bad input, on the library's part of the graph."""

import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from micro_project import CHECKOUT, Project, make_project

from assets.__main__ import _parser, main
from assets.refresh import RefreshRecord
from assets.scenarios import add_scenario
from assets.status import describe_status
from puzzle_dag.config import ConfigError
from puzzle_dag.engine.client import VllmMissingError
from puzzle_dag.lease import lease
from puzzle_dag.library import build
from puzzle_dag.preflight import DiskFullError
from puzzle_dag.search import score
from resources.shelf import RecordMissingError, Shelf

FIRST = ("corpus", "parent", "search_space", "tokens", "parent_activations")
LIBRARY = (*FIRST, "block_library", "block_scores", "layer_group", "score_table")


@pytest.fixture(scope="module")
def started(micro_parent_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Project:
    made = make_project(tmp_path_factory.mktemp("refresh"), micro_parent_folder)
    record = made.refresh(select=FIRST)
    assert {o.item.asset for o in record.of("ran")} == set(FIRST)
    return made


def states(record: RefreshRecord, asset: str) -> list[str]:
    return [o.state for o in record.outcomes if o.item.asset == asset]


def failing(function: Callable[..., Any], error: Exception, times: int) -> tuple[Callable[..., Any], list[int]]:
    calls: list[int] = []

    def run(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) <= times:
            raise error
        return function(*args, **kwargs)

    return run, calls


def test_what_is_not_selected_keeps_what_follows_waiting(started: Project) -> None:
    record = started.refresh(select=["block_scores"])
    assert record.ran == [] and states(record, "block_library") == ["stale"] * 2
    assert states(record, "block_scores") == ["waits"] * 2 and states(record, "score_table") == ["waits"]
    assert "waits for block_library[L00]" in next(o for o in record.outcomes if str(o.item) == "block_scores[L00]").reasons[0]


def test_a_dry_run_changes_nothing(started: Project) -> None:
    with started.instance() as instance:
        before = instance.get_runs_count()
    record = started.refresh(dry=True)
    assert record.ran == [] and states(record, "block_library") == ["stale"] * 2
    with started.instance() as instance:
        assert instance.get_runs_count() == before


def test_the_status_of_what_never_ran_is_unknown(started: Project) -> None:
    with started.instance() as instance:
        lines = "\n".join(describe_status(started.root, "micro", instance)).splitlines()
    assert next(line for line in lines if "block_library[L00]" in line).split() == ["block_library[L00]", "never", "run", "unknown"]
    # So is all that is made from it; what is there already is no cause of anything.
    assert next(line for line in lines if line.startswith("score_table")).split() == ["score_table", "never", "run", "unknown"]
    assert not any("parent_activations" in line for line in lines)


def test_a_failure_is_tried_again_but_not_for_ever(started: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    run, calls = failing(build.build_layer, RuntimeError("out of luck"), times=100)
    monkeypatch.setattr(build, "build_layer", run)
    record = started.refresh(select=LIBRARY)
    assert states(record, "block_library") == ["failed"] * 2 and len(calls) == 4
    assert states(record, "block_scores") == ["waits"] * 2 and states(record, "layer_group") == ["waits"]
    assert not record.ok and "out of luck" in record.of("failed")[0].reasons[0]


def test_a_users_mistake_is_not_tried_again(started: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    run, calls = failing(build.build_layer, ValueError("no such thing"), times=100)
    monkeypatch.setattr(build, "build_layer", run)
    assert states(started.refresh(select=LIBRARY), "block_library") == ["failed"] * 2 and len(calls) == 2


def test_one_failure_is_got_over(started: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    run, calls = failing(build.build_layer, RuntimeError("out of luck"), times=1)
    monkeypatch.setattr(build, "build_layer", run)
    record = started.refresh(select=[*FIRST, "block_library"])
    assert record.ran == ["block_library[L00]", "block_library[L01]"] and len(calls) == 3


def test_a_failed_blocking_check_stops_what_follows_until_it_passes(started: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    import dataclasses

    sound = score.score_layer

    def unsound(*args: Any, **kwargs: Any) -> Any:
        return [dataclasses.replace(s, kl=s.kl + 0.5) for s in sound(*args, **kwargs)]

    started.refresh(select=[*FIRST, "block_library"])
    with monkeypatch.context() as patch:
        patch.setattr(score, "score_layer", unsound)
        record = started.refresh(select=LIBRARY)
        assert states(record, "layer_group") == ["waits"] and not record.ok
        assert set(record.failed_checks) == {"block_scores[L00]: sound", "block_scores[L01]: sound"}
    again = started.refresh(select=LIBRARY)
    assert again.ran == [] and states(again, "layer_group") == ["waits"]
    fixed = started.refresh(select=LIBRARY, remake=["block_scores"])
    assert fixed.ran == ["block_scores[L00]", "block_scores[L01]", "layer_group[G0]", "score_table"]
    assert not fixed.failed_checks


def test_remake_takes_one_partition(started: Project) -> None:
    started.refresh(select=LIBRARY)
    assert started.refresh(select=LIBRARY, remake=["block_scores[L01]"]).ran == ["block_scores[L01]"]


def test_an_unknown_asset_is_named(started: Project) -> None:
    with pytest.raises(ValueError, match=r"no asset 'block_librry'.*block_library"):
        started.refresh(select=["block_librry"])


@pytest.mark.parametrize(
    ("file", "edit", "message"),
    [
        ("profiles/micro.yaml", {"search_space__ffn": ["w256"]}, "wider than the parent"),
        ("profiles/micro.yaml", {"search_space__attention": ["kv3"]}, "can't be merged"),
        ("profiles/micro.yaml", {"targets": ["nowhere"]}, "nowhere.yaml does not exist"),
        ("scenarios/micro-small.yaml", {"target": "nowhere"}, "doesn't measure"),
        ("targets/micro-eager.yaml", {"input_length": -1}, "greater than 0"),
        ("targets/micro-eager.yaml", {"input_length": 4096}, "the parent takes at most"),
    ],
)
def test_bad_configuration_is_found_before_anything_runs(started: Project, file: str, edit: dict[str, Any], message: str) -> None:
    path = started.root / "conf" / file
    before = path.read_text()
    with started.instance() as instance:
        num_runs = instance.get_runs_count()
    try:
        started.edit(path, **edit)
        with pytest.raises(ConfigError, match=message):
            started.refresh()
    finally:
        path.write_text(before)
    with started.instance() as instance:
        assert instance.get_runs_count() == num_runs


def test_a_missing_engine_is_found_before_the_library_is_trained(started: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> str:
        raise VllmMissingError("vLLM is not installed; install it")

    monkeypatch.setattr("puzzle_dag.engine.client.read_engine_version", missing)
    with pytest.raises(VllmMissingError):
        started.refresh()
    assert started.refresh(select=["block_library"]).failed_checks == []  # nothing of it needs an engine


def test_a_full_disk_is_found_before_anything_is_written(
    micro_parent_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = make_project(tmp_path / "full", micro_parent_folder)
    monkeypatch.setattr("shutil.disk_usage", lambda _: namedtuple("usage", "total used free")(10, 10, 0))
    with pytest.raises(DiskFullError, match="activations need"):
        project.refresh(select=FIRST)


_HOLDER = """
import sys, time
from pathlib import Path
from puzzle_dag.lease import lease
with lease(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(1)
"""


def test_the_device_is_leased_to_one_process(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lock = tmp_path / "lock"
    with subprocess.Popen([sys.executable, "-c", _HOLDER, str(lock)], stdout=subprocess.PIPE, text=True, cwd=CHECKOUT) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        start_s = time.perf_counter()
        with lease(lock):
            waited_s = time.perf_counter() - start_s
    assert waited_s > 0.5 and other.returncode == 0
    assert f"waiting for {lock}, which process {other.pid} (-c " in caplog.text, "it says for whom"


@pytest.fixture
def refresh_raises(started: Project, monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], list[str]]:
    """Makes a refresh raise something, and returns the arguments of the command that comes to it."""

    def prepare(error: BaseException) -> list[str]:
        def stop(*_: Any, **__: Any) -> None:
            raise error

        monkeypatch.setenv("PUZZLE_DAG_ROOT", str(started.root))
        monkeypatch.setattr("assets.__main__._quiet", lambda: None)
        monkeypatch.setattr("assets.refresh.refresh", stop)
        return ["refresh", "--profile", started.profile]

    return prepare


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, dg.DagsterExecutionInterruptedError])
def test_an_interrupted_command_says_that_what_was_finished_is_kept(
    interruption: type[BaseException], refresh_raises: Callable[[BaseException], list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(refresh_raises(interruption())) == 130
    assert "interrupted: what was finished is kept" in capsys.readouterr().err


def test_other_errors_are_not_taken_for_interruptions(refresh_raises: Callable[[BaseException], list[str]]) -> None:
    with pytest.raises(RuntimeError, match="broken"):
        main(refresh_raises(RuntimeError("broken")))


def test_a_value_that_was_never_made_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(RecordMissingError, match="child\\[fast\\] was never materialised; run"):
        Shelf(tmp_path).value("child", "fast")


def test_a_cut_short_file_is_found(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    file = tmp_path / "store" / "weights"
    file.write_bytes(b"whole")
    shelf = Shelf(tmp_path / "profile")
    record = shelf.put("child", None, {}, data_version="1", files=[file])
    assert shelf.gone(record) is None
    file.write_bytes(b"who")
    assert shelf.gone(record) == "../store/weights"


def test_adding_a_scenario_validates_it_first(micro_parent_folder: Path, tmp_path: Path) -> None:
    project = make_project(tmp_path / "add", micro_parent_folder)
    file = tmp_path / "tight.yaml"
    file.write_text((project.root / "conf" / "scenarios" / "micro-small.yaml").read_text().replace("0.9", "0.7"))
    assert add_scenario(project.root, "micro", file).name == "tight"
    assert project.workspace.read_profile().scenarios == ("micro-small", "micro-light", "tight")
    assert "# The tests' profile" in project.profile_file.read_text()  # comments stay
    add_scenario(project.root, "micro", file)
    assert project.workspace.read_profile().scenarios == ("micro-small", "micro-light", "tight")
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(file.read_text().replace("target: micro-eager", "target: nowhere"))
    with pytest.raises(ConfigError, match="nowhere"):
        add_scenario(project.root, "micro", wrong)
    assert not (project.root / "conf" / "scenarios" / "wrong.yaml").exists()


@pytest.mark.parametrize("given", [["a", "b[c]", "--{}", "d"], ["a", "--{}", "b[c]", "--{}", "d"]], ids=["listed", "repeated"])
@pytest.mark.parametrize("option", ["select", "remake", "retrain"])
def test_an_option_that_is_given_again_adds_to_what_it_said(option, given):
    arguments = ["refresh", f"--{option}", *(word.format(option) for word in given)]
    assert getattr(_parser().parse_args(arguments), option) == ["a", "b[c]", "d"]
    assert getattr(_parser().parse_args(["refresh"]), option) in ([], None)
