"""The whole path with every component real, vLLM and lm-eval included, on the micro profile's parent and one scenario."""

from pathlib import Path

import duckdb
import pytest
from micro_project import make_project
from transformers import AutoModelForCausalLM

from assets.children import CHECKPOINT
from assets.plan import CORE
from puzzle_dag.engine.client import VllmMissingError, read_engine_version
from puzzle_dag.model.checkpoint import register_auto_classes


def _engine_is_missing() -> bool:
    try:
        read_engine_version()
    except VllmMissingError:
        return True
    return False


@pytest.mark.skipif(_engine_is_missing(), reason="vLLM is not installed")
def test_one_refresh_ends_with_a_served_and_graded_child(micro_parent_folder: Path, tmp_path: Path) -> None:
    project = make_project(tmp_path / "whole", micro_parent_folder)
    project.edit(project.profile_file, scenarios=["micro-small"])
    record = project.refresh()
    assert record.ok, [(str(o.item), o.reasons) for o in (*record.of("failed"), *record.of("waits"))]
    assert {o.item.asset for o in record.outcomes} == CORE

    workspace = project.workspace
    (row,) = workspace.shelf.value("frontier")["rows"]
    assert row["parameters"] <= 0.9 * row["parent_parameters"]
    assert row["measured_throughput_tokens_per_s"] > 0 and row["speedup_low"] <= row["measured_speedup"] <= row["speedup_high"]
    assert row["kl"] > 0

    folder = workspace.store.folder("uptrained_child", workspace.shelf.value("uptrained_child", "micro-small")["key"]) / CHECKPOINT
    register_auto_classes()
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert sum(p.numel() for p in model.parameters()) == row["parameters"]

    with duckdb.connect(str(workspace.database), read_only=True) as connection:
        served = connection.execute("SELECT count(*) FROM serving WHERE total_s > 0 AND num_engines >= 3").fetchone()
        engines = connection.execute("SELECT DISTINCT engine_version FROM costs WHERE source = 'measured'").fetchall()
    assert served == (2,) and len(engines) == 1 and engines[0][0].startswith("vllm")

    assert project.refresh().ran == []
