"""Every asset check passes on what was made and fails on what is wrong: each is spoilt once, on a real refresh of the micro profile."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from micro_project import Project, make_project
from safetensors.torch import load_file, save_file
from ticking_engine import TickingEngine

from assets.children import CHECKPOINT
from assets.definitions import build_definitions
from assets.grading import retention_metadata
from assets.plan import make_plan
from puzzle_dag.children.retention import MeanRetention, Retention
from puzzle_dag.costs.monotone import find_drops
from puzzle_dag.costs.table import CostRow, CostTable
from puzzle_dag.report.html import markdown_image
from puzzle_dag.report.pictures import retention_bars

SCENARIO, TARGET, LAYER = "micro-small", "micro-eager", "L00"


@pytest.fixture(scope="module")
def project(micro_parent_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    with pytest.MonkeyPatch.context() as patch:
        TickingEngine().install(patch)
        made = make_project(tmp_path_factory.mktemp("checks"), micro_parent_folder)
        made.edit(made.profile_file, scenarios=[SCENARIO])
        made.edit(made.root / "conf" / "targets" / f"{TARGET}.yaml", batch_sizes=[2, 8])
        record = made.refresh()
        assert record.ok, [(str(o.item), o.reasons) for o in (*record.of("failed"), *record.of("waits"))]
        yield made


def judge(project: Project, asset: str, check: str, partition: str) -> dg.AssetCheckEvaluation:
    """Run one check on its own, as the UI's button does."""
    definitions = build_definitions(make_plan(project.root, project.profile))
    key = dg.AssetCheckKey(dg.AssetKey([project.profile, asset]), check)
    job = definitions.resolve_implicit_global_asset_job_def().get_subset(asset_selection=set(), asset_check_selection={key})
    with project.instance() as instance:
        # By tag: `partition_key` asks for the partitions of the assets that are selected, and there are none beside the check.
        result = job.execute_in_process(instance=instance, tags={"dagster/partition": partition}, raise_on_error=False)
    (evaluation,) = result.get_asset_check_evaluations()
    return evaluation


def evaluate(project: Project, asset: str, check: str, partition: str) -> bool:
    return bool(judge(project, asset, check, partition).passed)


@contextmanager
def spoilt(path: Path) -> Iterator[None]:
    """Put a file back as it was, whatever is done to it meanwhile."""
    before = path.read_bytes()
    try:
        yield
    finally:
        path.write_bytes(before)


def edit_record(project: Project, asset: str, partition: str, change: Callable[[dict[str, Any]], None]) -> Path:
    path = project.workspace.shelf.path(asset, partition)
    content = json.loads(path.read_text())
    change(content["value"])
    path.write_text(json.dumps(content))
    return path


def lose_a_variant(value: dict[str, Any]) -> None:
    del value["pieces"]["artifacts"]["ffn/w64"]


def lose_finiteness(value: dict[str, Any]) -> None:
    value["reports"][0]["loss_trained"] = float("inf")


def score_the_parent(value: dict[str, Any]) -> None:
    next(s for s in value["scores"] if s["block"] == "kv4/w128")["kl"] = 1e-3


def score_infinity(value: dict[str, Any]) -> None:
    next(s for s in value["scores"] if s["block"] == "noop/noop")["kl"] = float("inf")


def choose_the_parent(value: dict[str, Any]) -> None:
    for choice in value["solution"]["choices"]:
        choice["block"] = "kv4/w128"


def choose_what_is_not_scored(value: dict[str, Any]) -> None:
    value["solution"]["choices"][0]["digest"] = "0" * 64


def forbid_a_chosen_block(spec: dict[str, Any], solution: dict[str, Any]) -> None:
    spec["structure"]["forbidden"] = {"1": [solution["choices"][1]["block"]]}


def ask_for_less_loss(spec: dict[str, Any], solution: dict[str, Any]) -> None:
    """The record of the solver says nothing of the budget, and must not be what counts."""
    spec["objective"]["subject_to"] = {"kl": {"at_most": solution["objective"] / 2}}
    solution["budgets"] = [{"score": "kl", "at_most": solution["objective"] / 2, "value": 0.0}]


def repeat_the_best_in_the_pool(spec: dict[str, Any], solution: dict[str, Any]) -> None:
    spec["pool"] = {"num_solutions": 2, "min_different_layers": 2}


def foretell_twice_the_speed(value: dict[str, Any]) -> None:
    for found in value["report"]["speedups"]:
        found["predicted"] *= 2


def foretell_nothing(value: dict[str, Any]) -> None:
    for found in value["report"]["speedups"]:
        found["predicted"] = None


@pytest.mark.parametrize(
    ("asset", "check", "partition", "change"),
    [
        ("block_library", "complete", LAYER, lose_a_variant),
        ("block_library", "complete", LAYER, lose_finiteness),
        ("block_scores", "sound", LAYER, score_the_parent),
        ("block_scores", "sound", LAYER, score_infinity),
        ("solution", "feasible", SCENARIO, choose_the_parent),
        ("solution", "feasible", SCENARIO, choose_what_is_not_scored),
        ("serving", "as_predicted", SCENARIO, foretell_twice_the_speed),
        ("serving", "as_predicted", SCENARIO, foretell_nothing),
    ],
)
def test_a_check_fails_on_what_is_wrong(project: Project, asset: str, check: str, partition: str, change: Callable[[Any], None]) -> None:
    assert evaluate(project, asset, check, partition)
    with spoilt(project.workspace.shelf.path(asset, partition)):
        edit_record(project, asset, partition, change)
        assert not evaluate(project, asset, check, partition)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (forbid_a_chosen_block, "solution 1: layer 1 has kv4/w64, which `fixed` or `forbidden` rules out"),
        (ask_for_less_loss, "solution 1: kl is "),
        (repeat_the_best_in_the_pool, "solutions 1 and 2 differ in 0 layers, not 2"),
    ],
)
def test_a_solution_is_held_against_all_that_was_asked(project: Project, change: Callable[[Any, Any], None], message: str) -> None:
    shelf = project.workspace.shelf
    solution = shelf.value("solution", SCENARIO)["solution"]
    with spoilt(shelf.path("scenario_spec", SCENARIO)), spoilt(shelf.path("solution", SCENARIO)):
        edit_record(project, "scenario_spec", SCENARIO, lambda spec: change(spec, solution))
        pool = [solution] if change is repeat_the_best_in_the_pool else []
        edit_record(project, "solution", SCENARIO, lambda value: value.update(solution=solution, pool=pool))
        found = judge(project, "solution", "feasible", SCENARIO)
        assert not found.passed and found.metadata["wrong"].value.startswith(message)


def test_retention_is_held_against_the_floor(project: Project) -> None:
    floor = project.workspace.read_scenario(SCENARIO).retention_floor
    verdicts = []
    with spoilt(project.workspace.shelf.path("accuracy", SCENARIO)):
        for retained in (floor + 1e-6, floor - 1e-6, None):
            edit_record(project, "accuracy", SCENARIO, lambda value, r=retained: value["mean"].update(value=r, stderr=0.01))
            verdicts.append(evaluate(project, "accuracy", "retention", SCENARIO))
    assert verdicts == [True, False, False]


def test_the_checkpoint_must_give_the_assembled_childs_logits(project: Project) -> None:
    assert evaluate(project, "child", "as_assembled", SCENARIO)
    folder = project.workspace.store.folder("child", project.workspace.shelf.value("child", SCENARIO)["key"]) / CHECKPOINT
    (file,) = folder.glob("*.safetensors")
    with spoilt(file):
        tensors = load_file(file)
        tensors["model.embed_tokens.weight"] *= 1.01
        save_file(tensors, file, metadata={"format": "pt"})
        assert not evaluate(project, "child", "as_assembled", SCENARIO)


def test_a_check_that_checked_nothing_says_so_before_all_else(project: Project) -> None:
    evaluation = judge(project, "block_costs", "held_out", TARGET)
    assert evaluation.passed and evaluation.description is not None
    assert evaluation.description.startswith("Nothing was checked: `heldout_models` of the target is 0.")
    assert f"set `heldout_models: 8` in conf/targets/{TARGET}.yaml" in evaluation.description
    assert next(iter(evaluation.metadata)) == "not_checked" and evaluation.metadata["not_checked"].value == evaluation.description


def test_costs_that_fall_with_the_batch_fail(project: Project) -> None:
    assert evaluate(project, "block_costs", "monotone", TARGET)
    path = project.workspace.tables / "costs" / f"{TARGET}.parquet"
    costs = CostTable.read(path)
    largest = max(costs.batch_sizes)
    with spoilt(path):
        rows = [replace(r, seconds=r.seconds / 2) if r.batch == largest and r.variant == "w128" else r for r in costs.rows]
        replace(costs, rows=tuple(rows)).write(path)
        assert not evaluate(project, "block_costs", "monotone", TARGET)


PICTURES = {
    ("block_library", LAYER): {"picture", "training"},
    ("block_scores", LAYER): {"picture"},
    ("score_table", None): {"picture"},
    ("block_costs", TARGET): {"picture"},
    ("solution", SCENARIO): {"picture"},
    ("child", SCENARIO): {"picture"},
    ("uptrained_child", SCENARIO): {"picture"},
    ("predicted_frontier", None): {f"{TARGET}_{q}" for q in ("throughput_tokens_per_s", "memory_bytes", "latency_s")},
    ("frontier", None): {"quality_against_speed", "quality_against_memory", "quality_against_latency"},
}


@pytest.mark.parametrize(("item", "names"), PICTURES.items(), ids=lambda x: x[0] if isinstance(x, tuple) else None)
def test_a_person_can_look_where_looking_is_easier(project: Project, item: tuple[str, str | None], names: set[str]) -> None:
    asset, partition = item
    key = dg.AssetKey([project.profile, asset])
    with project.instance() as instance:
        found = instance.fetch_materializations(dg.AssetRecordsFilter(asset_key=key, asset_partitions=partition and [partition]), limit=1)
    metadata = found.records[0].asset_materialization.metadata
    for name in names:
        assert metadata[name].value.startswith("![") and len(metadata[name].value) < 80_000, name


def test_what_a_child_keeps_is_drawn_where_the_parent_knows_anything() -> None:
    """The random parent of the project above is no better than chance, so that a project has no bars to look at."""
    kept = Retention("skill_sort", "acc", 0.99, 0.95, 0.25, 0.9596, 0.005, 0.9459, 0.0068, 500)
    guessed = Retention("skill_sum", "acc", 0.25, 0.25, 0.25, 1.0, 0.1, None, None, 500)
    metadata = retention_metadata("fast", [kept, guessed], MeanRetention(0.9459, 0.0068, 1, ("skill_sum",)), 0.9)
    bars = retention_bars({"skill_sort": (0.9459, 0.0068)}, floor=0.9, title="fast")
    assert metadata["picture"].value == markdown_image(bars, "retention") and metadata["mean_retention"] == 0.9459
    assert "| skill_sort |" in metadata["retention"].value and "| skill_sum |" in metadata["retention"].value
    nothing = retention_metadata("fast", [guessed], MeanRetention(None, None, 0, ("skill_sum",)), 0.9)
    assert "picture" not in nothing and "no better than chance" in nothing["mean_retention"]


def test_every_page_is_linked_and_there(project: Project) -> None:
    folder = project.workspace.var / "reports"
    with project.instance() as instance:
        links = {
            asset: instance.get_latest_materialization_event(dg.AssetKey([project.profile, asset]))
            .asset_materialization.metadata["page"]
            .value
            for asset in ("scenario_spec", "child", "uptrained_child", "frontier")
        }
    assert {asset: link.rpartition("/")[2] for asset, link in links.items()} == {
        **dict.fromkeys(("scenario_spec", "child", "uptrained_child"), f"{SCENARIO}.html"),
        "frontier": "index.html",
    }
    page = (folder / f"{SCENARIO}.html").read_text()
    assert page.count("data:image/png;base64,") >= 2 and "<script" not in page
    assert f'href="{SCENARIO}.html"' in (folder / "index.html").read_text()
    (folder / f"{SCENARIO}.html").unlink()
    assert project.refresh().ran == ["frontier"] and (folder / f"{SCENARIO}.html").read_text() == page


def row(batch: int, seconds: float, *, error: float = 0.0, noise: float = 0.0) -> CostRow:
    return CostRow(
        target="t",
        hardware="h",
        num_threads=1,
        engine_version="e",
        mode="eager",
        dtype="float32",
        quantization="none",
        input_length=1,
        output_length=1,
        batch=batch,
        phase="prefill",
        place="ffn",
        variant="w128",
        seconds=seconds,
        seconds_error=error,
        repeat_noise=noise,
        parameters=1,
        weight_bytes=1,
        kv_bytes_per_token=0,
        source="measured",
    )


@pytest.mark.parametrize(
    ("rows", "num_drops"),
    [
        ([row(1, 1.0), row(2, 1.0), row(4, 2.0)], 0),
        ([row(4, 2.0), row(1, 1.0), row(2, 0.9)], 1),
        ([row(1, 1.0, error=0.03), row(2, 0.9, error=0.03)], 0),  # 3 x 0.042 explains it
        ([row(1, 1.0, error=0.02), row(2, 0.9, error=0.02)], 1),
        ([row(1, 1.0, noise=0.12), row(2, 0.9)], 0),
        ([row(1, 1.0), row(2, 0.9995)], 0),  # rounding
        ([row(1, 1.0)], 0),
    ],
)
def test_a_drop_counts_beyond_the_noise(rows: list[CostRow], num_drops: int) -> None:
    drops = find_drops(rows)
    assert len(drops) == num_drops
    assert all(d.batch < d.next_batch and d.seconds - d.next_seconds > d.noise_s for d in drops)
