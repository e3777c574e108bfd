"""Runs of layers and scores on tasks in a whole project: what is made, what goes stale, and the child of a solution with a run.

The project is shared; each test leaves it up to date. Only the engine is arithmetic.
"""

from typing import Any

import pytest
import torch
from micro_project import Project
from ticking_engine import TickingEngine

from assets.plan import OPT_IN_SCORES
from assets.refresh import RefreshRecord
from puzzle_dag.architecture import NO_BLOCK, Block
from puzzle_dag.config import ConfigError
from puzzle_dag.model.checkpoint import architecture_of, load_checkpoint
from puzzle_dag.search.solution import Solution

SCENARIO = "micro-small"
RUNS = {"max_layers": 2, "kinds": ["drop", "fuse"]}
TASKS = {"tasks": ["skill_copy", "skill_facts"], "num_items": 4, "batch_size": 4}
AFTER_SCORES = {"layer_group[G0]", "score_table"}
LAYERS = ("L00", "L01")

pytestmark = pytest.mark.usefixtures("no_jobs_yet")


def assets_of(record: RefreshRecord) -> set[str]:
    return {str(o.item) for o in record.of("ran")}


def solution(project: Project, scenario: str = SCENARIO) -> Solution:
    return Solution.from_json(project.workspace.shelf.value("solution", scenario)["solution"])


def checkpoint(project: Project, asset: str) -> torch.nn.Module:
    folder = project.workspace.store.folder(asset, project.workspace.shelf.value(asset, SCENARIO)["key"]) / "checkpoint"
    return load_checkpoint(folder)


def test_switching_runs_on_scores_them_and_measures_only_the_fused_width(project: Project, engine: TickingEngine) -> None:
    assert not any(name in OPT_IN_SCORES for name in (o.item.asset for o in project.refresh().outcomes))
    project.edit(project.profile_file, search_space__runs=RUNS)
    record = project.refresh()
    assert record.ok, [o for o in record.outcomes if o.state not in ("ran", "fresh")]
    expected = {*(f"run_scores[{layer}]" for layer in LAYERS), *AFTER_SCORES, "cost_variants", "block_costs[micro-eager]", "cost_table"}
    assert assets_of(record) >= expected
    assert not any(item.startswith(("search_space", "block_library", "block_scores", "parent_", "tokens")) for item in assets_of(record))
    probed = {w for job in engine.jobs for layer in job.config["per_layer_config"].values() if (w := layer.get("intermediate_size"))}
    assert 256 in probed and len(engine.probes) < 20, "the parent's 128 channels twice; other probes are in the store"
    assert project.rows("SELECT run, num_layers, blocks FROM run_scores ORDER BY ALL") == [
        ("drop_0-1", 2, "noop/noop noop/noop"),
        ("fuse_0-1", 2, "kv4/w256 noop/noop"),
    ]
    costs = project.rows("SELECT DISTINCT variant, parameters FROM costs WHERE place = 'ffn' AND variant IN ('w128', 'w256')")
    assert dict(costs)["w256"] == 2 * dict(costs)["w128"] - 64, "one norm instead of two"
    assert project.refresh().ran == []


def test_the_child_of_a_fused_run_is_built_healed_and_graded(project: Project, engine: TickingEngine) -> None:
    """A structure that only a run can meet: no attention in the second layer, and an FFN of two layers in the first."""
    file = project.root / "conf" / "scenarios" / f"{SCENARIO}.yaml"
    before = file.read_text()
    project.edit(file, structure={"fixed": {0: "kv4/w256"}}, constraints={"num_attention_layers": {"at_most": 1}})
    record = project.refresh()
    assert record.ok, [o for o in record.outcomes if o.state not in ("ran", "fresh")]
    found = solution(project)
    assert found.runs == ("fuse_0-1",) and found.architecture == (Block.parse("kv4/w256"), NO_BLOCK)
    assert [c.score for c in found.choices] == [found.objective, 0.0]
    child, parent = checkpoint(project, "child"), project.workspace.load_parent()
    assert architecture_of(child.config) == found.architecture
    tokens = torch.arange(3, 20).unsqueeze(0)
    with torch.no_grad():
        first, second = parent.model.model.layers
        states = parent.model.model.embed_tokens(tokens)
        rotary = parent.model.model.rotary_emb(states, position_ids=torch.arange(17).unsqueeze(0))
        mask = torch.ones(17, 17, dtype=torch.bool).tril()[None, None]
        states = states + first.self_attn(first.input_layernorm(states), rotary, attention_mask=mask)
        fused = states + sum(layer.mlp(layer.post_attention_layernorm(states)) for layer in (first, second))
        torch.testing.assert_close(
            child(input_ids=tokens).logits, parent.model.lm_head(parent.model.model.norm(fused)), atol=1e-4, rtol=1e-4
        )
    assert architecture_of(checkpoint(project, "uptrained_child").config) == found.architecture
    assert project.rows(f"SELECT runs, blocks FROM solutions WHERE scenario = '{SCENARIO}'") == [("fuse_0-1", "kv4/w256 noop/noop")]
    assert {"child: as_assembled", "solution: feasible"}.isdisjoint({c.partition("]: ")[2] for c in record.failed_checks})
    file.write_text(before)
    assert project.refresh().ok


def test_other_runs_score_only_what_is_new(project: Project, engine: TickingEngine) -> None:
    """A kind less: its layers' scores are read from the store, and nothing is measured."""
    project.edit(project.profile_file, search_space__runs={"layers": ["0-1"], "kinds": ["drop"]})
    record = project.refresh()
    ran = assets_of(record)
    assert record.ok and "run_scores[L00]" in ran and "run_scores[L01]" not in ran and engine.jobs == []
    assert project.rows("SELECT run FROM run_scores") == [("drop_0-1",)]
    project.edit(project.profile_file, search_space__runs=RUNS)
    assert project.refresh().ok and engine.jobs == [] and project.refresh().ran == []


def test_a_run_is_taken_out_of_the_store_and_comes_back(project: Project) -> None:
    path = project.workspace.tables / "run_scores" / "L00.parquet"
    path.unlink()
    record = project.refresh()
    assert "run_scores[L00]" in record.ran and not any(i.startswith(("layer_group", "score_table")) for i in record.ran), record.ran
    assert path.exists()


def test_scenarios_over_tasks_say_how_to_switch_their_scores_on(project: Project) -> None:
    file = project.root / "conf" / "scenarios" / f"{SCENARIO}.yaml"
    before = file.read_text()
    project.edit(file, objective={"minimize": {"kl": 1.0, "skill_copy": 0.5}})
    with pytest.raises(ConfigError, match=r"micro-small\.yaml.*skill_copy.*doesn't score") as caught:
        project.refresh()
    assert "write `task_scores: {tasks: [skill_copy]}` into conf/profiles/micro.yaml" in str(caught.value)
    file.write_text(before)


def test_task_scores_fill_the_table_and_a_scenario_minimises_them(project: Project, engine: TickingEngine) -> None:
    project.edit(project.profile_file, task_scores=TASKS)
    record = project.refresh()
    assert record.ok, [o for o in record.outcomes if o.state not in ("ran", "fresh")]
    ran = assets_of(record)
    assert ran >= {*(f"task_scores[{layer}]" for layer in LAYERS), *AFTER_SCORES} and engine.jobs == []
    assert not any(item.startswith(("block_", "run_scores", "child", "accuracy", "cost")) for item in ran)
    graded = project.rows("SELECT count(*), count(skill_copy), count(skill_facts), min(skill_copy), max(skill_copy) FROM score_table")[0]
    assert graded[0] == graded[1] == graded[2] and 0 <= graded[3] <= graded[4] <= 1
    assert project.rows("SELECT count(*) FROM task_scores WHERE block IN ('drop_0-1', 'fuse_0-1')") == [(4,)]
    file = project.root / "conf" / "scenarios" / f"{SCENARIO}.yaml"
    before = file.read_text()
    project.edit(file, objective={"minimize": {"skill_copy": 1.0, "skill_facts": 2.0, "kl": 0.001}})
    record = project.refresh()
    found = solution(project)
    assert record.ok and found.minimized == "0.001 kl + skill_copy + 2 skill_facts"
    table = project.rows("SELECT layer, block, skill_copy, skill_facts, kl FROM score_table")
    values = {(layer, block): scores for layer, block, *scores in table}
    own = values[0, "kv4/w128"]
    terms = [values[c.layer, c.block] for c in found.choices if not c.run]
    if not found.runs:
        summed = sum(own[0] - copy + 2 * (own[1] - facts) + 0.001 * kl for copy, facts, kl in terms)
        assert found.objective == pytest.approx(summed, abs=1e-9)
    file.write_text(before)
    assert project.refresh().ok


def test_another_task_grades_only_that_one(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    from puzzle_dag.children import block_grades

    asked: list[tuple[str, ...]] = []
    evaluate = block_grades.evaluate_model

    def listen(model: Any, tokenizer: Any, tasks: Any, *args: Any, **options: Any) -> Any:
        asked.append(tuple(tasks))
        return evaluate(model, tokenizer, tasks, *args, **options)

    monkeypatch.setattr(block_grades, "evaluate_model", listen)
    project.edit(project.profile_file, task_scores={**TASKS, "tasks": [*TASKS["tasks"], "skill_sum"]})
    record = project.refresh(select=["task_scores"])
    assert assets_of(record) == {f"task_scores[{layer}]" for layer in LAYERS} and set(asked) == {("skill_sum",)}
    num_blocks = len({(r["layer"], r["block"]) for layer in LAYERS for r in project.workspace.shelf.value("task_scores", layer)["scores"]})
    assert len(asked) == num_blocks - 1, "the parent's own block is one model in both layers"
    project.edit(project.profile_file, task_scores=TASKS)
    assert project.refresh().ok and len(asked) == num_blocks - 1


def test_switched_off_all_is_as_before(project: Project) -> None:
    import yaml

    content = yaml.safe_load(project.profile_file.read_text())
    del content["search_space"]["runs"], content["task_scores"]
    project.profile_file.write_text(yaml.safe_dump(content))
    record = project.refresh()
    assert record.ok and assets_of(record) >= AFTER_SCORES
    tables = {name for (name,) in project.rows("SELECT table_name FROM information_schema.tables")}
    assert not tables & set(OPT_IN_SCORES)
    assert project.rows("SELECT count(*) FROM information_schema.columns WHERE column_name = 'skill_copy'") == [(0,)]
    assert all(c.run == "" for c in solution(project).choices) and project.refresh().ran == []
