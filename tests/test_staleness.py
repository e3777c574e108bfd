"""What a refresh runs and what it leaves alone, on the real assets and a real Dagster instance; only the engine is arithmetic.

The tests share one project, which each leaves up to date: an edit is made, and what ran must be what it called for.
"""

import shutil

import dagster as dg
import pytest
from micro_project import Project
from ticking_engine import TickingEngine

from assets.definitions import build_definitions
from assets.plan import make_plan
from puzzle_dag.model.checkpoint import architecture_of
from puzzle_dag.model.configuration_puzzle_dag import PuzzleDagConfig
from resources.rows import read_rows

LAYERS = ("L00", "L01")
SCENARIOS = ("micro-small", "micro-light")
AFTER_A_CHILD = ("uptrained_child", "accuracy", "serving")
pytestmark = pytest.mark.usefixtures("no_jobs_yet")


def with_children(project: Project, before: dict[str, str]) -> set[str]:
    """What follows the solutions that changed since `before`, by the solutions' own DataVersions."""
    now = solutions(project)
    changed = [s for s in SCENARIOS if now[s] != before[s]]
    return {f"{asset}[{s}]" for s in changed for asset in ("child", *AFTER_A_CHILD)}


def solutions(project: Project) -> dict[str, str]:
    found = {s: project.workspace.shelf.find("solution", s) for s in SCENARIOS}
    return {s: record.data_version for s, record in found.items() if record}


def trained(project: Project, layer: str) -> list[str]:
    return [f"{r['place']}/{r['variant']}" for r in project.workspace.shelf.value("block_library", layer)["reports"] if not r["was_cached"]]


def test_everything_is_materialized_once(project: Project) -> None:
    with project.instance() as instance:
        runs = instance.get_runs()
        assert all(run.is_success for run in runs)
        assert len(runs) == len({(tuple(run.asset_selection or ()), run.tags.get("dagster/partition")) for run in runs})


def test_nothing_changed_nothing_materializes(project: Project, engine: TickingEngine) -> None:
    with project.instance() as instance:
        before = instance.get_runs_count()
    record = project.refresh()
    with project.instance() as instance:
        assert instance.get_runs_count() == before
    assert (record.ran, record.ok, engine.jobs) == ([], True, [])


def test_touched_files_and_reordered_keys_are_no_change(project: Project) -> None:
    project.edit(project.profile_file)  # written anew: other order, no comments
    (project.root / "parents" / "micro" / "config.json").touch()
    assert project.refresh().ran == []


def test_a_known_width_in_one_layer_runs_that_layer_and_measures_nothing(project: Project, engine: TickingEngine) -> None:
    before = solutions(project)
    project.edit(project.profile_file, search_space__overrides={0: {"add_ffn": ["w32"]}, 1: {"add_ffn": ["w32"]}})
    record = project.refresh()
    assert record.ok
    expected = {f"{asset}[L01]" for asset in ("search_space", "block_library", "block_scores")}
    expected |= {"layer_group[G0]", "score_table", "predicted_frontier", "tables"}
    expected |= {f"solution[{s}]" for s in SCENARIOS}
    followers = with_children(project, before)
    assert set(record.ran) - {"frontier"} == expected | followers
    assert trained(project, "L01") == ["ffn/w32"]
    assert engine.probes == []


def test_a_new_width_measures_only_its_own_probes(project: Project, engine: TickingEngine) -> None:
    before, costs = solutions(project), project.workspace.shelf.value("block_costs", "micro-eager")
    project.edit(project.profile_file, search_space__overrides={0: {"add_ffn": ["w32"]}, 1: {"add_ffn": ["w32", "w48"]}})
    record = project.refresh()
    assert record.ok
    expected = {f"{asset}[L01]" for asset in ("search_space", "block_library", "block_scores")}
    expected |= {"layer_group[G0]", "score_table", "predicted_frontier", "tables"}
    expected |= {"cost_variants", "block_costs[micro-eager]", "cost_table"} | {f"solution[{s}]" for s in SCENARIOS}
    assert set(record.ran) - {"frontier"} == expected | with_children(project, before)
    assert trained(project, "L01") == ["ffn/w48"]
    now = project.workspace.shelf.value("block_costs", "micro-eager")["num_engines"]
    # Its own probe, and the mixtures in which it took a place.
    assert 0 < now - costs["num_engines"] <= len(engine.probes) < costs["num_engines"]
    models = [PuzzleDagConfig(**{k: v for k, v in job.config.items() if k != "model_type"}) for job in engine.jobs if job.config]
    assert all(any(block.ffn.name == "w48" for block in architecture_of(model)) for model in models)


def test_a_constraint_runs_only_its_scenario(project: Project, engine: TickingEngine) -> None:
    before = solutions(project)
    file = project.root / "conf" / "scenarios" / "micro-light.yaml"
    project.edit(file, constraints={"memory_bytes": {"at_most": 0.75, "relative_to": "parent", "at": {"batch": 2, "length": 20}}})
    record = project.refresh()
    assert record.ok and solutions(project)["micro-light"] != before["micro-light"]
    chain = {f"{a}[micro-light]" for a in ("scenario_spec", "solution", "child", *AFTER_A_CHILD)}
    assert set(record.ran) == chain | {"predicted_frontier", "frontier", "tables"}
    assert engine.probes == []


def test_the_same_solution_rebuilds_no_child(project: Project, engine: TickingEngine) -> None:
    before = solutions(project)
    file = project.root / "conf" / "scenarios" / "micro-light.yaml"
    bound = project.workspace.read_scenario("micro-light").constraints["memory_bytes"]
    assert bound.at_most is not None
    looser = {"at_most": bound.at_most + 1e-6, "relative_to": "parent", "at": {"batch": 2, "length": 20}}
    project.edit(file, constraints={"memory_bytes": looser})
    record = project.refresh()
    assert solutions(project) == before
    assert set(record.ran) == {"scenario_spec[micro-light]", "solution[micro-light]", "frontier", "tables"}
    assert engine.jobs == []


def test_a_budget_runs_the_healing_but_not_the_search(project: Project) -> None:
    project.edit(project.root / "conf" / "scenarios" / "micro-light.yaml", uptrain={"tokens": 256})
    ran = project.refresh().ran
    assert "uptrained_child[micro-light]" in ran and not {"child[micro-light]", "uptrained_child[micro-small]"} & set(ran)


def test_a_librarys_setting_runs_the_library_but_not_the_costs(project: Project, engine: TickingEngine) -> None:
    project.edit(project.profile_file, library__learning_rate=0.002)
    ran = project.refresh().ran
    assert {f"block_library[{layer}]" for layer in LAYERS} <= set(ran)
    assert not {"block_costs[micro-eager]", "parent_activations", "tokens", "search_space[L00]"} & set(ran)
    assert engine.probes == []


def test_a_deleted_artifact_is_found_and_made_again(project: Project) -> None:
    pieces = project.workspace.shelf.value("block_library", "L00")["pieces"]["artifacts"]
    folder = project.workspace.store.folder("piece", pieces["ffn/w64"]["key"])
    (folder / "tensors.safetensors").unlink()
    record = project.refresh()
    assert record.ran == ["block_library[L00]"] and trained(project, "L00") == ["ffn/w64"]
    assert (folder / "tensors.safetensors").is_file()


def test_a_deleted_checkpoint_is_assembled_again(project: Project) -> None:
    shutil.rmtree(project.workspace.store.folder("child", project.workspace.shelf.value("child", "micro-small")["key"]))
    assert project.refresh().ran == ["child[micro-small]"]


def test_a_deleted_record_is_written_again(project: Project) -> None:
    project.workspace.shelf.path("score_table").unlink()
    assert project.refresh().ran == ["score_table"]


def test_a_removed_scenario_leaves_the_frontier(project: Project) -> None:
    project.edit(project.profile_file, scenarios=["micro-small"])
    assert set(project.refresh().ran) == {"predicted_frontier", "frontier", "tables"}
    assert [r["scenario"] for r in project.workspace.shelf.value("frontier")["rows"]] == ["micro-small"]
    project.edit(project.profile_file, scenarios=list(SCENARIOS))
    assert set(project.refresh().ran) == {"predicted_frontier", "frontier", "tables"}  # what was known of it still holds


def test_an_infeasible_scenario_fails_alone_and_says_what_can_be_had(project: Project) -> None:
    file = project.root / "conf" / "scenarios" / "micro-light.yaml"
    feasible, before = file.read_text(), solutions(project)
    project.edit(file, constraints={"memory_bytes": {"at_most": 0.01, "relative_to": "parent", "at": {"batch": 2, "length": 20}}})
    record = project.refresh()
    assert [str(o.item) for o in record.of("failed")] == ["solution[micro-light]"] and not record.ok
    assert "memory_bytes" in record.of("failed")[0].reasons[0] and "the best value" in record.of("failed")[0].reasons[0]
    assert set(record.ran) == {"scenario_spec[micro-light]", "predicted_frontier", "frontier", "tables"}
    assert failure_metadata(project, "solution")["conflicting"].value == "memory_bytes"
    assert "memory_bytes at most" in str(failure_metadata(project, "solution")["nearest"].value)
    rows = {r["scenario"]: r for r in project.workspace.shelf.value("frontier")["rows"]}
    # Nothing is left of the former child: it is not of this scenario.
    assert rows["micro-light"]["measured_speedup"] is None and rows["micro-small"]["measured_speedup"] is not None
    file.write_text(feasible)
    restored = project.refresh()
    # The former solution holds again.
    assert restored.ok and set(restored.ran) == {"scenario_spec[micro-light]", "predicted_frontier", "frontier", "tables"}
    assert solutions(project) == before


def failure_metadata(project: Project, asset: str) -> dict[str, dg.MetadataValue]:
    """What the last failed run of an asset shows in the UI."""
    with project.instance() as instance:
        runs = instance.get_runs(dg.RunsFilter(statuses=[dg.DagsterRunStatus.FAILURE]))
        run = next(run for run in runs if any(key.path[-1] == asset for key in run.asset_selection or ()))
        (event,) = instance.all_logs(run.run_id, of_type=dg.DagsterEventType.STEP_FAILURE)
        return dict(event.dagster_event.step_failure_data.user_failure_data.metadata)


def test_a_pool_and_what_loosening_buys_are_recorded_and_rebuild_no_child(project: Project) -> None:
    file, before = project.root / "conf" / "scenarios" / "micro-small.yaml", solutions(project)
    project.edit(file, pool={"num_solutions": 3})
    assert set(project.refresh().ran) == {"scenario_spec[micro-small]", "solution[micro-small]", "frontier", "tables"}
    assert solutions(project) == before
    value = project.workspace.shelf.value("solution", "micro-small")
    objectives = [s["objective"] for s in (value["solution"], *value["pool"])]
    assert len(objectives) == 3 and objectives == sorted(objectives)
    assert [entry["constraint"] for entry in value["solution"]["loosened"]] == ["parameters"]
    rows = read_rows(project.workspace.tables / "solution_pools" / "micro-small.parquet")
    assert [(r["rank"], r["objective"]) for r in rows] == list(enumerate(objectives, start=1))


def test_an_earlier_scenario_is_a_part_of_the_one_that_must_differ_from_it(project: Project) -> None:
    folder, before = project.root / "conf" / "scenarios", solutions(project)
    texts = {name: (folder / f"{name}.yaml").read_text() for name in SCENARIOS}
    same = {"constraints": project.workspace.shelf.value("scenario_spec", "micro-light")["constraints"]}
    project.edit(folder / "micro-small.yaml", **same, structure={"different_from": "micro-light"})
    search = ["scenario_spec", "solution"]
    assert project.refresh(select=search).ran == ["scenario_spec[micro-small]", "solution[micro-small]"]
    found = {s: project.workspace.shelf.value("solution", s)["solution"]["choices"] for s in SCENARIOS}
    assert [c["block"] for c in found["micro-small"]] != [c["block"] for c in found["micro-light"]]
    project.edit(folder / "micro-light.yaml", uptrain={"tokens": 320})
    assert project.refresh(select=search).ran == ["scenario_spec[micro-light]", "solution[micro-light]"]
    project.edit(folder / "micro-light.yaml", structure={"homogeneous": True})
    assert sorted(project.refresh(select=search).ran) == sorted(f"{asset}[{s}]" for asset in search for s in SCENARIOS)
    for name, text in texts.items():
        (folder / f"{name}.yaml").write_text(text)
    record = project.refresh()
    assert record.ok and solutions(project) == before


def test_one_click_in_the_ui_refreshes(project: Project) -> None:
    file = project.root / "conf" / "scenarios" / "micro-small.yaml"
    project.edit(file, description="Another description.")
    with project.instance() as instance:
        definitions = build_definitions(make_plan(project.root, "micro"))
        name = next(job.name for job in definitions.jobs or [] if "refresh" in job.name)
        result = definitions.resolve_job_def(name).execute_in_process(instance=instance)
        assert result.success
    assert project.workspace.shelf.value("scenario_spec", "micro-small")["description"] == "Another description."
    assert project.refresh().ran == []


def test_a_failing_stage_fails_the_click(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ValueError("broken")

    monkeypatch.setattr("puzzle_dag.search.answer.answer_scenario", broken)
    with project.instance() as instance:
        definitions = build_definitions(make_plan(project.root, "micro"))
        job = definitions.resolve_job_def(next(job.name for job in definitions.jobs or [] if "refresh" in job.name))
        result = job.execute_in_process(
            instance=instance,
            raise_on_error=False,
            run_config={"ops": {job.nodes[0].name: {"config": {"remake": ["solution[micro-small]"]}}}},
        )
    assert not result.success
    monkeypatch.undo()
    assert project.refresh().ran == []  # what was there before is still good


def test_another_parent_makes_all_anew_but_not_the_costs(project: Project, engine: TickingEngine, save_parent) -> None:
    other = save_parent("llama", rms_norm_eps=1e-5)
    (project.root / "parents" / "micro" / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes())
    assert project.refresh().ran == []  # the same seed, the same weights
    import torch
    from safetensors.torch import load_file, save_file

    file = project.root / "parents" / "micro" / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] += torch.full_like(tensors["lm_head.weight"], 1e-3) * tensors["lm_head.weight"].sign()
    save_file(tensors, file, metadata={"format": "pt"})
    record = project.refresh()
    assert record.ok
    assert {"parent", "tokens", "parent_activations", *(f"block_scores[{layer}]" for layer in LAYERS), "parent_accuracy"} <= set(record.ran)
    assert not {"cost_variants", "block_costs[micro-eager]", "corpus"} & set(record.ran) and engine.probes == []
