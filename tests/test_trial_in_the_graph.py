"""The trial in a whole project, on a machine whose children are slower than their costs say. Only the engine is arithmetic."""

from pathlib import Path
from typing import Any

import pytest
import query_page
import yaml
from micro_project import Project
from ticking_engine import TickingEngine

from assets.facts import read_chain
from assets.plan import make_plan
from assets.refresh import RefreshRecord
from assets.watches import watch
from puzzle_dag.config import ConfigError
from puzzle_dag.search.solution import Solution
from puzzle_dag.store import fingerprint

FAST, SMALL, LIGHT = "micro-fast", "micro-small", "micro-light"
TURNS = 3

pytestmark = pytest.mark.usefixtures("no_jobs_yet")


def assets_of(record: RefreshRecord) -> set[str]:
    return {o.item.asset for o in record.of("ran")}


def partitions_of(record: RefreshRecord) -> set[str | None]:
    return {o.item.partition for o in record.of("ran")}


def scenario_file(project: Project) -> Path:
    return project.root / "conf" / "scenarios" / f"{FAST}.yaml"


def solution(project: Project, asset: str = "trial", scenario: str = FAST) -> Solution:
    return Solution.from_json(project.workspace.shelf.value(asset, scenario)["solution"])


def trial_jobs(engine: TickingEngine) -> list[str]:
    """Return the engines that the trial ran: those with its number of repeats, of no checkpoint."""
    return [j.name for j in engine.jobs if j.config is not None and j.workload.repeats >= 6]


def metadata(project: Project, scenario: str) -> dict[str, Any]:
    import dagster as dg

    asked = dg.AssetRecordsFilter(dg.AssetKey([project.profile, "trial"]), asset_partitions=[scenario])
    with project.instance() as instance:
        made = instance.fetch_materializations(asked, limit=1).records[0].asset_materialization
    assert made is not None
    return {name: entry.value for name, entry in made.metadata.items()}


def test_without_a_trial_the_child_is_slower_than_asked_and_one_learns_it_last(project: Project, engine: TickingEngine) -> None:
    engine.slowdown = 1.1
    content = yaml.safe_load((project.root / "conf" / "scenarios" / f"{SMALL}.yaml").read_text())
    content["constraints"] = {"throughput_tokens_per_s": {"at_least": 1.08, "relative_to": "parent"}}
    scenario_file(project).write_text(yaml.safe_dump(content))
    project.edit(project.profile_file, scenarios=[SMALL, LIGHT, FAST])
    record = project.refresh()
    assert record.ok and f"serving[{FAST}]: as_asked" in record.failed_checks and not trial_jobs(engine)


def test_with_a_trial_the_child_meets_its_bound(project: Project, engine: TickingEngine) -> None:
    before = solution(project, "solution")
    project.edit(project.profile_file, trial={"turns": TURNS})
    record = project.refresh()
    assert record.ok, [o for o in record.outcomes if o.state not in ("ran", "fresh")]
    assert {f"trial[{s}]" for s in (FAST, SMALL, LIGHT)} | {f"child[{FAST}]", "frontier", "tables"} <= set(record.ran)
    assert not assets_of(record) & {"block_library", "block_scores", "score_table", "block_costs", "cost_table", "solution"}
    assert not {f"uptrained_child[{s}]" for s in (SMALL, LIGHT)} & set(record.ran), "another scenario's child is what it was"
    assert len(trial_jobs(engine)) == 2 * TURNS * 2, "parent and child in turns, for two children; nothing where no bound is on time"
    assert not [c for c in record.failed_checks if c.startswith(("trial", "child", "serving[micro-fast]: as_asked"))]
    after = solution(project)
    assert after.digest != before.digest and after.objective > before.objective
    assert "10.0 % slower than their costs say" in after.notes["trial"] and "at least 1.18" in after.notes["trial"]
    assert after.limits[0].at_least == before.limits[0].at_least, "what is reported is what was asked"
    chain = read_chain(make_plan(project.root, project.profile), project.workspace, FAST)
    assert chain.searched is not None and chain.solution is not None and chain.trial is not None and chain.serving is not None
    assert (chain.searched["digest"], chain.solution["digest"]) == (before.digest, after.digest)
    made = project.workspace.shelf.value("child", FAST)
    assert made["solution"] == after.digest
    assert project.refresh().ran == []


def test_rounds_are_told_in_tables_on_the_page_and_in_the_ui(project: Project) -> None:
    columns = "round, verdict, is_answer, asked, measured_over_asked < 1, low <= measured, measured <= high, num_turns"
    asked = f"SELECT {columns} FROM trial ORDER BY round"
    words = "at least 1.08 x the parent's"
    assert project.rows(asked) == [(0, "missed", False, words, True, True, True, TURNS), (1, "met", True, words, False, True, True, TURNS)]
    schema, told_of = query_page.read_page(query_page.PAGE.read_text())
    assert schema["trial"] == query_page.read_database(project.workspace.database)["trial"]
    assert not [place for place, said in told_of.items() if place[0] == "trial" and said in ("", query_page.UNKNOWN)]
    page = (project.workspace.var / "reports" / f"{FAST}.html").read_text()
    assert "Tried on the engine before training" in page and "10.0 % slower than their costs say" in page
    told = metadata(project, FAST)
    assert told["measured_over_asked"] >= 1 and "missed" in told["rounds"] and "picture" in told
    kinds = dict(project.rows(f"SELECT DISTINCT kind, blocks FROM predicted_frontier WHERE scenario = '{FAST}'"))
    assert set(kinds) == {"searched", "scenario"} and kinds["searched"] != kinds["scenario"]


def test_a_scenario_that_bounds_no_time_is_passed_through(project: Project) -> None:
    for name in (SMALL, LIGHT):
        found, told = solution(project, "trial", name), metadata(project, name)
        assert found.digest == solution(project, "solution", name).digest
        assert found.notes["trial"] == told["trial"] == "not tried: the scenario bounds no time" and "measured_over_asked" not in told


def test_an_edited_bound_tries_that_scenario_again_and_no_other(project: Project, engine: TickingEngine) -> None:
    project.edit(scenario_file(project), constraints__throughput_tokens_per_s={"at_least": 1.04, "relative_to": "parent"})
    record = project.refresh()
    assert record.ok and {"solution", "trial", "child"} <= assets_of(record) and partitions_of(record) <= {FAST, None}
    assert trial_jobs(engine) and project.refresh().ran == []
    project.edit(scenario_file(project), constraints__throughput_tokens_per_s={"at_least": 1.08, "relative_to": "parent"})
    engine.jobs.clear()
    assert project.refresh().ok and not trial_jobs(engine), "what was tried before is in the store"


def test_the_same_answer_makes_no_child_again(project: Project, engine: TickingEngine) -> None:
    project.edit(project.profile_file, trial={"turns": TURNS, "rounds": 5})
    record = project.refresh()
    assert record.ok and {f"trial[{FAST}]", f"trial[{SMALL}]"} <= set(record.ran) and not assets_of(record) & {"child", "uptrained_child"}
    assert not trial_jobs(engine) and project.refresh().ran == []


def test_a_trial_that_was_interrupted_goes_on(project: Project, engine: TickingEngine) -> None:
    project.edit(project.profile_file, trial={"turns": TURNS, "repeats": 7})
    engine.dies_after = 4
    record = project.refresh()
    assert {str(o.item) for o in record.of("failed")} == {f"trial[{FAST}]"} and len(trial_jobs(engine)) == 4
    chain = read_chain(make_plan(project.root, project.profile), project.workspace, FAST)
    assert chain.solution is not None, "the trial of before is of the same solution"
    engine.dies_after, first = None, trial_jobs(engine)
    assert project.refresh().ok
    again = trial_jobs(engine)[len(first) :]
    assert len(again) == 4 * TURNS - 4 and not set(first) & set(again)


def test_remeasuring_replaces_what_is_stored(project: Project, engine: TickingEngine) -> None:
    project.refresh(anew=[f"trial[{FAST}]"])
    assert len(trial_jobs(engine)) == 4 * TURNS and project.refresh().ran == []


def test_on_an_unsteady_machine_further_turns_are_run(project: Project, engine: TickingEngine) -> None:
    engine.slowdown, engine.unsteadiness = 1.1, 0.05
    project.edit(project.profile_file, trial={"turns": TURNS, "further_turns": 2, "repeats": 7})
    record = project.refresh(anew=[f"trial[{FAST}]"])
    turns = project.rows("SELECT num_turns FROM trial")
    assert record.ok and (TURNS + 2,) in turns and len(trial_jobs(engine)) == 2 * sum(number for (number,) in turns)
    assert metadata(project, FAST)["rounds"].count("num_turns") and project.refresh().ran == []


def test_another_engine_tries_again_where_time_is_bounded(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, shelf = make_plan(project.root, project.profile), project.workspace.shelf
    record = shelf.find("trial", FAST)
    assert record is not None and record.watched == fingerprint(watch(plan, project.workspace, "trial", FAST))
    monkeypatch.setattr("puzzle_dag.engine.client.read_engine_version", lambda: "vllm 99.0")
    assert record.watched != fingerprint(watch(plan, project.workspace, "trial", FAST))
    assert watch(plan, project.workspace, "trial", SMALL) is None


def test_a_target_that_this_machine_is_not_is_passed_through(
    project: Project, engine: TickingEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("puzzle_dag.costs.obtain.is_measurable", lambda _: False)
        record = project.refresh(remake=[f"trial[{FAST}]"])
    assert f"trial[{FAST}]" in record.ran and not trial_jobs(engine)
    found = solution(project)
    assert found.digest == solution(project, "solution").digest and "other hardware than this machine" in found.notes["trial"]
    assert project.rows("SELECT count(*) FROM information_schema.tables WHERE table_name = 'trial'") == [(0,)]
    assert project.refresh(remake=[f"trial[{FAST}]"]).ok and solution(project).digest != found.digest


def test_what_nothing_can_meet_keeps_the_last_solution_and_says_so(project: Project, engine: TickingEngine) -> None:
    engine.slowdown = 1.5
    record = project.refresh(anew=[f"trial[{FAST}]"])
    assert record.ok and f"trial[{FAST}]" in record.ran
    note = solution(project).notes["trial"]
    assert "nothing meets it" in note and "none of 1 children tried meets" in note and metadata(project, FAST)["measured_over_asked"] < 1


def test_a_child_that_is_faster_than_its_costs_say_may_keep_more(project: Project, engine: TickingEngine) -> None:
    engine.slowdown = 0.9
    project.edit(project.profile_file, trial={"turns": TURNS, "repeats": 7, "tolerance": 0.05})
    record = project.refresh(anew=[f"trial[{FAST}]"])
    found, searched = solution(project), solution(project, "solution")
    assert record.ok and found.objective < searched.objective and "faster than their costs say" in found.notes["trial"]
    assert not [c for c in record.failed_checks if c.startswith("trial")], "the costs hold with the bounds that it was solved with"


def test_it_goes_with_refinement(project: Project, engine: TickingEngine) -> None:
    engine.slowdown = 1.1
    project.edit(project.profile_file, refinement={"rounds": 1}, trial={"turns": TURNS})
    record = project.refresh(anew=["trial"])
    assert record.ok and {f"refinement[{FAST}]", f"trial[{FAST}]"} <= set(record.ran)
    assert "refined" in solution(project).notes and "slower" in solution(project).notes["trial"]
    chain = read_chain(make_plan(project.root, project.profile), project.workspace, FAST)
    assert chain.solution is not None and chain.serving is not None and chain.solution["digest"] == solution(project).digest
    assert not [c for c in record.failed_checks if c.startswith(("trial", "refinement"))] and project.refresh().ran == []


def test_settings_that_make_no_sense_are_refused(project: Project) -> None:
    before = project.profile_file.read_text()
    for wrong, message in (
        ({"turns": 2}, "turns"),
        ({"repeats": 1}, "repeats"),
        ({"further_turns": -1}, "further_turns"),
        ({"tolerance": 0.6}, "tolerance"),
        ({"round": 1}, "round"),
    ):
        project.edit(project.profile_file, trial=wrong)
        with pytest.raises(ConfigError, match=rf"micro\.yaml.*trial\.{message}"):
            project.refresh()
        project.profile_file.write_text(before)


def test_switched_off_the_children_are_those_of_the_search_again(project: Project) -> None:
    content = yaml.safe_load(project.profile_file.read_text())
    del content["trial"], content["refinement"]
    project.profile_file.write_text(yaml.safe_dump(content))
    record = project.refresh()
    assert record.ok and project.workspace.shelf.value("child", FAST)["solution"] == solution(project, "solution").digest
    assert "trial" not in {name for (name,) in project.rows("SELECT table_name FROM information_schema.tables")}
    assert project.refresh().ran == []
