"""Refinement in a whole project: what is made, what the child is made from, and what makes it stale. Only the engine is arithmetic."""

from dataclasses import replace
from typing import Any

import pytest
from micro_project import Project
from ticking_engine import TickingEngine

from assets.facts import read_chain
from assets.plan import make_plan
from assets.refresh import RefreshRecord
from puzzle_dag.config import ConfigError
from puzzle_dag.model.checkpoint import architecture_of, load_checkpoint
from puzzle_dag.search.score import BlockScore
from puzzle_dag.search.solution import Solution

SCENARIO = "micro-small"
OTHER = "micro-light"

pytestmark = pytest.mark.usefixtures("no_jobs_yet")


def assets_of(record: RefreshRecord) -> set[str]:
    return {o.item.asset for o in record.of("ran")}


def solution(project: Project, asset: str) -> Solution:
    return Solution.from_json(project.workspace.shelf.value(asset, SCENARIO)["solution"])


def test_switched_on_it_refines_every_scenario_and_measures_nothing_again(project: Project, engine: TickingEngine) -> None:
    project.edit(project.profile_file, refinement={"rounds": 6})
    record = project.refresh()
    assert record.ok, [o for o in record.outcomes if o.state not in ("ran", "fresh")]
    ran = {str(o.item) for o in record.of("ran")}
    assert {f"refinement[{SCENARIO}]", f"refinement[{OTHER}]", "frontier", "tables"} <= ran
    assert not assets_of(record) & {"block_library", "block_scores", "score_table", "block_costs", "cost_table", "solution"}
    for name in (SCENARIO, OTHER):
        steps = project.workspace.shelf.value("refinement", name)["steps"]
        kept = [s["measured"] for s in steps if s["is_kept"]]
        assert steps[0]["round"] == 0 and kept == sorted(kept, reverse=True)
    assert project.rows(f"SELECT count(*) FROM refinement WHERE scenario = '{SCENARIO}' AND round = 0") == [(1,)]
    assert project.refresh().ran == []


def test_a_child_is_made_from_the_refined_solution(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores in context that say the opposite of the truth, and a measure that believes them, lead to another child."""
    from puzzle_dag.search import refine

    real_scores, real_measure = refine.score_in_context, refine.measure_in_context

    def measure(context: Any, architecture: Any) -> Any:
        sums = real_measure(context, architecture)
        sums.kl = sums.num_tokens * (1.0 if architecture == first.architecture else 0.5)
        return sums

    first = solution(project, "solution")
    with monkeypatch.context() as patch:
        patch.setattr(refine, "measure_in_context", measure)
        patch.setattr(refine, "score_in_context", lambda *args, **options: _opposite(real_scores(*args, **options)))
        record = project.refresh(remake=[f"refinement[{SCENARIO}]"])
    assert record.ok and {f"refinement[{SCENARIO}]", f"child[{SCENARIO}]"} <= {str(o.item) for o in record.of("ran")}
    refined = solution(project, "refinement")
    assert refined.digest != first.digest and refined.notes["refined"] == "from 1.0000 to 0.5000, as measured"
    made = project.workspace.shelf.value("child", SCENARIO)
    child = load_checkpoint(project.workspace.store.folder("child", made["key"]) / "checkpoint")
    assert architecture_of(child.config) == refined.architecture and made["solution"] == refined.digest
    chain = read_chain(make_plan(project.root, project.profile), project.workspace, SCENARIO)
    assert chain.searched is not None and chain.solution is not None and chain.serving is not None
    assert (chain.searched["digest"], chain.solution["digest"]) == (first.digest, refined.digest)
    kinds = f"SELECT DISTINCT kind, blocks FROM predicted_frontier WHERE scenario = '{SCENARIO}'"
    blocks = {kind: " ".join(c.block for c in found.choices) for kind, found in (("scenario", refined), ("searched", first))}
    assert dict(project.rows(kinds)) == blocks, "the child's architecture, and what the search found"
    failed = {check.partition("]: ")[2] for check in record.failed_checks if check.startswith(("refinement", "child"))}
    assert not failed and project.refresh().ran == []


def _opposite(table: list[list[BlockScore]]) -> list[list[BlockScore]]:
    return [[replace(score, kl=-score.kl) for score in layer] for layer in table]


def test_other_rounds_refine_again_and_nothing_before(project: Project) -> None:
    project.edit(project.profile_file, refinement={"rounds": 5})
    record = project.refresh()
    assert record.ok and assets_of(record) >= {"refinement"}
    assert not assets_of(record) & {"block_library", "block_scores", "score_table", "cost_table", "solution"}
    assert project.refresh().ran == []


def test_a_refinement_that_fails_leaves_nothing_of_former_times_in_the_results(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bound that doesn't bind: the search finds the same architecture, and the former refinement is not today's."""
    file = project.root / "conf" / "scenarios" / f"{SCENARIO}.yaml"
    before = file.read_text()

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("broken")

    with monkeypatch.context() as patch:
        patch.setattr("puzzle_dag.search.refine.refine_solution", broken)
        project.edit(file, constraints__kv_bytes_per_token={"at_most": 1.0, "relative_to": "parent"})
        record = project.refresh()
    assert {str(o.item) for o in record.of("failed")} == {f"refinement[{SCENARIO}]"}
    chain = read_chain(make_plan(project.root, project.profile), project.workspace, SCENARIO)
    assert chain.searched is not None and chain.solution is None and chain.serving is None
    assert project.workspace.shelf.value("frontier")["rows"][0]["measured_speedup"] is None
    file.write_text(before)
    assert project.refresh().ok and read_chain(make_plan(project.root, project.profile), project.workspace, SCENARIO).serving is not None


def test_a_scenario_that_others_differ_from_need_not_be_refinable(project: Project) -> None:
    scenarios = project.root / "conf" / "scenarios"
    before = (scenarios / f"{SCENARIO}.yaml").read_text()
    (scenarios / "fast.yaml").write_text(before)
    project.edit(scenarios / "fast.yaml", objective={"maximize": "throughput", "subject_to": {"kl": {"at_most": 9.0}}})
    project.edit(scenarios / f"{SCENARIO}.yaml", structure={"different_from": ["fast"], "min_different_layers": 1})
    assert f"refinement[{SCENARIO}]" in {str(o.item) for o in project.refresh(dry=True).outcomes}
    (scenarios / f"{SCENARIO}.yaml").write_text(before)
    (scenarios / "fast.yaml").unlink()


def test_a_scenario_that_can_not_be_refined_is_refused_before_anything_runs(project: Project) -> None:
    file = project.root / "conf" / "scenarios" / f"{SCENARIO}.yaml"
    before = file.read_text()
    project.edit(file, objective={"maximize": "throughput", "subject_to": {"kl": {"at_most": 0.5}}})
    with pytest.raises(ConfigError, match=r"micro-small\.yaml.*objective can't be refined.*take `refinement` out of conf/profiles"):
        project.refresh()
    file.write_text(before)
    project.edit(project.profile_file, search_space__runs={"max_layers": 2})
    with pytest.raises(ConfigError, match=r"micro\.yaml.*refinement doesn't go with search_space\.runs"):
        project.refresh()


def test_switched_off_the_children_are_those_of_the_search_again(project: Project) -> None:
    import yaml

    content = yaml.safe_load(project.profile_file.read_text())
    del content["search_space"]["runs"], content["refinement"]
    project.profile_file.write_text(yaml.safe_dump(content))
    record = project.refresh()
    assert record.ok and project.workspace.shelf.value("child", SCENARIO)["solution"] == solution(project, "solution").digest
    assert "refinement" not in {name for (name,) in project.rows("SELECT table_name FROM information_schema.tables")}
    assert project.refresh().ran == []
