"""Staleness stays right with 126 layers, the most that a supported parent has; Dagster skips edges of 100 partitions and more.

The configuration assets, the partition mappings, the fan-in and the refresh are the real ones; the work of a layer is
replaced by a hash of what it reads, so that 126 layers take seconds.
"""

import dagster as dg
import pytest
from micro_project import Project, make_project
from transformers import LlamaConfig

from assets.configuration import configuration_assets
from assets.materialise import materialised
from assets.partitions import group_key
from assets.plan import Plan, make_plan
from assets.refresh import Refresh, RefreshRecord
from assets.scores import score_assets
from puzzle_dag.architecture import layer_key
from puzzle_dag.store import fingerprint
from resources.rows import read_rows
from resources.workspace import Workspace

NUM_LAYERS = 126
CHAIN = ("search_space", "cost_variants", "block_scores", "layer_group", "score_table")


def _hashing_scores(plan: Plan) -> dg.AssetsDefinition:
    @dg.asset(
        **plan.options("block_scores", deps=["search_space"], partitions=plan.partitions.layers, description="A hash of the layer's space.")
    )
    def block_scores(context: dg.AssetExecutionContext, workspace: Workspace) -> dg.MaterializeResult:
        space = workspace.shelf.value("search_space", context.partition_key)
        row = {
            "layer": int(context.partition_key[1:]),
            "block": "kv4/w128",
            "kl": int(fingerprint(space)[:4], 16) / 1e5,
            "digest": fingerprint(space),
        }
        return materialised(context, plan, workspace, {"scores": [row]})

    return block_scores


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    folder = tmp_path_factory.mktemp("parent")
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4}
    LlamaConfig(num_hidden_layers=NUM_LAYERS, **shape).save_pretrained(folder)
    return make_project(tmp_path_factory.mktemp("deep"), folder)


def refresh(project: Project, instance: dg.DagsterInstance) -> RefreshRecord:
    plan = make_plan(project.root, "micro")
    configuration = [a for a in configuration_assets(plan) if a.key.path[-1] in CHAIN]
    fan_in = [a for a in score_assets(plan) if a.key.path[-1] in ("layer_group", "score_table")]
    definitions = dg.Definitions(
        assets=[*configuration, _hashing_scores(plan), *fan_in],
        resources={"workspace": Workspace(root=str(plan.root), profile="micro")},
        executor=dg.in_process_executor,
    )
    return Refresh(plan, definitions, instance, select=CHAIN).run()


def test_one_of_126_layers_runs_itself_and_its_fan_in(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    # the heat map of 126 layers is drawn elsewhere
    monkeypatch.setattr("puzzle_dag.report.pictures.score_heat_map", lambda *_, **__: b"")
    with dg.DagsterInstance.ephemeral() as instance:
        first = refresh(project, instance)
        assert first.ok and len(first.ran) == 2 * NUM_LAYERS + 4 + 1 + 1
        assert refresh(project, instance).ran == []
        for layer in (3, 99, 125):
            overrides = {layer: {"add_ffn": ["w32"]}}
            project.edit(project.profile_file, search_space__overrides=overrides)
            before, edited = _digests(project), sorted({layer, *_changed_back(layer)})
            expected = {f"{asset}[{layer_key(i)}]" for asset in ("search_space", "block_scores") for i in edited}
            expected |= {f"layer_group[{group_key(i)}]" for i in edited} | {"score_table"}
            # from layer 3 on the union of the widths stays the same
            assert set(refresh(project, instance).ran) == expected | ({"cost_variants"} if layer == 3 else set())
            changed = [i for i, (old, new) in enumerate(zip(before, _digests(project), strict=True)) if old != new]
            assert changed == edited
            assert refresh(project, instance).ran == []


def _digests(project: Project) -> list[str]:
    return [row["digest"] for row in read_rows(project.workspace.tables / "score_table.parquet")]


def _changed_back(layer: int) -> list[int]:
    """The layer of the edit before, which loses its width again."""
    return {3: [], 99: [3], 125: [99]}[layer]
