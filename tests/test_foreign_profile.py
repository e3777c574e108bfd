"""A foreign library as a profile: its files, its scenarios, its assets on a real Dagster instance, its checks and its pages."""

import json
import re
import shutil
from collections.abc import Callable
from fractions import Fraction
from itertools import product
from pathlib import Path
from typing import Any

import dagster as dg
import duckdb
import pyarrow as pa
import pytest
from micro_project import CHECKOUT, Project
from pyarrow import csv, parquet

from assets.__main__ import main
from assets.definitions import build_definitions
from assets.foreign.plan import GROUPS
from assets.plan import make_plan
from assets.scenarios import add_scenario, adopt_scenarios, remove_scenario
from assets.sweeps import write_sweep
from puzzle_dag.config import ConfigError, ForeignScenario, is_foreign, read_foreign_profile, read_foreign_scenario, read_profile
from puzzle_dag.config.sweep import read_sweep
from puzzle_dag.search.foreign import read_foreign_library
from puzzle_dag.search.foreign_candidates import ForeignLibraryError
from puzzle_dag.search.foreign_scenario import (
    check_foreign_scenario,
    layers_of,
    list_metrics,
    list_sources,
    recheck_answers,
    solve_foreign_scenario,
    sweep_foreign_library,
    total_of,
)
from puzzle_dag.search.synthetic import format_library, make_library

SCENARIOS = ("synthetic-memory", "synthetic-pool")
SMALL = {
    f"layer_{i}": {v: {"ms": a, "kl": b} for v, (a, b) in {"x": (3.0, 0.0), "y": (1.5, 0.1 * (i + 1)), "z": (0.0, 0.9)}.items()}
    for i in range(4)
}


def scenario(**fields: Any) -> ForeignScenario:
    given = {"version": 1, "name": "s", "library": "lib", "minimize": "kl", "constraints": {"ms": {"at_most": 7.5}}}
    return ForeignScenario.model_validate({**given, **fields})


def test_the_shipped_library_is_the_one_that_the_generator_makes_and_says_that_it_is_synthetic() -> None:
    path = CHECKOUT / "conf" / "libraries" / "synthetic.json"
    assert path.read_text() == format_library(make_library()), (
        "make it again: python -m puzzle_dag.search.synthetic conf/libraries/synthetic.json"
    )
    library = read_foreign_library(path)
    assert list_sources(library) == ["synthetic"]
    assert all(v["source"] == "synthetic" for variants in library.values() for v in variants.values())
    assert list_metrics(library) == ["metrics.kl_div", "stats.memory_mib", "stats.num_params", "stats.runtime_ms"]


@pytest.fixture
def conf(tmp_path: Path) -> Path:
    return Path(shutil.copytree(CHECKOUT / "conf", tmp_path / "conf"))


def test_profiles_are_told_apart_by_what_they_name(conf: Path) -> None:
    assert is_foreign(conf, "synthetic") and not is_foreign(conf, "tiny") and not is_foreign(conf, "not-there")
    assert read_foreign_profile(conf, "synthetic").scenarios == SCENARIOS
    with pytest.raises(ConfigError, match="no `parent`, but a library that someone else measured"):
        read_profile(conf, "synthetic")


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (
            "library_file:",
            "parent: {path: p}\nlibrary_file:",
            "synthetic.yaml, line 5: fields `library_file` and `parent` exclude each other",
        ),
        ("library_file:", "libary_file:", r"line 5: field `libary_file` is unknown; did you mean `library_file`\?"),
        ("scenarios:", "targets: [cpu-chat]\nscenarios:", "field `targets` is unknown"),
        ("version: 1", "version: 2", "field `version`"),
    ],
)
def test_a_mistake_in_a_profile_is_named(conf: Path, before: str, after: str, message: str) -> None:
    file = conf / "profiles" / "synthetic.yaml"
    file.write_text(file.read_text().replace(before, after))
    with pytest.raises(ConfigError, match=message):
        assert is_foreign(conf, "synthetic")
        read_foreign_profile(conf, "synthetic")


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("at_most: 9_900", "at_mots: 9_900", r"field `constraints.stats.memory_mib.at_mots` is unknown; did you mean `at_most`\?"),
        ("at_most: 9_900", "at_most: 1, at_least: 2", "at_least 2.0 is above at_most 1.0"),
        ("{at_most: 9_900}", "{}", "give `at_least` or `at_most`"),
        ("minimize: metrics.kl_div", "minimise: metrics.kl_div", r"did you mean `minimize`\?"),
        ("library: synthetic", "target: cpu-chat", "synthetic-memory.yaml, line 3: field `target` is for a scenario of a parent"),
    ],
)
def test_a_mistake_in_a_scenario_is_named(conf: Path, before: str, after: str, message: str) -> None:
    file = conf / "scenarios" / "synthetic-memory.yaml"
    file.write_text(file.read_text().replace(before, after))
    with pytest.raises(ConfigError, match=message):
        read_foreign_scenario(conf, "synthetic-memory")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"library": "other"}, "scenario s: library is 'other', but profile 'lib' names it"),
        ({"minimize": "kll"}, "scenario s: minimize can't be summed: .* has no number 'kll'; did you mean 'kl'"),
        ({"constraints": {"mib": {"at_most": 1}}}, "scenario s: constraints.mib can't be summed: .* has no number 'mib'; it has kl, ms"),
        ({"min_different_layers": 5}, "scenario s: min_different_layers is 5; the library has 4 layers"),
    ],
)
def test_a_scenario_that_does_not_fit_its_library_is_refused(fields: dict[str, Any], message: str) -> None:
    check_foreign_scenario(scenario(), SMALL, profile="lib")
    with pytest.raises(ConfigError, match=message):
        check_foreign_scenario(scenario(**fields), SMALL, profile="lib")


def brute_force(at_most: float) -> float:
    picks = [dict(zip(SMALL, p, strict=True)) for p in product(*SMALL.values())]
    return float(min(total_of(SMALL, p, "kl") for p in picks if total_of(SMALL, p, "ms") <= Fraction(str(at_most))))


def test_a_scenario_is_solved_like_brute_force_and_what_it_asks_beyond_is_infeasible() -> None:
    (answer,) = solve_foreign_scenario(SMALL, scenario())
    assert answer["objective"] == brute_force(7.5) and answer["costs"]["ms"] <= 7.5
    with pytest.raises(ForeignLibraryError, match="no choice meets ms at most -1; ms can come to 0"):
        solve_foreign_scenario(SMALL, scenario(constraints={"ms": {"at_most": -1}}))


def test_a_sweep_is_the_best_at_each_of_its_bounds() -> None:
    points = sweep_foreign_library(SMALL, "kl", "ms", num_points=9)
    assert [p[0] for p in points] == sorted(p[0] for p in points) and points[0][0] == 0.0 and points[-1] == (12.0, 0.0)
    assert all(best == brute_force(at_most) for at_most, best in points)


def spoil(answers: list[dict[str, Any]], **fields: Any) -> list[dict[str, Any]]:
    return [{**answers[0], **fields}, *answers[1:]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda a: spoil(a, choices={k: v for k, v in a[0]["choices"].items() if k != "layer_0"}),
            "layer 'layer_0' has no choice",
        ),
        (lambda a: spoil(a, choices={**a[0]["choices"], "layer_0": "w"}), "no variant 'w' in layer 'layer_0'"),
        (lambda a: spoil(a, choices=dict.fromkeys(SMALL, "x")), "ms is 12, said .*; asked for ms at most 7.5"),
        (lambda a: spoil(a, objective=0.0), "kl is .*, not 0.0"),
        (lambda a: spoil(a, bound=a[0]["objective"] + 1), "bound"),
        (lambda a: spoil(a, costs={"ms": 1.0}), "said 1.0"),
        (lambda a: [a[0], a[0]], "solutions 1 and 2 differ in 0 layers, not 2"),
    ],
)
def test_every_fault_of_an_answer_is_found(change: Callable[[Any], Any], message: str) -> None:
    asked = scenario(num_solutions=2, min_different_layers=2)
    answers = solve_foreign_scenario(SMALL, asked)
    assert len(answers) == 2 and recheck_answers(SMALL, asked, answers) == []
    wrong = recheck_answers(SMALL, asked, change(answers))
    assert wrong
    with pytest.raises(AssertionError, match=message):
        raise AssertionError("; ".join(wrong))


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The synthetic library as a project of its own, refreshed once: no parent, no corpus, no engine."""
    root = tmp_path_factory.mktemp("foreign")
    (root / "conf").mkdir()
    shutil.copy(CHECKOUT / "conf" / "dagster.yaml", root / "conf")
    for kind in ("profiles", "scenarios", "libraries"):
        (root / "conf" / kind).mkdir()
        for file in (CHECKOUT / "conf" / kind).glob("synthetic*"):
            shutil.copy(file, root / "conf" / kind)
    made = Project(root, "synthetic")
    record = made.refresh()
    assert record.ok and not record.failed_checks, [(str(o.item), o.reasons) for o in record.outcomes]
    items = {"library_file", "frontier", "tables", *(f"{a}[{s}]" for a in ("scenario_spec", "solution") for s in SCENARIOS)}
    assert set(record.ran) == items
    return made


def test_every_asset_says_what_it_is_in_groups_of_the_data_flow(project: Project) -> None:
    definitions = build_definitions(make_plan(project.root, "synthetic"))
    dg.Definitions.validate_loadable(definitions)
    graph = definitions.resolve_asset_graph()
    assert {k.path[-1] for k in graph.get_all_asset_keys()} == {name for names in GROUPS.values() for name in names}
    for key in graph.get_all_asset_keys():
        node = graph.get(key)
        assert node.code_version and node.description and node.owners and node.kinds and key.path[-1] in GROUPS[node.group_name], key


def test_nothing_changed_nothing_materializes(project: Project) -> None:
    assert project.refresh().ran == []


def test_the_solutions_are_those_of_the_command(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    from puzzle_dag import cli

    file = str(project.root / "conf" / "libraries" / "synthetic.json")
    bounds = ["--at-most", "stats.memory_mib=9900", "--at-most", "stats.runtime_ms=6.6"]
    assert cli.main(["solve", "--library", file, "--minimize", "metrics.kl_div", *bounds, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    (found,) = project.workspace.shelf.value("solution", "synthetic-memory")["answers"]
    assert found["choices"] == answer["choices"] and found["objective"] == answer["objective"]
    pool = project.workspace.shelf.value("solution", "synthetic-pool")["answers"]
    assert len(pool) == 3
    assert min(sum(a["choices"][k] != b["choices"][k] for k in a["choices"]) for i, a in enumerate(pool) for b in pool[:i]) >= 4


def test_the_metadata_has_tables_and_pictures(project: Project) -> None:
    plan = make_plan(project.root, "synthetic")
    with project.instance() as instance:
        found = {
            name: instance.get_latest_materialization_event(plan.key(name)).asset_materialization.metadata
            for name in ("library_file", "solution", "frontier")
        }
    assert found["library_file"]["source"].value == "synthetic"
    for name, entry in (("library_file", "picture_metrics.kl_div"), ("solution", "picture"), ("frontier", "picture_0")):
        assert found[name][entry].value.startswith("![") and "data:image/png;base64," in found[name][entry].value
    assert found["frontier"]["page"].value.endswith("/synthetic/index.html")
    assert found["solution"]["solve_seconds"].value > 0
    assert "5 % more" in found["solution"]["what loosening buys"].value


def test_the_duckdb_file_holds_library_solutions_and_choices(project: Project) -> None:
    with duckdb.connect(str(project.workspace.database), read_only=True) as connection:
        counts = [connection.execute(f"SELECT count(*) FROM {t}").fetchone()[0] for t in ("library", "solutions", "choices")]
        query = """SELECT sum(l.value) FROM choices c JOIN library l ON l.layer = c.layer AND l.variant = c.variant AND l.metric = c.number
                   WHERE c.scenario = 'synthetic-memory' AND c.number = 'stats.memory_mib'"""
        (memory,) = connection.execute(query).fetchone()
        loosened = connection.execute('SELECT scenario, "constraint", step, gain FROM loosening ORDER BY gain DESC').fetchall()
        (seconds,) = connection.execute("SELECT min(seconds) FROM solutions").fetchone()
    # two numbers a layer for the pool (what is minimised, what is bounded), three for the other
    assert counts == [16 * 20 * 4, 4, 16 * (3 + 3 * 2)] and memory <= 9900 and seconds > 0
    bounds = {("synthetic-memory", "stats.memory_mib"), ("synthetic-memory", "stats.runtime_ms"), ("synthetic-pool", "stats.num_params")}
    assert {row[:2] for row in loosened} == bounds and loosened[0][3] > 0
    assert ("synthetic-memory", "stats.memory_mib", "1 GiB more") in {row[:3] for row in loosened}


def test_the_pages_are_self_contained_and_made_again_when_one_is_gone(project: Project) -> None:
    folder = project.workspace.var / "reports"
    assert {p.name for p in folder.glob("*.html")} == {"index.html", *(f"{s}.html" for s in SCENARIOS)}
    for page in folder.glob("*.html"):
        text = page.read_text()
        assert "data:image/png;base64," in text and "<script" not in text and "source: synthetic" in text
        assert ("what loosening each bound alone would buy" in text) == (page.name != "index.html")
    (folder / "synthetic-pool.html").unlink()
    assert project.refresh().ran == ["frontier"] and (folder / "synthetic-pool.html").exists()


def test_the_same_numbers_in_another_order_solve_nothing_again(project: Project) -> None:
    file = project.root / "conf" / "libraries" / "synthetic.json"
    before = file.read_text()
    file.write_text(json.dumps(json.loads(before), sort_keys=True))
    assert project.refresh().ran == ["library_file"]
    file.write_text(before)
    assert project.refresh().ran == ["library_file"]


def test_another_number_solves_again(project: Project) -> None:
    file = project.root / "conf" / "libraries" / "synthetic.json"
    before, library = file.read_text(), json.loads(file.read_text())
    library["layer_3"]["noop/noop"]["metrics"]["kl_div"] = 0.0
    file.write_text(json.dumps(library))
    assert set(project.refresh().ran) == {"library_file", "frontier", "tables", *(f"solution[{s}]" for s in SCENARIOS)}
    assert project.workspace.shelf.value("solution", "synthetic-memory")["answers"][0]["choices"]["layer_3"] == "noop/noop"
    file.write_text(before)
    assert project.refresh().ok


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_table_of_rows_is_a_library_as_well(project: Project, kind: str) -> None:
    """The same numbers in long form: the same solutions."""
    numbers = json.loads((project.root / "conf" / "libraries" / "synthetic.json").read_text())
    rows = [
        {"layer": layer, "variant": variant, "metric": f"{group}.{name}", "value": value}
        for layer, variants in numbers.items()
        for variant, content in variants.items()
        for group, values in content.items()
        if isinstance(values, dict)
        for name, value in values.items()
    ]
    path = project.root / "conf" / "libraries" / f"long.{kind}"
    table = pa.Table.from_pylist([{**row, "value": float(row["value"])} for row in rows])
    parquet.write_table(table, path) if kind == "parquet" else csv.write_csv(table, path)
    before = {s: project.workspace.shelf.value("solution", s)["answers"] for s in SCENARIOS}
    project.edit(project.profile_file, library_file=f"conf/libraries/long.{kind}")
    record = project.refresh()
    assert record.ok and "library_file" in record.ran and not record.failed_checks
    value = project.workspace.shelf.value("library_file")
    assert value["file"] == f"conf/libraries/long.{kind}" and value["source"] == []
    for name in SCENARIOS:
        answers = project.workspace.shelf.value("solution", name)["answers"]
        assert [(a["choices"], a["objective"]) for a in answers] == [(a["choices"], a["objective"]) for a in before[name]]
    assert project.refresh().ran == []
    project.edit(project.profile_file, library_file="conf/libraries/synthetic.json")
    assert project.refresh().ok


def test_an_infeasible_scenario_fails_alone_and_leaves_the_frontier(project: Project) -> None:
    file = project.root / "conf" / "scenarios" / "synthetic-memory.yaml"
    before = file.read_text()
    project.edit(file, constraints={"stats.memory_mib": {"at_most": -5}})
    record = project.refresh()
    assert [str(o.item) for o in record.of("failed")] == ["solution[synthetic-memory]"]
    assert "stats.memory_mib can come to 0" in record.of("failed")[0].reasons[0]
    assert {r["scenario"] for r in project.workspace.shelf.value("frontier")["rows"]} == {"synthetic-pool"}
    file.write_text(before)
    assert project.refresh().ok and len(project.workspace.shelf.value("frontier")["rows"]) == 4


@pytest.mark.parametrize(
    ("file", "edit", "message"),
    [
        ("profiles/synthetic.yaml", {"library_file": "conf/libraries/none.json"}, "none.json can't be read"),
        (
            "profiles/synthetic.yaml",
            {"library_file": "../library.json"},
            r"profiles/synthetic\.yaml, line 3: library_file is \.\./library\.json; put it below the project's root",
        ),
        (
            "profiles/synthetic.yaml",
            {"scenarios": ["synthetic-pool", "synthetic-memroy"]},
            r"profiles/synthetic\.yaml, line 6: scenarios names 'synthetic-memroy', but .* did you mean `synthetic-memory`",
        ),
        (
            "scenarios/synthetic-memory.yaml",
            {"minimize": "metrics.kl"},
            r"scenarios/synthetic-memory\.yaml, line 8: minimize can't be summed: .*did you mean 'metrics\.kl_div'",
        ),
        (
            "scenarios/synthetic-memory.yaml",
            {"constraints": {"stats.memory": {"at_most": 1}}},
            r"scenarios/synthetic-memory\.yaml, line 2: constraints\.stats\.memory can't be summed: .*did you mean 'stats\.memory_mib'",
        ),
    ],
)
def test_bad_files_are_found_before_anything_runs(project: Project, file: str, edit: dict[str, Any], message: str) -> None:
    path = project.root / "conf" / file
    before = path.read_text()
    try:
        project.edit(path, **edit)
        with pytest.raises(ValueError, match=message):
            project.refresh()
    finally:
        path.write_text(before)


def test_checks_fail_on_a_hole_and_on_a_solution_that_does_not_add_up(project: Project) -> None:
    file = project.root / "conf" / "libraries" / "synthetic.json"
    before, library = file.read_text(), json.loads(file.read_text())
    del library["layer_3"]["noop/noop"]["stats"]["num_params"]
    file.write_text(json.dumps(library))
    project.edit(project.profile_file, scenarios=["synthetic-memory"])
    record = project.refresh()
    assert record.ok and record.failed_checks == ["library_file: complete"]
    file.write_text(before)
    project.edit(project.profile_file, scenarios=list(SCENARIOS))
    assert project.refresh().ok

    path = project.workspace.shelf.path("solution", "synthetic-memory")
    content = json.loads(path.read_text())
    content["value"]["answers"][0]["choices"]["layer_0"] = "noop/noop"
    sound = path.read_text()
    path.write_text(json.dumps(content))
    definitions = build_definitions(make_plan(project.root, "synthetic"))
    key = dg.AssetCheckKey(dg.AssetKey(["synthetic", "solution"]), "feasible")
    job = definitions.resolve_implicit_global_asset_job_def().get_subset(asset_selection=set(), asset_check_selection={key})
    with project.instance() as instance:
        result = job.execute_in_process(instance=instance, tags={"dagster/partition": "synthetic-memory"}, raise_on_error=False)
        assert [e.passed for e in result.get_asset_check_evaluations()] == [False]
        path.write_text(sound)
        result = job.execute_in_process(instance=instance, tags={"dagster/partition": "synthetic-memory"})
        assert [e.passed for e in result.get_asset_check_evaluations()] == [True]


def test_a_run_of_layers_covers_each_of_them() -> None:
    layers = ("layer_1", "layer_2", "layer_3", "layer_10")
    assert layers_of("layer_2", layers) == ["layer_2"]
    assert layers_of("layer_2-10", layers) == layers_of("layer_2-layer_10", layers) == ["layer_2", "layer_3", "layer_10"]
    with pytest.raises(ForeignLibraryError, match="no layer 'layer_2-11'"):
        layers_of("layer_2-11", layers)


HALF = "version: 1\nlibrary: synthetic\nminimize: metrics.kl_div\nconstraints: {stats.memory_mib: {at_most: 7_424}}\n"


SWEEP = """version: 1
profile: synthetic
sets: constraints.stats.memory_mib.at_most
values: {first: 8_000, last: 9_000, step: 1_000}
scenario: {library: synthetic, minimize: metrics.kl_div}
"""


def test_scenarios_come_and_go_as_those_of_a_parent_do(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PUZZLE_DAG_ROOT", str(project.root))
    file = tmp_path / "half.yaml"
    file.write_text(HALF.replace("memory_mib", "memory"))
    wrong = r"constraints\.stats\.memory can't be summed: .* has no number 'stats\.memory'; did you mean 'stats\.memory_mib'"
    with pytest.raises(ConfigError, match=f"{file}, line 4: {wrong}"):
        add_scenario(project.root, "synthetic", file)
    file.write_text(HALF)
    assert add_scenario(project.root, "synthetic", file).name == "half"
    scenarios = project.root / "conf" / "scenarios"
    (scenarios / "dropped.yaml").write_text(HALF)
    (scenarios / "elsewhere.yaml").write_text(HALF.replace("synthetic", "other"))
    adoption = adopt_scenarios(project.root, "synthetic")
    assert adoption.added == ("dropped",) and not adoption.problems
    sweep = project.root / "conf" / "sweeps" / "memory.yaml"
    sweep.parent.mkdir()
    sweep.write_text(SWEEP.replace("memory_mib", "memory"))
    assert main(["sweep", "--profile", "synthetic"]) == 2
    assert re.search(f"sweep memory, scenario memory-8000, line [0-9]+: {wrong}", capsys.readouterr().err)
    sweep.write_text(SWEEP)
    assert "sweep_memory_schedule" in {s.name for s in build_definitions(make_plan(project.root, "synthetic")).schedules or ()}
    assert main(["sweep", "--profile", "synthetic"]) == 0
    said, limits = capsys.readouterr().out, {"half": 7424, "dropped": 7424, "memory-8000": 8000, "memory-9000": 9000}
    assert "sweep memory: 2 scenarios written, 0 as before, 0 retired" in said
    assert all(f"ran  solution[{name}]" in said for name in limits)
    answers = {name: project.workspace.shelf.value("solution", name)["answers"][0] for name in limits}
    assert all(answers[name]["costs"]["stats.memory_mib"] <= most for name, most in limits.items())
    assert answers["half"]["objective"] > answers["memory-8000"]["objective"] > answers["memory-9000"]["objective"]
    sweep.write_text(SWEEP.replace("first: 8_000", "first: 9_000"))
    swept = write_sweep(project.root, read_sweep(project.root / "conf", "memory"))
    assert (swept.written, swept.unchanged, swept.retired) == ((), ("memory-9000",), ("memory-8000",))
    (scenarios / "elsewhere.yaml").unlink()
    for name in ("half", "dropped", "memory-9000"):
        remove_scenario(project.root, "synthetic", name)
    assert project.workspace.read_foreign_profile().scenarios == SCENARIOS
    assert set(project.refresh().ran) == {"frontier", "tables"}


def test_the_form_asks_for_a_foreign_scenarios_fields(project: Project) -> None:
    job = build_definitions(make_plan(project.root, "synthetic")).resolve_job_def("add_scenario_synthetic_job")
    fields = job.nodes[0].definition.config_schema.config_type.fields
    assert {"name", "library", "minimize", "constraints", "num_solutions", "min_different_layers"} <= set(fields) and "target" not in fields
