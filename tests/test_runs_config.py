"""Runs and task scores as written in a profile: what they resolve to, what is refused and how, and what is measured for them."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from micro_project import CHECKOUT

from puzzle_dag.architecture import FFN, NO_BLOCK, Architecture, Attention, Block, Run
from puzzle_dag.config import ConfigError, Profile, Scenario, SearchSpaceSettings, read_profile, resolve_runs
from puzzle_dag.costs.heldout import draw_models, leave_out_fused
from puzzle_dag.costs.memory import size_model, size_variant
from puzzle_dag.costs.probes import plan_probes
from puzzle_dag.model.configuration_puzzle_dag import PuzzleDagConfig
from puzzle_dag.preflight import list_cost_variants, list_placed_blocks
from puzzle_dag.scenario_checks import check_scores, check_structure

PARENT = Block.parse("kv4/w128")
SHAPE = PuzzleDagConfig(
    vocab_size=600, hidden_size=64, intermediate_size=128, num_hidden_layers=5, num_attention_heads=4, num_key_value_heads=4, head_dim=32
)


def space(**runs: Any) -> SearchSpaceSettings:
    return SearchSpaceSettings(attention=("kv4",), ffn=(1.0,), runs=runs)


def profile(**fields: Any) -> Profile:
    content = yaml.safe_load((CHECKOUT / "conf" / "profiles" / "micro.yaml").read_text())
    content["search_space"] |= fields.pop("search_space", {})
    return Profile.model_validate({**content, "name": "micro", **fields})


def scenario(**fields: Any) -> Scenario:
    return Scenario.model_validate({"version": 1, "name": "s", "target": "micro-eager", "uptrain": {"tokens": 0}, **fields})


@given(st.integers(0, 200), st.integers(1, 20), st.sampled_from(["drop", "fuse"]))
def test_names_of_runs_parse_back(first: int, length: int, kind: Any) -> None:
    run = Run(first, first + length, kind)
    assert Run.parse(run.name) == run and re.fullmatch(r"[a-z0-9_-]+", run.name)


@pytest.mark.parametrize("name", ["drop_3-3", "drop_4-3", "fuse_03-4", "keep_1-2", "fuse_1", "kv4/w128", ""])
def test_other_names_are_none_of_a_run(name: str) -> None:
    with pytest.raises(ValueError, match="not understood; write drop_FIRST-LAST"):
        Run.parse(name)


def test_runs_put_blocks_into_layers() -> None:
    assert Run(1, 3, "drop").blocks(PARENT) == (NO_BLOCK,) * 3
    assert Run(1, 3, "fuse").blocks(PARENT) == (Block.parse("kv4/w384"), NO_BLOCK, NO_BLOCK)


def test_every_run_up_to_a_length_and_those_that_are_named() -> None:
    def names(settings: SearchSpaceSettings) -> list[str]:
        return [run.name for run in resolve_runs(settings, num_layers=5)]

    assert names(SearchSpaceSettings(attention=("kv4",), ffn=(1.0,))) == []
    assert names(space(max_layers=2, kinds=["drop"])) == ["drop_0-1", "drop_1-2", "drop_2-3", "drop_3-4"]
    assert len(names(space(max_layers=3))) == 2 * (4 + 3)
    assert names(space(layers=["1-4"])) == ["drop_1-4", "fuse_1-4"]
    assert names(space(max_layers=2, kinds=["fuse"], layers=["0-1", "1-4"])) == ["fuse_0-1", "fuse_1-2", "fuse_1-4", "fuse_2-3", "fuse_3-4"]
    assert names(space(max_layers=5))[-2:] == ["drop_3-4", "fuse_3-4"]


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ({}, "names no run; give `max_layers: 3`"),
        ({"max_layers": 1}, "greater than or equal to 2"),
        ({"max_layers": 2, "kinds": []}, "at least 1 item"),
        ({"max_layers": 2, "kinds": ["skip"]}, "'drop' or 'fuse'"),
        ({"layers": ["3"]}, "'3' is no run; write its first and last layer, such as 3-5"),
        ({"layers": ["4-3"]}, "'4-3' is no run"),
        ({"most": 2}, "Extra inputs are not permitted"),
    ],
)
def test_what_is_no_run_is_refused(runs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        space(**runs)


def test_a_mistake_in_a_file_names_line_and_field(tmp_path: Path) -> None:
    text = (CHECKOUT / "conf" / "profiles" / "micro.yaml").read_text()
    (tmp_path / "profiles").mkdir()
    wrong = text.replace("  width_multiple: 16\n", "  width_multiple: 16\n  runs: {max_layer: 3}\n")
    (tmp_path / "profiles" / "micro.yaml").write_text(wrong)
    with pytest.raises(ConfigError, match=r"micro\.yaml.*search_space\.runs\.max_layer.*max_layers"):
        read_profile(tmp_path, "micro")


def test_runs_beyond_the_parent_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"search_space\.runs\.max_layers is 6, more than the parent's 5 layers; give at most that"):
        resolve_runs(space(max_layers=6), num_layers=5)
    with pytest.raises(ConfigError, match=r"search_space\.runs\.layers has 3-5, but the parent has layers 0 to 4; end the run there"):
        resolve_runs(space(layers=["3-5"]), num_layers=5)


def test_fused_widths_are_measured_and_dropped_runs_cost_nothing_more() -> None:
    alone = list_cost_variants(profile(), SHAPE)
    assert list_cost_variants(profile(search_space={"runs": {"max_layers": 3, "kinds": ["drop"]}}), SHAPE) == alone
    attentions, ffns = list_cost_variants(profile(search_space={"runs": {"max_layers": 2, "layers": ["0-3"]}}), SHAPE)
    assert attentions == alone[0] and set(ffns) - set(alone[1]) == {FFN("swiglu", 256), FFN("swiglu", 512)} and list(ffns) == sorted(ffns)


def test_no_ops_of_runs_have_a_cost_where_no_layer_may_be_one() -> None:
    """A dropped layer needs the cost of nothing, also where the layers' own spaces have no no-op."""
    bare = {"attention": ["kv4", "kv1"], "ffn": [1.0, 0.5]}
    assert not {Attention("noop"), FFN("noop")} & {v for several in list_cost_variants(profile(search_space=bare), SHAPE) for v in several}
    for kind in ("drop", "fuse"):
        runs = {**bare, "runs": {"layers": ["1-2"], "kinds": [kind]}}
        attentions, ffns = list_cost_variants(profile(search_space=runs), SHAPE)
        assert Attention("noop") in attentions and FFN("noop") in ffns and (FFN("swiglu", 256) in ffns) == (kind == "fuse")


def test_a_fused_ffn_weighs_what_its_parts_do_but_for_norms() -> None:
    fused, one = (size_variant(SHAPE, "ffn", name) for name in ("w384", "w128"))
    assert fused.matrix_parameters == 3 * one.matrix_parameters and fused.other_parameters == one.other_parameters == 64
    child, parent = (Run(1, 3, "fuse").blocks(PARENT), (PARENT,) * 3)
    assert size_model(SHAPE, child).kv_values_per_token * 3 == size_model(SHAPE, parent).kv_values_per_token


@pytest.mark.parametrize("num_layers", [2, 6, 32, 80])
def test_probes_of_fused_widths_are_no_heavier_than_others(num_layers: int) -> None:
    ffns = [FFN("swiglu", n * 128) for n in (1, 2, 3)]
    before = plan_probes(PARENT, [], ffns[:1], num_layers=num_layers, probes_per_variant=2)
    probes = plan_probes(PARENT, [], ffns, num_layers=num_layers, probes_per_variant=2)
    assert set(before) <= set(probes), "a larger space plans every probe of a smaller one"
    for name in ("w256", "w384"):
        own = [p for p in probes if any(b.ffn.name == name for b in p.architecture)]
        assert {p.name for p in own} >= {f"ffn/{name}/0"}
        for probe in own:
            width = sum(b.ffn.intermediate_size for b in probe.architecture)
            assert width <= max(2 * num_layers, 4) * 128 + 128 and len(probe.architecture) <= max(2, 2 * num_layers)


def blocks_strategy() -> st.SearchStrategy[Architecture]:
    names = ["kv4/w128", "noop/w128", "kv4/w256", "linear/w384", "noop/noop", "kv1/w64", "kv4/linear"]
    return st.lists(st.sampled_from(names), min_size=1, max_size=6).map(lambda found: tuple(Block.parse(n) for n in found))


@given(blocks_strategy())
def test_held_out_models_look_like_children(architecture: Architecture) -> None:
    """After a fused FFN come the layers it was fused of, empty; the depth stays, and so does what has no fused FFN."""
    found = leave_out_fused(architecture, 128)
    assert len(found) == len(architecture)
    layer = 0
    while layer < len(found):
        num_fused = max(1, found[layer].ffn.intermediate_size // 128)
        assert layer + num_fused <= len(found) and found[layer + 1 : layer + num_fused] == (NO_BLOCK,) * (num_fused - 1)
        layer += num_fused
    if all(block.ffn.intermediate_size <= 128 for block in architecture):
        assert found == architecture


def test_held_out_models_of_spaces_without_runs_are_as_before() -> None:
    blocks = [[Block(a, f) for a in (Attention("gqa", 4), Attention("noop")) for f in (FFN("swiglu", 128), FFN("noop"))]] * 5
    assert draw_models(blocks, 4, own_width=128) == draw_models(blocks, 4)


def test_patterns_may_speak_of_the_blocks_of_runs() -> None:
    fused = profile(search_space={"runs": {"max_layers": 2}})
    asked = scenario(structure={"forbidden": {"all": "*/w256"}})
    check_structure(asked, list_placed_blocks(fused, SHAPE))
    with pytest.raises(ConfigError, match=r"structure\.forbidden\.all is '\*/w256', which matches no block"):
        check_structure(asked, list_placed_blocks(profile(), SHAPE))
    last = scenario(structure={"fixed": {4: "kv4/w256"}})
    with pytest.raises(ConfigError, match=r"structure\.fixed\.4"):
        check_structure(last, list_placed_blocks(fused, SHAPE))


@pytest.mark.parametrize(
    ("objective", "field"),
    [
        ({"minimize": {"kl": 1.0, "skill_copy": 0.5}}, "objective.minimize"),
        ({"maximize": "throughput", "subject_to": {"skill_copy": {"at_most": 0.1}}}, "objective.subject_to"),
    ],
)
def test_scores_that_nobody_takes_say_how_they_are_switched_on(objective: dict[str, Any], field: str) -> None:
    constraints = {"parameters": {"at_most": 0.9, "relative_to": "parent"}}
    asked = scenario(objective=objective, constraints=constraints)
    with pytest.raises(ConfigError) as caught:
        check_scores(asked, profile())
    assert f"{field} names 'skill_copy', which profile micro doesn't score" in str(caught.value)
    assert "write `task_scores: {tasks: [skill_copy]}` into conf/profiles/micro.yaml" in str(caught.value)
    check_scores(asked, profile(task_scores={"tasks": ["skill_copy"]}))
    with pytest.raises(ConfigError, match=r"tasks: \[skill_sum, skill_copy\]"):
        check_scores(asked, profile(task_scores={"tasks": ["skill_sum"]}))
    with pytest.raises(ConfigError, match="did you mean 'lm_loss'"):
        check_scores(scenario(objective={"minimize": {"lm_los": 1.0}}, constraints=constraints), profile())


def test_blocks_are_not_chosen_by_the_items_that_grade_children() -> None:
    with pytest.raises(ValueError, match=r"task_scores\.seed is 0, the profile's"):
        profile(task_scores={"tasks": ["skill_copy"], "seed": 0})
