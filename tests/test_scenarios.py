"""Scenarios come and go: by file, by folder, by the Launchpad's form and by sweep; the files stay what a person wrote."""

import json
import re
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml
from micro_project import CHECKOUT, Project, make_project

from assets.__main__ import main
from assets.definitions import build_definitions
from assets.form import form_fields
from assets.listing import add_name, remove_name
from assets.plan import make_plan
from assets.scenarios import add_scenario, adopt_scenarios, remove_scenario, write_scenario
from assets.sweeps import write_sweep
from puzzle_dag.config import BatchRange, ConfigError, Scenario
from puzzle_dag.config.sweep import Sweep, read_sweep

PARAMETERS = {"parameters": {"at_most": 0.9, "relative_to": "parent"}}
FORM = {"name": "fast", "target": "micro-eager", "constraints": PARAMETERS, "uptrain": {"tokens": 128}, "refresh": False}


@pytest.fixture(scope="module")
def template(micro_parent_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Project:
    return make_project(tmp_path_factory.mktemp("scenarios"), micro_parent_folder)


@pytest.fixture
def project(template: Project) -> Any:
    """The micro project; what a test does to conf/ is undone."""
    files = {path: path.read_text() for path in (template.root / "conf").rglob("*.yaml")}
    yield template
    for path in (template.root / "conf").rglob("*.yaml"):
        path.unlink()
    for path, text in files.items():
        path.write_text(text)


def named(project: Project) -> tuple[str, ...]:
    return project.workspace.read_profile().scenarios


def text_of(project: Project, name: str = "micro-small") -> str:
    return (project.root / "conf" / "scenarios" / f"{name}.yaml").read_text()


LISTS = [
    "scenarios: [a, b]  # ours\nother: 1\n",
    "scenarios: [a, b,]\n",
    "scenarios: [\n  a,  # one\n  b,  # two\n]\nother: [b]\n",
    "# top\nscenarios:\n  - a  # one\n  - b  # two\nother: {scenarios: [x]}\n",
    "scenarios:\n- a\n- b",
]


@pytest.mark.parametrize("text", LISTS)
def test_a_name_comes_and_goes_and_all_the_rest_stays(text: str) -> None:
    longer = add_name(text, "scenarios", "c", where="f")
    assert yaml.safe_load(longer) == {**yaml.safe_load(text), "scenarios": ["a", "b", "c"]}
    assert re.findall("#.*", longer) == re.findall("#.*", text)
    assert add_name(longer, "scenarios", "c", where="f") == longer
    assert yaml.safe_load(remove_name(longer, "scenarios", "c", where="f")) == yaml.safe_load(text)
    empty = text
    for gone in ("a", "b"):
        empty = remove_name(empty, "scenarios", gone, where="f")
    assert yaml.safe_load(empty)["scenarios"] == [] and remove_name(empty, "scenarios", "a", where="f") == empty
    assert yaml.safe_load(add_name(empty, "scenarios", "z", where="f"))["scenarios"] == ["z"]


@pytest.mark.parametrize("text", ["scenarios: all\n", "other: 1\n", "- a\n"])
def test_what_is_no_list_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"f: field `scenarios` must be a list; write `scenarios: \[a, b\]`"):
        add_name(text, "scenarios", "c", where="f")


def test_a_list_that_cannot_be_edited_safely_is_left_alone() -> None:
    with pytest.raises(ConfigError, match=r"make it `scenarios: \[a, c\]`"):
        add_name("names: &n [a]\nscenarios: *n\n", "scenarios", "c", where="f")


@pytest.mark.parametrize("name", ["../outside", "/tmp/outside", "Upper", "a b", ""])
def test_a_name_that_leaves_the_folder_is_refused(project: Project, name: str) -> None:
    before = sorted(project.root.rglob("*.yaml"))
    with pytest.raises(ConfigError, match="name"):
        write_scenario(project.root, "micro", name, text_of(project))
    with pytest.raises(ConfigError, match="name"):
        remove_scenario(project.root, "micro", name)
    assert sorted(project.root.rglob("*.yaml")) == before


def test_a_mistake_in_a_file_is_told_of_that_file(project: Project, tmp_path: Path) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_text(text_of(project).replace("at_most", "at_mots"))
    with pytest.raises(ConfigError, match=rf"{file}, line 5: field `constraints.parameters.at_mots` is unknown; did you mean `at_most`"):
        add_scenario(project.root, "micro", file)
    file.write_text(text_of(project) + "batch_sizes: [3]\n")
    with pytest.raises(ConfigError, match=rf"{file}, line 8: batch_sizes is \[3\]; target micro-eager measures \[2\]"):
        add_scenario(project.root, "micro", file)
    assert not (project.root / "conf" / "scenarios" / "wrong.yaml").exists()


UNSOLVABLE = [
    ({"target": "micro-eagre"}, "target: micro-eagre", "target is 'micro-eagre', which the profile doesn't measure"),
    ({"structure": {"fixed": {99: "kv4/*"}}}, "99: kv4/*", r"structure\.fixed\.99 names a layer that isn't there; .* layers 0 to 1"),
    ({"structure": {"forbidden": {"all": "kv3/*"}}}, "all: kv3/*", r"structure\.forbidden\.all is 'kv3/\*', which matches no block"),
    ({"pool": {"min_different_layers": 99}}, "min_different_layers: 99", r"pool\.min_different_layers is 99; the parent has 2 layers"),
    ({"structure": {"different_from": ["nobody"]}}, "- nobody", r"structure\.different_from names 'nobody', but .* does not exist"),
    ({"structure": {"different_from": ["unsolvable"]}}, "- unsolvable", r"structure\.different_from leads round in a circle"),
]


@pytest.mark.parametrize(("change", "line", "message"), UNSOLVABLE)
def test_what_a_refresh_would_refuse_is_taken_by_no_way_in(
    project: Project, tmp_path: Path, change: dict[str, Any], line: str, message: str
) -> None:
    text = yaml.safe_dump({**yaml.safe_load(text_of(project)), **change})
    said = rf"line {1 + [written.strip() for written in text.splitlines()].index(line)}: {message}"
    file, dropped = tmp_path / "unsolvable.yaml", project.root / "conf" / "scenarios" / "unsolvable.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=rf"^{file}, {said}"):
        add_scenario(project.root, "micro", file)
    assert not dropped.exists() and named(project) == ("micro-small", "micro-light")
    dropped.write_text(text)
    adoption = adopt_scenarios(project.root, "micro")
    # A target of no profile's is not this one's affair: the file may be another profile's.
    assert [re.match(rf"{dropped}, {said}", p) is not None for p in adoption.problems] == ([] if "target" in change else [True])
    assert not adoption.added and named(project) == ("micro-small", "micro-light")
    # What the file's checks let pass, the refresh's must, and the other way round.
    project.edit(project.profile_file, scenarios=["unsolvable"])
    with pytest.raises(ConfigError, match=rf"^{dropped}, {said}"):
        project.refresh(dry=True)


def test_a_removed_scenario_keeps_its_file_aside_and_can_come_back(project: Project) -> None:
    text = text_of(project)
    moved = remove_scenario(project.root, "micro", "micro-small")
    assert moved == project.root / "conf" / "scenarios" / "retired" / "micro-small.yaml" and moved.read_text() == text
    assert named(project) == ("micro-light",)
    assert adopt_scenarios(project.root, "micro").added == ()  # what was put aside stays there
    with pytest.raises(ConfigError, match="has no scenario 'micro-small'; it has: micro-light"):
        remove_scenario(project.root, "micro", "micro-small")
    add_scenario(project.root, "micro", moved)
    assert named(project) == ("micro-light", "micro-small") and text_of(project) == text


def test_a_file_that_another_profile_needs_stays(project: Project) -> None:
    (project.root / "conf" / "profiles" / "other.yaml").write_text(project.profile_file.read_text())
    assert remove_scenario(project.root, "micro", "micro-small") is None
    assert text_of(project) and named(project) == ("micro-light",)


def test_the_folder_is_followed(project: Project) -> None:
    folder = project.root / "conf" / "scenarios"
    (folder / "dropped.yaml").write_text(text_of(project))
    (folder / "elsewhere.yaml").write_text(text_of(project).replace("micro-eager", "h100-chat"))
    (folder / "broken.yaml").write_text("version: 1\n")
    (folder / "micro-light.yaml").unlink()
    adoption = adopt_scenarios(project.root, "micro")
    assert (adoption.added, adoption.retired) == (("dropped",), ("micro-light",))
    assert len(adoption.problems) == 1 and "broken.yaml" in adoption.problems[0]
    assert named(project) == ("micro-small", "dropped")
    assert adopt_scenarios(project.root, "micro").added == ()


def test_the_sensor_takes_a_dropped_file_in(project: Project) -> None:
    definitions = build_definitions(make_plan(project.root, "micro"))
    sensor = definitions.resolve_sensor_def("conf_micro_sensor")
    (project.root / "conf" / "scenarios" / "dropped.yaml").write_text(text_of(project))
    with dg.DagsterInstance.ephemeral() as instance:
        first = sensor.evaluate_tick(dg.build_sensor_context(instance=instance))
        assert len(first.run_requests or []) == 1 and "dropped" in named(project)
        # its own edit of the profile asks for no second run
        assert not sensor.evaluate_tick(dg.build_sensor_context(instance=instance, cursor=first.cursor)).run_requests
        project.profile_file.write_text("version: 1\nscenarios: [micro-small]\n")
        broken = sensor.evaluate_tick(dg.build_sensor_context(instance=instance, cursor=first.cursor))
        assert not broken.run_requests and "is missing" in (broken.skip_message or "") and broken.cursor == first.cursor


def launch(project: Project, **form: Any) -> dg.ExecuteInProcessResult:
    job = build_definitions(make_plan(project.root, "micro")).resolve_job_def("add_scenario_micro_job")
    with project.instance() as instance:
        return job.execute_in_process(instance=instance, run_config={"ops": {"add_scenario_micro": {"config": form}}}, raise_on_error=False)


def test_the_form_adds_a_scenario(project: Project) -> None:
    assert launch(project, **FORM, description="By form: a colon, # and 'quotes'.", retention_floor=0.5).success
    scenario = project.workspace.read_scenario("fast")
    assert (scenario.description, scenario.retention_floor) == ("By form: a colon, # and 'quotes'.", 0.5)
    assert scenario.constraints["parameters"].at_most == 0.9 and "fast" in named(project)
    with project.instance() as instance:
        assert "fast" in instance.get_dynamic_partitions("micro/scenario")
        assert "child" not in {p for r in instance.get_runs() for p in r.asset_selection or ()}


def test_the_form_replaces_only_when_told(project: Project) -> None:
    assert launch(project, **FORM).success and launch(project, **FORM).success  # the same again is no change
    other = {**FORM, "uptrain": {"tokens": 256}}
    assert not launch(project, **other).success and project.workspace.read_scenario("fast").uptrain.tokens == 128
    assert launch(project, **other, overwrite=True).success and project.workspace.read_scenario("fast").uptrain.tokens == 256


def test_the_form_takes_every_shape_that_the_file_takes(project: Project) -> None:
    shapes = {
        "constraints": {**PARAMETERS, "latency_s": [{"at_most": 9.0}, {"target": "micro-eager", "at_most": 5.0, "at": {"batch": 2}}]},
        "batch_sizes": {"at_least": 2},
        "structure": {"fixed": {1: "kv4/*"}, "forbidden": {"all": ["noop/noop"], 0: "kv1/*"}},
    }
    form = json.loads(json.dumps({**FORM, **shapes}))  # as Dagster keeps a run's config
    job = build_definitions(make_plan(project.root, "micro")).resolve_job_def("add_scenario_micro_job")
    for words in ({}, {"batch_sizes": "all"}, {"batch_sizes": [2]}, {"objective": {"minimize": {"kl": 1.0, "lm_loss": 0.5}}}):
        assert dg.validate_run_config(job, {"ops": {"add_scenario_micro": {"config": {**form, **words}}}})
    assert launch(project, **form).success
    scenario = project.workspace.read_scenario("fast")
    assert [(name, b.target, b.at_most) for name, b in scenario.bounds][:2] == [("latency_s", None, 9.0), ("latency_s", "micro-eager", 5.0)]
    assert scenario.batch_sizes == BatchRange(at_least=2) and scenario.structure.fixed == {1: "kv4/*"}
    assert scenario.structure.forbidden == {"all": ("noop/noop",), 0: ("kv1/*",)}


def test_the_form_says_what_a_field_takes_that_has_no_type() -> None:
    fields = form_fields(Scenario)
    assert (fields["batch_sizes"].description or "").endswith(
        "Takes all, or a list (whole number), or a mapping (at_least: whole number, at_most: whole number). Default: all."
    )
    bound = fields["constraints"].config_type.fields["latency_s"].description
    assert bound.startswith("Takes a mapping (at_least: number, at_most: number, ") and bound.endswith("), or a list of such.")


NOT_OF_THE_FILE = [
    {"name": "../fast"},
    {"retention_floor": 2.0},
    {"constraints": {}},
    {"constraints": {"parameters": {"at_most": "much"}}},
    {"constraints": {"parameters": [{"at_most": 0.9}, {"at_mots": 0.9}]}},
    {"constraints": {"parameters": 5}},
    {"batch_sizes": [3]},
    {"batch_sizes": {"at_mots": 3}},
    {"batch_sizes": 2.5},
    {"structure": {"fixed": {"99": "kv4/*"}}},
    {"structure": {"different_from": ["nobody"]}},
]


@pytest.mark.parametrize("change", NOT_OF_THE_FILE)
def test_what_the_file_may_not_say_the_form_may_not_either(project: Project, change: dict[str, Any]) -> None:
    before = sorted(project.root.glob("conf/**/*.yaml"))
    result = launch(project, **{**FORM, **change})
    assert not result.success and "ConfigError" in str(result.all_node_events[-1].event_specific_data)
    assert sorted(project.root.glob("conf/**/*.yaml")) == before and "fast" not in named(project)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": "nowhere"}, "nowhere"),
        ({"constraints": {"memory": {"at_most": 1}}}, '"memory"'),
        ({"structure": {"max_distinct": "few"}}, "few"),
        ({"objective": {"maximize": "loss"}}, "loss"),
        ({"uptrain": {}}, "tokens"),
        ({"floor": 1}, "floor"),
    ],
)
def test_the_launchpad_finds_mistakes_before_a_run(project: Project, change: dict[str, Any], message: str) -> None:
    job = build_definitions(make_plan(project.root, "micro")).resolve_job_def("add_scenario_micro_job")
    config = {"ops": {"add_scenario_micro": {"config": {**FORM, **change}}}}
    result = dg.validate_run_config(job, {"ops": {"add_scenario_micro": {"config": FORM}}})
    assert result
    with pytest.raises(dg.DagsterInvalidConfigError, match=message):
        dg.validate_run_config(job, config)


SWEEP = {
    "version": 1,
    "profile": "micro",
    "sets": "constraints.memory_bytes.at_most",
    "values": {"first": 0.5, "last": 0.95, "step": 0.05},
    "scenario": {
        "target": "micro-eager",
        "constraints": {"memory_bytes": {"relative_to": "parent", "at": {"batch": 2, "length": 20}}},
        "uptrain": {"tokens": 0},
    },
}


def put_sweep(project: Project, **changes: Any) -> Path:
    path = project.root / "conf" / "sweeps" / "memory.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump({**SWEEP, **changes}))
    return path


def test_a_sweep_writes_its_range_once(project: Project) -> None:
    put_sweep(project)
    swept = write_sweep(project.root, read_sweep(project.root / "conf", "memory"))
    assert swept.written[:2] == ("memory-0.50", "memory-0.55") and len(swept.written) == 10
    values = [project.workspace.read_scenario(n).constraints["memory_bytes"].at_most for n in swept.written]
    assert values == [0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95]
    assert named(project) == ("micro-small", "micro-light", *swept.written)
    again = write_sweep(project.root, read_sweep(project.root / "conf", "memory"))
    assert again.written == again.retired == () and again.unchanged == swept.written


def test_a_sweep_of_another_range_retires_what_fell_out(project: Project) -> None:
    put_sweep(project)
    write_sweep(project.root, read_sweep(project.root / "conf", "memory"))
    put_sweep(project, values={"first": 0.9, "last": 1.0, "step": 0.05})
    swept = write_sweep(project.root, read_sweep(project.root / "conf", "memory"))
    assert (swept.written, swept.unchanged) == (("memory-1.00",), ("memory-0.90", "memory-0.95")) and len(swept.retired) == 8
    assert named(project) == ("micro-small", "micro-light", "memory-0.90", "memory-0.95", "memory-1.00")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": {"first": 0.9, "last": 0.5, "step": 0.1}}, "first 0.9 is above last 0.5"),
        ({"values": {"first": 0.1, "last": 1, "step": 0.0001}}, "9001 values; give a larger step"),
        (
            {"sets": "constraints.memory.at_most"},
            "sweep memory, scenario memory-0.50, line .*`constraints.memory`.*did you mean `memory_bytes`",
        ),
        ({"sets": "target.x"}, "'target' is no mapping"),
        ({"scenario": {"name": "x"}}, "leave it out"),
        ({"sweeps": 1}, "`sweeps` is unknown"),
    ],
)
def test_a_sweep_that_makes_no_sense_writes_nothing(project: Project, change: dict[str, Any], message: str) -> None:
    put_sweep(project, **change)
    before = sorted(project.root.glob("conf/scenarios/*"))
    with pytest.raises(ConfigError, match=message):
        write_sweep(project.root, read_sweep(project.root / "conf", "memory"))
    assert sorted(project.root.glob("conf/scenarios/*")) == before


def test_a_sweep_leaves_files_of_a_person_alone(project: Project) -> None:
    put_sweep(project)
    (project.root / "conf" / "scenarios" / "memory-0.60.yaml").write_text(text_of(project))
    with pytest.raises(ConfigError, match="was not written by sweep memory; rename"):
        write_sweep(project.root, read_sweep(project.root / "conf", "memory"))
    assert named(project) == ("micro-small", "micro-light")


def test_a_sweeps_schedule_is_off_until_it_is_switched_on(project: Project) -> None:
    put_sweep(project, cron="30 2 * * *", timezone="Europe/Berlin")
    definitions = build_definitions(make_plan(project.root, "micro"))
    schedule = definitions.resolve_schedule_def("sweep_memory_schedule")
    assert (schedule.cron_schedule, schedule.execution_timezone) == ("30 2 * * *", "Europe/Berlin")
    assert schedule.default_status == dg.DefaultScheduleStatus.STOPPED
    dg.Definitions.validate_loadable(definitions)


@pytest.mark.parametrize(
    ("scenario", "sets", "levels"),
    [
        ({"objective": {"subject_to": {"a.b": {}, "a": {}}}}, "objective.subject_to.a.b.at_most", ["objective", "subject_to", "a.b"]),
        ({"objective": {"subject_to": {"a": {}}}}, "objective.subject_to.a.b.at_most", ["objective", "subject_to", "a", "b"]),
        ({"library": "l", "constraints": {"x.y": {"at_least": 1}}}, "constraints.x.y.at_most", ["constraints", "x.y"]),
        ({"library": "l"}, "constraints.stats.Memory (MiB).at_most", ["constraints", "stats.Memory (MiB)"]),
        ({"library": "l"}, "num_solutions", []),
    ],
)
def test_a_level_of_a_sweep_may_have_dots_itself(scenario: dict[str, Any], sets: str, levels: list[str]) -> None:
    sweep = Sweep.model_validate({**SWEEP, "name": "s", "sets": sets, "scenario": scenario, "values": {"first": 3, "last": 3, "step": 1}})
    fields = sweep.scenarios()["s-3"]
    for key in levels:
        fields = fields[key]
    assert fields[sets.rpartition(".")[2]] == 3


@pytest.mark.parametrize("sets", ["", ".", "a..b", "a.", "a.b\n"])
def test_what_names_no_field_cannot_be_swept(sets: str) -> None:
    with pytest.raises(ValueError, match="sets"):
        Sweep.model_validate({**SWEEP, "name": "s", "sets": sets})


def test_the_shipped_sweeps_are_valid() -> None:
    paths = list((CHECKOUT / "conf" / "sweeps").glob("*.yaml"))
    assert paths
    for path in paths:
        assert len(read_sweep(CHECKOUT / "conf", path.stem).scenarios()) >= 2


def test_the_commands_add_and_remove(project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("PUZZLE_DAG_ROOT", str(project.root))
    file = tmp_path / "quick.yaml"
    file.write_text(text_of(project))
    assert main(["scenario", "add", str(file), "--profile", "micro"]) == 0 and "quick" in named(project)
    assert main(["scenario", "remove", "quick", "--profile", "micro"]) == 0 and "quick" not in named(project)
    assert "conf/scenarios/retired/quick.yaml" in capsys.readouterr().out
    assert main(["scenario", "remove", "quick", "--profile", "micro"]) == 2
    assert "error: profile micro has no scenario 'quick'" in capsys.readouterr().err
    assert main(["refresh", "--profile", "micro", "--retrain", "child"]) == 2
    assert "--retrain child: takes block_library, uptrained_child" in capsys.readouterr().err
    assert main(["sweep", "--profile", "micro"]) == 2
    assert "has no sweep of profile micro" in capsys.readouterr().err
