"""Costs in the asset graph: the held-out check, analytic costs that a scenario must ask for, and the DuckDB page.

One project, refreshed once, whose second target is a GPU that this machine is made to lack; only the engine is arithmetic.
"""

import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import dagster as dg
import duckdb
import pytest
import query_page
import yaml
from micro_project import Project, make_project
from test_cost_imports import hold_out, make_table, make_target
from ticking_engine import TickingEngine

from assets.plan import make_plan
from assets.refresh import RefreshRecord
from puzzle_dag.config import ConfigError
from puzzle_dag.costs import heldout
from puzzle_dag.costs.accelerators import ACCELERATORS
from puzzle_dag.costs.imports import IMPORT_KIND, import_table
from puzzle_dag.costs.provenance import Provenance, describe_shape, digest_shape
from puzzle_dag.costs.table import CostTable
from puzzle_dag.engine.hardware import Hardware
from puzzle_dag.model.parent import read_parent_shape
from resources.rows import read_rows

GPU, ESTIMATED = "micro-gpu", "micro-estimated"
SEARCH = ("scenario_spec", "block_costs", "cost_table", "solution")
_CPU = Hardware("cpu", "made-up cpu", 1)


@pytest.fixture(scope="module")
def project(micro_parent_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    with pytest.MonkeyPatch.context() as patch:
        TickingEngine().install(patch)
        for module in ("puzzle_dag.costs.measure", "puzzle_dag.costs.obtain", "puzzle_dag.children.serve"):
            patch.setattr(f"{module}.detect_hardware", lambda: _CPU)
        made = make_project(tmp_path_factory.mktemp("costs"), micro_parent_folder)
        conf = made.root / "conf"
        made.edit(conf / "targets" / "micro-eager.yaml", heldout_models=8, batch_sizes=[2, 8])
        made.edit(made.profile_file, scenarios=["micro-small"])
        assert made.refresh().ok
        gpu = yaml.safe_load((conf / "targets" / "micro-eager.yaml").read_text()) | {"hardware": "rtx4090", "dtype": "bfloat16"}
        (conf / "targets" / f"{GPU}.yaml").write_text(yaml.safe_dump(gpu))
        scenario = yaml.safe_load((conf / "scenarios" / "micro-small.yaml").read_text())
        scenario |= {"target": GPU, "costs": "analytic"}
        scenario["constraints"] = {"throughput_tokens_per_s": {"at_least": 1.01, "relative_to": "parent"}}
        (conf / "scenarios" / f"{ESTIMATED}.yaml").write_text(yaml.safe_dump(scenario))
        made.edit(made.profile_file, targets=["micro-eager", GPU], scenarios=["micro-small", ESTIMATED])
        made.refresh()
        yield made


def outcome(record: RefreshRecord, item: str) -> tuple[str, str]:
    return next((o.state, " ".join(o.reasons)) for o in record.outcomes if str(o.item) == item)


def ask(project: Project, query: str) -> list[tuple[Any, ...]]:
    with duckdb.connect(str(project.workspace.database), read_only=True) as connection:
        return connection.execute(query).fetchall()


def _key(asset: str) -> dg.AssetKey:
    return dg.AssetKey(["micro", asset])


def made_with(project: Project, asset: str, partition: str) -> dict[str, Any]:
    """Return the metadata of the newest materialisation."""
    with project.instance() as instance:
        asked = dg.AssetRecordsFilter(_key(asset), asset_partitions=[partition])
        made = instance.fetch_materializations(asked, limit=1).records[0].asset_materialization
    assert made is not None
    return {k: v.value for k, v in made.metadata.items()}


def check_metadata(project: Project, target: str) -> dict[str, Any]:
    key = dg.AssetCheckKey(_key("block_costs"), "held_out")
    with project.instance() as instance:
        history = instance.event_log_storage.get_asset_check_execution_history(key, limit=20)
    events = [r.event.dagster_event.event_specific_data for r in history if r.event is not None and r.event.dagster_event is not None]
    evaluation = next(e for e in events if e.partition == target)
    told = {"passed": evaluation.passed, "severity": evaluation.severity, "description": evaluation.description}
    return {**told, **{k: v.value for k, v in evaluation.metadata.items()}}


def latest_metadata(project: Project, asset: str, partition: str | None = None) -> dict[str, Any]:
    key = dg.AssetKey([project.profile, asset])
    with project.instance() as instance:
        found = instance.fetch_materializations(dg.AssetRecordsFilter(asset_key=key, asset_partitions=partition and [partition]), limit=1)
    metadata = found.records[0].asset_materialization.metadata
    return {name: entry.value for name, entry in metadata.items()}


def test_an_unmeasured_target_is_solved_with_analytic_costs_that_say_so(project: Project) -> None:
    again = project.refresh()
    assert not {f"block_costs[{GPU}]", f"solution[{ESTIMATED}]"} & set(again.ran)
    # What only the machine itself can tell stays open: it is not made up.
    assert outcome(again, f"parent_serving[{GPU}]")[0] == "failed" and outcome(again, f"serving[{ESTIMATED}]")[0] == "waits"
    assert project.workspace.shelf.value("solution", ESTIMATED)["solution"]["notes"]["costs"] == "analytic"
    assert project.workspace.shelf.value("solution", "micro-small")["solution"]["notes"]["costs"] == "measured"
    assert dict(ask(project, "SELECT scenario, costs FROM solutions")) == {ESTIMATED: "analytic", "micro-small": "measured"}
    assert dict(ask(project, "SELECT scenario, costs FROM frontier")) == {ESTIMATED: "analytic", "micro-small": "measured"}
    foreseen = ask(project, "SELECT DISTINCT target, costs FROM predicted_frontier ORDER BY ALL")
    assert foreseen == [("micro-eager", "measured"), (GPU, "analytic")]
    metadata = latest_metadata(project, "predicted_frontier")
    assert metadata["costs"] == f"micro-eager: measured, {GPU}: analytic" and "| analytic |" in metadata["points"]
    picture, page = metadata[f"{GPU}_latency_s"], (project.workspace.var / "reports" / "index.html").read_text()
    assert f"{GPU} latency s, predicted from analytic costs" in picture and f"{GPU} latency s, predicted from analytic costs" in page
    assert "micro-eager latency s, predicted from measured costs" in page
    costs = latest_metadata(project, "block_costs", GPU)
    assert costs["source"] == "analytic" and costs["published_peaks"] == ACCELERATORS["rtx4090"].source
    assert "published_peaks" not in latest_metadata(project, "block_costs", "micro-eager")
    by_source = ask(project, "SELECT DISTINCT target, source FROM costs ORDER BY ALL")
    assert by_source == [("micro-eager", "by construction"), ("micro-eager", "measured"), (GPU, "analytic"), (GPU, "by construction")]
    assert ask(project, "SELECT DISTINCT predicted_from FROM serving") == [("measured",)]


def test_probes_and_held_out_models_are_kept_with_what_was_predicted(project: Project) -> None:
    rows = ask(
        project, "SELECT kind, count(DISTINCT model), min(num_engines), max(abs(error)) FROM predictions GROUP BY kind ORDER BY kind"
    )
    assert [r[:3] for r in rows] == [("held out", 8, 2), ("probe", 12, 1)]
    assert all(r[3] < 0.01 for r in rows)  # the ticking engine adds up, but for a thousandth a round
    assert not ask(project, f"SELECT 1 FROM predictions WHERE target = '{GPU}'")
    overlap = "SELECT 1 FROM predictions a JOIN predictions b USING (model) WHERE a.kind = 'probe' AND b.kind = 'held out'"
    assert not ask(project, overlap)


def test_the_held_out_check_says_the_numbers_and_where_it_was_not_done(project: Project) -> None:
    done, undone = check_metadata(project, "micro-eager"), check_metadata(project, GPU)
    assert done["passed"] and done["checked"] and done["num_models"] == 8
    assert 0 < done["worst_error"] < 0.01 and "| 8 | total |" in done["verdicts"] and "| 2 |" not in done["verdicts"]
    assert undone["passed"] and not undone["checked"] and undone["not_checked"] == undone["description"]
    assert undone["description"].startswith("Nothing was checked: the costs are analytic")
    assert f"set `heldout_models: 8` in conf/targets/{GPU}.yaml and refresh on a machine with rtx4090" in undone["description"]


def test_costs_of_one_engine_a_model_come_with_a_warning(project: Project) -> None:
    assert "each model was measured in one engine" in made_with(project, "block_costs", "micro-eager")["warning"]
    assert "warning" not in made_with(project, "block_costs", GPU), "nothing was measured"


def test_the_held_out_check_fails_where_predictions_are_off(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    right = heldout.compare

    def optimistic(table: Any, measured: Any, kind: Any) -> list[Any]:
        return [replace(c, predicted_s=0.8 * c.predicted_s, error=0.8 * (1 + c.error) - 1) for c in right(table, measured, kind)]

    with monkeypatch.context() as patch:
        patch.setattr(heldout, "compare", optimistic)
        record = project.refresh(select=["block_costs"], remake=["block_costs[micro-eager]"])
    assert "block_costs[micro-eager]: held_out" in record.failed_checks
    found = check_metadata(project, "micro-eager")
    assert not found["passed"] and found["severity"] == dg.AssetCheckSeverity.ERROR and found["worst_error"] == pytest.approx(0.2, abs=0.01)
    restored = project.refresh(select=["block_costs"], remake=["block_costs[micro-eager]"])
    assert not restored.failed_checks


def test_a_new_width_measures_its_probes_and_the_held_out_models_that_took_it(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    def models(kind: str) -> set[str]:
        return {m for (m,) in ask(project, f"SELECT DISTINCT model FROM predictions WHERE kind = '{kind}' AND target = 'micro-eager'")}

    before, probes, profile = models("held out"), models("probe"), project.profile_file.read_text()
    engine = TickingEngine()
    engine.install(monkeypatch)
    project.edit(project.profile_file, search_space__overrides={1: {"add_ffn": ["w48"]}})
    project.refresh(select=["search_space", "cost_variants", "block_costs[micro-eager]", "cost_table", "predicted_frontier", "frontier"])
    found = read_rows(project.workspace.tables / "predictions" / "micro-eager.parquet")
    after, all_probes = ({r["model"] for r in found if r["kind"] == kind} for kind in ("held out", "probe"))
    new = (all_probes - probes) | (after - before)
    assert len(after) == 8 and before & after and all("w48" in model for model in new)
    # One engine a probe here, and two a held-out model, probes being none.
    assert len(engine.probes) == len(all_probes - probes) + 2 * len(after - before)
    project.profile_file.write_text(profile)
    project.refresh()


def test_every_query_of_the_page_answers(project: Project) -> None:
    queries = query_page.read_queries(query_page.PAGE.read_text())
    assert len(queries) == 5
    for query in queries:
        assert ask(project, query), query


def test_the_page_tells_of_the_schema_as_it_is(project: Project) -> None:
    text = query_page.PAGE.read_text()
    told, words = query_page.read_page(text)
    told = {name: columns for name, columns in told.items() if name not in query_page.OPTIONAL}  # test_online has these
    assert told == query_page.complete(query_page.read_database(project.workspace.database), told), (
        "run `python tests/query_page.py FILE.duckdb` and describe what is new"
    )
    assert not [place for place, description in words.items() if description in ("", query_page.UNKNOWN)]


def test_without_opting_in_an_unmeasured_target_is_refused_with_the_ways_out(project: Project) -> None:
    file = project.root / "conf" / "scenarios" / f"{ESTIMATED}.yaml"
    before = file.read_text()
    project.edit(file, costs="measured")
    record = project.refresh(select=SEARCH)
    for item in (f"block_costs[{GPU}]", f"solution[{ESTIMATED}]"):
        state, reason = outcome(record, item)
        assert state == "failed" and all(w in reason for w in ("measure it on a machine with rtx4090", "import", "costs: analytic"))
    file.write_text(before)
    project.refresh(select=SEARCH)
    assert project.workspace.shelf.value("solution", ESTIMATED)["solution"]["notes"]["costs"] == "analytic"


def test_every_target_of_a_scenario_may_be_estimated_and_the_weakest_costs_name_it(project: Project) -> None:
    """A scenario of the machine at hand that bounds the GPU's latency as well, and nothing else asks for the GPU."""
    file, profile = project.root / "conf" / "scenarios" / "both.yaml", project.profile_file.read_text()
    bounds = {"throughput_tokens_per_s": {"at_least": 1.01, "relative_to": "parent"}}
    bounds["latency_s"] = {"at_most": 0.95, "relative_to": "parent", "target": GPU}
    file.write_text(
        yaml.safe_dump({"version": 1, "target": "micro-eager", "costs": "analytic", "constraints": bounds, "uptrain": {"tokens": 0}})
    )
    project.edit(project.profile_file, scenarios=["both"])
    record = project.refresh(select=SEARCH, remake=[f"block_costs[{GPU}]"])
    assert outcome(record, f"block_costs[{GPU}]")[0] == "ran" and outcome(record, "solution[both]")[0] == "ran", record.of("failed")
    assert project.workspace.shelf.value("solution", "both")["solution"]["notes"]["costs"] == "analytic"
    project.edit(file, costs="measured")
    record = project.refresh(select=SEARCH)
    assert outcome(record, f"block_costs[{GPU}]")[0] == "failed"
    project.profile_file.write_text(profile)
    file.unlink()
    project.refresh(select=SEARCH)


def test_imported_costs_are_called_imported_wherever_they_are_told_of(project: Project, tmp_path: Path) -> None:
    shape = make_plan(project.root, "micro").shape
    estimated = CostTable.read(project.workspace.tables / "costs" / f"{GPU}.parquet")
    fields = {"hardware": "NVIDIA GeForce RTX 4090", "engine_version": "vllm 0.32.0"}
    rows = tuple(replace(r, **fields, source="measured" if r.source == "analytic" else r.source) for r in estimated.rows)
    origin = Provenance(
        shape_digest=digest_shape(shape), shape=describe_shape(shape), **fields, driver=None, package=None,
        first_measured_at=None, last_measured_at=None, num_probes=8, num_engines=8, engine_bytes=None,
    )  # fmt: skip
    replace(estimated, rows=rows, provenance=origin).write(tmp_path / "gpu.parquet")
    import_table(tmp_path / "gpu.parquet", project.workspace.store)
    assert {f"block_costs[{GPU}]", f"solution[{ESTIMATED}]"} <= set(project.refresh().ran)
    assert project.workspace.shelf.value("solution", ESTIMATED)["solution"]["notes"]["costs"] == "imported"
    for table in ("solutions", "solution_pools", "frontier"):
        assert ask(project, f"SELECT DISTINCT costs FROM {table} WHERE scenario = '{ESTIMATED}'") == [("imported",)], table
    assert ask(project, f"SELECT DISTINCT costs FROM predicted_frontier WHERE target = '{GPU}'") == [("imported",)]
    page = (project.workspace.var / "reports" / f"{ESTIMATED}.html").read_text()
    assert "<td>imported</td>" in page and "<td>analytic</td>" not in page
    assert check_metadata(project, GPU)["description"].startswith("Nothing was checked: the imported file has no held-out models")
    shutil.rmtree(project.workspace.store.root / IMPORT_KIND)
    assert f"block_costs[{GPU}]" in project.refresh(select=SEARCH).ran
    assert project.workspace.shelf.value("solution", ESTIMATED)["solution"]["notes"]["costs"] == "analytic"


def test_the_machine_at_hand_is_measured_and_never_estimated(project: Project) -> None:
    file = project.root / "conf" / "scenarios" / "micro-small.yaml"
    before = file.read_text()
    project.edit(file, costs="analytic")
    with pytest.raises(ConfigError, match="costs is 'analytic', but target micro-eager is the machine at hand"):
        project.refresh(dry=True)
    file.write_text(before)


SEARCH = ["target_spec", "scenario_spec", "block_costs", "cost_table", "solution"]
MEASURED_SERVED = "measured compiled, served eager; and measured with the engine core in a process of its own, served in one process"


def test_an_import_is_judged_by_its_held_out_models_and_its_other_mode_is_told_or_refused_where_the_target_is_strict(
    project: Project, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    conf, (target, scenario) = project.root / "conf", ("micro-h100", "micro-imported")
    fields = make_target(batch_sizes=(1, 4), mode="eager").model_dump(mode="json", exclude={"name"})
    (conf / "targets" / f"{target}.yaml").write_text(yaml.safe_dump(fields))
    asked = yaml.safe_load((conf / "scenarios" / "micro-small.yaml").read_text()) | {"target": target}
    (conf / "scenarios" / f"{scenario}.yaml").write_text(yaml.safe_dump(asked))
    before = project.profile_file.read_text()
    project.edit(project.profile_file, targets=["micro-eager", GPU, target], scenarios=["micro-small", ESTIMATED, scenario])
    shape = read_parent_shape(project.workspace.read_profile().parent, project.root)
    hold_out(make_table(shape, target=make_target(multiprocess=True)), error=0.05)[0].write(tmp_path / "h100.parquet")
    import_table(tmp_path / "h100.parquet", project.workspace.store)

    told = project.refresh(select=SEARCH)
    assert f"solution[{scenario}]" in told.ran and f"block_costs[{target}]: held_out" in told.failed_checks
    verdict = check_metadata(project, target)
    assert verdict["checked"] and not verdict["passed"] and verdict["num_models"] == 8 and verdict["worst_error"] == 0.05
    caplog.clear()
    project.refresh(select=["solution"], remake=[f"solution[{scenario}]"])
    assert f"target '{target}': its costs were {MEASURED_SERVED}" in caplog.text
    assert made_with(project, "block_costs", target)["engine_that_serves"] == MEASURED_SERVED.replace("; and", ";")

    project.edit(conf / "targets" / f"{target}.yaml", strict=True)
    strict = project.refresh(select=SEARCH)
    state, reason = outcome(strict, f"block_costs[{target}]")
    assert state == "failed" and MEASURED_SERVED in reason and "drop `strict`" in reason
    assert f"solution[{scenario}]" not in strict.ran
    project.profile_file.write_text(before)


def test_search_and_serving_refuse_costs_of_another_version_where_the_target_is_strict(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, profile = project.root / "conf" / "targets" / "micro-eager.yaml", project.profile_file.read_text()
    before = file.read_text()
    project.edit(file, strict=True)
    project.edit(project.profile_file, targets=["micro-eager"], scenarios=["micro-small"])
    with monkeypatch.context() as patch:
        patch.setattr("puzzle_dag.costs.agreement.read_engine_version", lambda: "ticking 1.0")  # the one that measures here
        record = project.refresh(select=[*SEARCH, "parent_serving"])
        assert "block_costs[micro-eager]" in record.ran and outcome(record, "solution[micro-small]")[0] != "failed"
    for asset in ("serving", "solution"):
        item = f"{asset}[micro-small]"
        state, reason = outcome(project.refresh(select=[asset], remake=[item]), item)
        assert state == "failed" and re.search(r"measured with ticking 1\.0, served by vllm\S* \d.*drop `strict`", reason)
    file.write_text(before)
    project.profile_file.write_text(profile)
