"""The asset graph: as drawn in the design, with everything that an asset must say of itself, and no edge too wide to be checked."""

import re
import subprocess
import sys
from pathlib import Path

import dagster as dg
import pytest
from dagster._core.code_pointer import CodePointer
from dagster._core.definitions.partitions.context import partition_loading_context
from dagster._core.definitions.reconstruct import initialize_repository_def_from_pointer
from dagster._core.workspace.load import location_origins_from_yaml_paths
from micro_project import CHECKOUT, Project, make_project
from transformers import LlamaConfig

from assets.automation import digest_configuration
from assets.definitions import build_definitions
from assets.partitions import group_key
from assets.plan import GROUPS, Plan, make_plan
from assets.versions import stage_version

EDGES = {
    "tokens": {"corpus", "parent"},
    "parent_activations": {"parent", "tokens"},
    "cost_variants": {"search_space"},
    "block_library": {"search_space", "parent", "parent_activations"},
    "block_scores": {"block_library", "parent", "parent_activations"},
    "layer_group": {"block_scores"},
    "score_table": {"layer_group"},
    "block_costs": {"cost_variants", "target_spec"},
    "cost_table": {"block_costs"},
    "solution": {"scenario_spec", "score_table", "cost_table"},
    "child": {"solution", "parent", "tokens"},
    "uptrained_child": {"child", "parent", "corpus", "tokens"},
    "parent_accuracy": {"parent", "corpus"},
    "accuracy": {"uptrained_child", "parent_accuracy"},
    "parent_serving": {"parent", "target_spec"},
    "serving": {"uptrained_child", "parent_serving"},
    "predicted_frontier": {"score_table", "cost_table", "solution"},
    "frontier": {"predicted_frontier", "accuracy", "serving"},
    "tables": {"score_table", "cost_table", "predicted_frontier", "frontier"},
    **{key: set() for key in ("corpus", "parent", "search_space", "target_spec", "scenario_spec")},
}
ON_THE_DEVICE = {"parent_activations", "block_library", "block_scores", "block_costs", "child", "uptrained_child"}
ON_THE_DEVICE |= {"parent_accuracy", "accuracy", "parent_serving", "serving"}


@pytest.fixture(scope="module")
def project(micro_parent_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Project:
    return make_project(tmp_path_factory.mktemp("definitions"), micro_parent_folder)


@pytest.fixture(scope="module")
def plan(project: Project) -> Plan:
    return make_plan(project.root, "micro")


@pytest.fixture(scope="module")
def definitions(plan: Plan) -> dg.Definitions:
    return build_definitions(plan)


def test_the_graph_is_the_one_of_the_design(definitions: dg.Definitions) -> None:
    graph = definitions.resolve_asset_graph()
    found = {key.path[-1]: {p.path[-1] for p in graph.get(key).parent_keys} for key in graph.get_all_asset_keys()}
    assert found == EDGES
    assert all(key.path[0] == "micro" for key in graph.get_all_asset_keys())
    dg.Definitions.validate_loadable(definitions)


def test_every_asset_says_what_it_is(definitions: dg.Definitions) -> None:
    graph = definitions.resolve_asset_graph()
    for key in graph.get_all_asset_keys():
        node = graph.get(key)
        assert node.code_version and node.description and node.owners and node.kinds, key
        assert key.path[-1] in GROUPS[node.group_name]
        assert (node.pools == {"device"}) == (key.path[-1] in ON_THE_DEVICE), key


def test_code_versions_say_which_settings_make_an_asset(project: Project, plan: Plan) -> None:
    def versions(of: Plan) -> dict[str, str | None]:
        graph = build_definitions(of).resolve_asset_graph()
        return {key.path[-1]: graph.get(key).code_version for key in graph.get_all_asset_keys()}

    library = plan.profile.library.model_copy(update={"num_tokens": 1024})
    edited = Plan(plan.root, plan.profile.model_copy(update={"library": library}), plan.shape, plan.partitions)
    before, after = versions(plan), versions(edited)
    assert {name for name in before if before[name] != after[name]} == {"block_library"}
    assert "build1" in (before["block_library"] or "") or f"build{stage_version('puzzle_dag.library.build')}" in (
        before["block_library"] or ""
    )


def test_a_module_without_version_is_an_error() -> None:
    with pytest.raises(ValueError, match="has no VERSION"):
        stage_version("puzzle_dag.architecture")


@pytest.fixture(scope="module")
def deep_plan(project: Project) -> Plan:
    folder = project.root / "parents" / "deep"
    LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=126, num_attention_heads=4, num_key_value_heads=4).save_pretrained(
        folder
    )
    file = project.root / "conf" / "profiles" / "deep.yaml"
    file.write_text(project.profile_file.read_text())
    project.edit(file, parent={"path": "parents/deep"})
    return make_plan(project.root, "deep")


def test_no_edge_of_126_layers_is_too_wide_for_dagster(deep_plan: Plan) -> None:
    """Dagster skips an edge with 100 or more upstream partitions in its staleness check."""
    graph, widest = build_definitions(deep_plan).resolve_asset_graph(), 0
    with dg.DagsterInstance.ephemeral() as instance, partition_loading_context(dynamic_partitions_store=instance):
        for asset in ("block_library", "block_scores", "layer_group", "score_table", "cost_variants"):
            definition = graph.get(deep_plan.key(asset)).partitions_def
            for partition in definition.get_partition_keys() if definition else [None]:
                parents = graph.get_parents_partitions(deep_plan.key(asset), partition).parent_partitions
                by_asset = [p.asset_key for p in parents]
                widest = max([widest, *(by_asset.count(k) for k in set(by_asset))])
    assert widest == 32
    assert [group_key(i) for i in (0, 31, 32, 125)] == ["G0", "G0", "G1", "G3"]


def test_layers_reach_their_own_group(deep_plan: Plan) -> None:
    graph = build_definitions(deep_plan).resolve_asset_graph()
    found = {p.partition_key for p in graph.get_parents_partitions(deep_plan.key("layer_group"), "G3").parent_partitions}
    assert found == {f"L{i}" if i > 99 else f"L{i:02d}" for i in range(96, 126)}


def test_the_sensor_asks_once_for_each_state_of_conf(project: Project, definitions: dg.Definitions) -> None:
    sensor = definitions.resolve_sensor_def("conf_micro_sensor")
    with dg.DagsterInstance.ephemeral() as instance:
        first = sensor.evaluate_tick(dg.build_sensor_context(instance=instance))
        assert len(first.run_requests or []) == 1 and first.cursor == digest_configuration(project.root / "conf")
        second = sensor.evaluate_tick(dg.build_sensor_context(instance=instance, cursor=first.cursor))
        assert not second.run_requests and second.skip_message
        file = project.root / "conf" / "scenarios" / "micro-small.yaml"
        as_before = file.read_text()
        project.edit(file, retention_floor=0.02)
        third = sensor.evaluate_tick(dg.build_sensor_context(instance=instance, cursor=first.cursor))
        file.write_text(as_before)
        back = sensor.evaluate_tick(dg.build_sensor_context(instance=instance, cursor=third.cursor))
        assert back.cursor == first.cursor != third.cursor
        requests = [request for tick in (first, third, back) for request in tick.run_requests or []]
        keys = [request.run_key for request in requests if request.run_key is not None]
        # Dagster launches a run key once for ever.
        assert len(requests) == 3 and len(set(keys)) == len(keys)


def test_imports_flow_one_way() -> None:
    for file in (CHECKOUT / "puzzle_dag").rglob("*.py"):
        assert not re.search(r"^\s*(import|from) (dagster|assets|resources)\b", file.read_text(), re.MULTILINE), file
    for file in (CHECKOUT / "resources").glob("*.py"):
        assert not re.search(r"^\s*(import|from) assets\b", file.read_text(), re.MULTILINE), file
    for file in [*(CHECKOUT / "assets").glob("*.py"), *(CHECKOUT / "resources").glob("*.py")]:
        assert "from __future__ import annotations" not in file.read_text(), f"{file}: it breaks Dagster's context annotations"


def test_definitions_come_without_the_heavy_libraries(project: Project) -> None:
    """Each code location and most commands pay for what they import; asset bodies import what they compute with.

    A scenario that speaks of no layers is checked without the parent's configuration, which takes transformers to read.
    """
    file = project.root / "conf" / "scenarios" / "micro-light.yaml"
    check = f"validate_scenario(Path({str(project.root)!r}), 'micro', 'light', Path({str(file)!r}).read_text())"
    script = f"import assets.definitions; from pathlib import Path; from assets.scenarios import validate_scenario; {check}"
    command = [sys.executable, "-X", "importtime", "-c", script]
    ran = subprocess.run(command, capture_output=True, text=True, check=True, cwd=CHECKOUT)
    imported = {line.rpartition("|")[2].strip() for line in ran.stderr.splitlines()}
    assert "assets.results" in imported
    assert not imported & {"torch", "transformers", "matplotlib", "scipy.stats", "vllm", "lm_eval"}


def test_a_location_is_named_by_its_profile(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    from assets import definitions as module

    monkeypatch.setenv("PUZZLE_DAG_ROOT", str(project.root))
    monkeypatch.setenv("PUZZLE_DAG_PROFILE", "micro")
    for attribute in ("micro", "defs"):
        graph = getattr(module, attribute).resolve_asset_graph()
        assert dg.AssetKey(["micro", "child"]) in graph.get_all_asset_keys()


def test_the_shipped_workspace_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `make ui` serves: Dagster reads the file and finds a repository behind each of its locations."""
    monkeypatch.setenv("PUZZLE_DAG_ROOT", str(CHECKOUT))
    monkeypatch.chdir(CHECKOUT)
    origins = location_origins_from_yaml_paths([str(CHECKOUT / "workspace.yaml")])
    assert {"tiny", "quality"} <= {origin.location_name for origin in origins}
    for origin in origins:
        target = origin.loadable_target_origin
        assert (CHECKOUT / "conf" / "profiles" / f"{origin.location_name}.yaml").is_file() and target.module_name == "assets.definitions"
        pointer = CodePointer.from_module(target.module_name, target.attribute, target.working_directory)
        repository = initialize_repository_def_from_pointer(pointer)
        assert {key.path[0] for key in repository.asset_graph.get_all_asset_keys()} == {origin.location_name}
        assert f"refresh_{origin.location_name}_job" in repository.job_names
