"""Configuration: every shipped file is valid and fits its parent, and every bad input is refused with file, field, value and fix."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from transformers import LlamaConfig

from puzzle_dag import preflight
from puzzle_dag.architecture import variant_union
from puzzle_dag.config import (
    ConfigError,
    Profile,
    SearchSpaceSettings,
    check_name,
    is_foreign,
    read_earlier,
    read_foreign_profile,
    read_foreign_scenario,
    read_profile,
    read_scenario,
    read_target,
    resolve_space,
    split_earlier,
    with_earlier,
)
from puzzle_dag.model.configuration_puzzle_dag import PuzzleDagConfig
from puzzle_dag.model.families import to_puzzle_dag_config
from puzzle_dag.preflight import DiskFullError, activations_bytes, check_profile, require_disk, resolve_spaces
from puzzle_dag.pretrain.recipe import read_recipe

CONF = Path(__file__).parents[1] / "conf"
PROFILES = sorted(p.stem for p in (CONF / "profiles").glob("*.yaml") if not is_foreign(CONF, p.stem))
FOREIGN = sorted({p.stem for p in (CONF / "profiles").glob("*.yaml")} - set(PROFILES))


def bundled_shape() -> PuzzleDagConfig:
    return to_puzzle_dag_config(read_recipe(CONF / "pretrain" / "tiny.yaml").shape.to_llama(eos_token_id=0))


def llama_shape(**changes: Any) -> PuzzleDagConfig:
    """The published shape of Llama-3.1-8B, or that with changes."""
    shape: dict[str, Any] = {
        "vocab_size": 128_256,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 131_072,
    }
    return to_puzzle_dag_config(LlamaConfig(**{**shape, **changes}))


MICRO = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,
}
SHAPES = {
    "tiny": bundled_shape,
    "quality": bundled_shape,
    "llama-3.1-8b-h100": llama_shape,
    "llama-3.1-70b-h100": lambda: llama_shape(hidden_size=8192, intermediate_size=28_672, num_hidden_layers=80, num_attention_heads=64),
    "micro": lambda: llama_shape(**MICRO),
}


@pytest.fixture
def conf(tmp_path: Path) -> Path:
    """A copy of the shipped configuration to break."""
    return Path(shutil.copytree(CONF, tmp_path / "conf"))


def edit(path: Path, **fields: Any) -> None:
    """Set fields of a YAML file; "a__b" reaches into a mapping."""
    content = yaml.safe_load(path.read_text())
    for name, value in fields.items():
        *parents, last = name.split("__")
        place = content
        for part in parents:
            place = place[part]
        place[last] = value
    path.write_text(yaml.safe_dump(content, sort_keys=False))


@pytest.mark.parametrize("profile", PROFILES)
def test_every_shipped_profile_fits_its_parent_targets_and_scenarios(profile):
    check_profile(CONF, read_profile(CONF, profile), SHAPES[profile]())


@pytest.mark.parametrize("kind", ["targets", "scenarios"])
def test_every_shipped_target_and_scenario_belongs_to_a_profile(kind):
    read = read_target if kind == "targets" else read_scenario
    foreign = {n for p in FOREIGN for n in getattr(read_foreign_profile(CONF, p), kind)}
    names = {p.stem for p in (CONF / kind).glob("*.yaml")}
    for name in names:
        (read_foreign_scenario if name in foreign else read)(CONF, name)
    assert names == foreign | {n for p in PROFILES for n in getattr(read_profile(CONF, p), kind)}


def test_shipped_targets_measure_each_model_in_two_engines_or_more():
    """One engine's noise would pass for a model's cost; only the tests' own targets take that for speed."""
    engines = {p.stem: read_target(CONF, p.stem).engines_per_probe for p in (CONF / "targets").glob("*.yaml")}
    assert len(engines) > 5 and {name for name, number in engines.items() if number < 2} <= {"micro-eager"}


@pytest.mark.parametrize(("profile", "num_pairs"), [("tiny", 25), ("quality", 42), ("llama-3.1-8b-h100", 54), ("llama-3.1-70b-h100", 54)])
def test_search_spaces_have_the_pairs_that_they_claim(profile, num_pairs):
    spaces = resolve_spaces(read_profile(CONF, profile), SHAPES[profile]())
    assert {len(s.blocks) for s in spaces} == {num_pairs}
    attentions, ffns = variant_union(spaces)
    assert {a.kind for a in attentions} == {"gqa", "linear", "noop"} and {f.kind for f in ffns} == {"swiglu", "linear", "noop"}


def test_shares_become_widths_that_the_kernels_like():
    spaces = resolve_spaces(read_profile(CONF, "llama-3.1-8b-h100"), llama_shape())
    widths = {f.intermediate_size for f in spaces[0].ffns if f.kind == "swiglu"}
    assert widths == {14336, 12544, 10752, 7168, 3584, 2816, 1536}  # 100, 87, 75, 50, 25, 20, 10 %, to multiples of 256


def space(**fields: Any) -> SearchSpaceSettings:
    return SearchSpaceSettings(**{"attention": ("kv4",), "ffn": (0.5,), **fields})


def resolved(settings: SearchSpaceSettings, layer: int = 0) -> tuple[set[str], set[str]]:
    variants = resolve_space(settings, layer=layer, num_layers=4, kv_heads=8, intermediate_size=768)
    return {a.name for a in variants.attentions}, {f.name for f in variants.ffns}


def test_overrides_replace_or_add_for_one_layer_only():
    settings = space(overrides={1: {"ffn": ("noop",)}, 2: {"add_ffn": ("w96",), "add_attention": ("noop",)}})
    assert resolved(settings, 0) == ({"kv8", "kv4"}, {"w768", "w384"})
    assert resolved(settings, 1) == ({"kv8", "kv4"}, {"w768", "noop"})
    assert resolved(settings, 2) == ({"kv8", "kv4", "noop"}, {"w768", "w384", "w96"})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ffn": ("w1024",)}, "search_space.ffn has 'w1024': wider than the parent's 768 channels; use at most w768"),
        ({"ffn": (1.5,)}, "ffn has 1.5: a share must be above 0 and at most 1; write an absolute width as w2"),
        ({"ffn": (-0.5,)}, "ffn has -0.5: a share must be above 0"),
        ({"ffn": ("half",)}, "'half' not understood; write wN, linear or noop"),
        ({"overrides": {0: {"ffn": ("half",)}}}, "search_space.overrides.0.ffn has 'half'"),
        ({"overrides": {0: {"add_attention": ("kv3",)}}}, "search_space.overrides.0.add_attention has 'kv3'"),
        (
            {"attention": ("kv3",)},
            "search_space.attention has 'kv3': the parent's 8 KV heads can't be merged into 3; use one of",
        ),
        ({"attention": ("kv16",)}, "8 KV heads can't be merged into 16"),
        ({"attention": ("kv0",)}, "'kv0' not understood"),
        ({"overrides": {9: {"ffn": ("noop",)}}}, "search_space.overrides.9 names a layer that isn't there; the parent has layers 0 to 3"),
    ],
)
def test_variants_that_the_parent_does_not_allow_are_refused(fields, message):
    with pytest.raises(ConfigError, match="search_space") as caught:
        resolved(space(**fields))
    assert message in str(caught.value)


PROFILE_ERRORS = [
    ({"library__num_tokens": -5}, ["line", "`library.num_tokens`", "greater than or equal to 0", "-5"]),
    ({"tokens__activations": 0}, ["`tokens.activations`", "greater than 0"]),
    ({"tokens__score": 10}, ["`tokens.score` is unknown; did you mean `scores`?"]),
    ({"corpus__worldseed": 3}, ["worldseed` is unknown; did you mean `world_seed`?"]),
    ({"search_space__ffn": []}, ["`search_space.ffn`", "needs at least one variant"]),
    ({"parent": {}}, ["`parent`", "give exactly one of `path`"]),
    ({"parent": {"path": "a", "hub": "b"}}, ["give exactly one of `path`"]),
    ({"library__learning_rate": float("inf")}, ["`library.learning_rate`", "finite"]),
    ({"device": "gpu"}, ["`device`", "'cuda'", "'gpu'"]),
    ({"library__initialisation": "closed"}, ["did you mean `closed_form`?"]),
    ({"targets": ["../../etc/passwd"]}, ["`targets.0`", "../../etc/passwd"]),
    ({"name": "other"}, ["tiny.yaml, line ", "`name` is 'other'", "stem is 'tiny'"]),
    ({"version": 2}, ["`version`", "2"]),
    ({"load_curve": {"concurrencies": [1], "scenarios": ["fast"]}}, ["load_curve.scenarios names fast", "memory-60", "add it there"]),
    ({"speculation": {"scenarios": []}}, ["`speculation.scenarios`", "at least 1 item"]),
    ({"serving__turns": 2}, ["`serving.turns`", "greater than or equal to 3"]),
]


@pytest.mark.parametrize(("fields", "parts"), PROFILE_ERRORS)
def test_profile_errors_name_file_field_value_and_fix(conf, fields, parts):
    path = conf / "profiles" / "tiny.yaml"
    edit(path, **fields)
    with pytest.raises(ConfigError) as caught:
        read_profile(conf, "tiny")
    for part in (str(path), *parts):
        assert part in str(caught.value)


SCENARIO_ERRORS = [
    ({"constraints": {"latency": {"at_most": 1}}}, ["`constraints.latency`", "did you mean `latency_s`?"]),
    ({"constraints": {}}, ["`constraints`", "at least 1"]),
    ({"constraints": {"latency_s": {}}}, ["give `at_least` or `at_most`"]),
    ({"constraints": {"latency_s": {"at_most": -1}}}, ["`constraints.latency_s.at_most`", "-1"]),
    ({"constraints": {"latency_s": {"at_most": 1, "at_least": 2}}}, ["at_least 2.0 is above at_most 1.0"]),
    ({"constraints": {"latency_s": {"at_mots": 1}}}, ["did you mean `at_most`?"]),
    ({"uptrain": {}}, ["`uptrain.tokens` is missing"]),
    ({"retention_floor": 1.1}, ["`retention_floor`", "1.1"]),
    ({"objective": {"minimize": "loss"}}, ["`objective.minimize`", "did you mean"]),
    ({"objective": {"maximise": "throughput"}}, ["`objective.maximise` is unknown", "did you mean `maximize`?"]),
    ({"objective": {"maximize": "throughput"}}, ["`objective`", "give `subject_to"]),
    ({"objective": {"maximize": "throughput", "minimize": "kl"}}, ["give one of `minimize` and `maximize`"]),
    ({"objective": {"maximize": "throughput", "subject_to": {"kl": {"at_mots": 1}}}}, ["`objective.subject_to.kl.at_mots`", "`at_most`?"]),
    ({"objective": {"minimize": {"kl": -1.0}}}, ["minimize.kl is -1", "above 0"]),
    ({"objective": {"minimize": "kl", "at": {"batch": 1}}}, ["so leave it out"]),
    ({"constraints": {"latency_s": 5}}, ["`constraints.latency_s`", "write it as a bound: {at_most: 5}"]),
    ({"constraints": {"latency_s": {"equals": 5}}}, ["`equals` needs `within`"]),
    ({"constraints": {"latency_s": {"at_most": 5, "within": 0.1}}}, ["`within` is the tolerance of `equals`"]),
    ({"constraints": {"parameters": {"equals": 5, "at_most": 6}}}, ["either `equals` or bounds"]),
    ({"constraints": {"latency_s": [{"at_most": 5}, {"at_mots": 5}]}}, ["`constraints.latency_s.1.at_mots`", "did you mean `at_most`?"]),
    ({"constraints": {"latency_s": [{"at_most": 5}, {"at_least": 4}]}}, ["two bounds on target cpu-prefill at the same point"]),
    ({"constraints": {"latency_s": []}}, ["`constraints.latency_s`", "at least 1"]),
    ({"constraints": {"latency_s": {"target": "../x", "at_most": 5}}}, ["`constraints.latency_s.target`", "../x"]),
    ({"structure": {"homogenous": True}}, ["`structure.homogenous`", "did you mean `homogeneous`?"]),
    ({"structure": {"fixed": {0: "kv8"}}}, ["`structure.fixed.0`", "attention/ffn"]),
    ({"structure": {"max_distinct": 0}}, ["`structure.max_distinct`", "0"]),
    ({"structure": {"different_from": ["../x"]}}, ["`structure.different_from.0`", "../x"]),
    ({"pool": {"num_solutions": 0}}, ["`pool.num_solutions`", "0"]),
    ({"batch_sizes": "al"}, ["`batch_sizes`", "did you mean `all`?"]),
    ({"batch_sizes": {"at_least": 9, "at_most": 8}}, ["at_least 9 is above at_most 8"]),
]


@pytest.mark.parametrize(("fields", "parts"), SCENARIO_ERRORS)
def test_scenario_errors_name_file_field_value_and_fix(conf, fields, parts):
    path = conf / "scenarios" / "latency-70.yaml"
    edit(path, **fields)
    with pytest.raises(ConfigError) as caught:
        read_scenario(conf, "latency-70")
    for part in (str(path), *parts):
        assert part in str(caught.value)


def test_a_form_of_a_field_gives_one_error_that_nobody_has_to_decode(conf):
    edit(conf / "scenarios" / "latency-70.yaml", objective={"maximize": "speed"}, batch_sizes=[1, "x"])
    with pytest.raises(ConfigError) as caught:
        read_scenario(conf, "latency-70")
    lines = str(caught.value).splitlines()
    assert len(lines) == 2 and "`objective.maximize`" in lines[0] and "`batch_sizes.1`" in lines[1]
    assert not any("<" in line for line in lines)


def test_constraints_are_one_bound_or_several_and_survive_json(conf):
    path = conf / "scenarios" / "latency-70.yaml"
    several = [{"at_most": 1.0}, {"target": "cpu-chat", "at_most": 2.0, "at": {"batch": 1}}]
    edit(
        path,
        constraints={"latency_s": several, "num_attention_layers": {"equals": 2}},
        structure={"forbidden": {"all": "*/noop", 1: ["x/y"]}},
    )
    scenario = read_scenario(conf, "latency-70")
    assert [(n, b.target, b.words) for n, b in scenario.bounds] == [
        ("latency_s", None, "at most 1"),
        ("latency_s", "cpu-chat", "at most 2"),
        ("num_attention_layers", None, "equal to 2"),
    ]
    assert scenario.targets == ("cpu-prefill", "cpu-chat")
    assert split_earlier(json.loads(json.dumps(with_earlier(scenario, {}), sort_keys=True))) == (scenario, {})


def test_short_names_of_quantities_are_the_full_ones(conf):
    budget = {"kl": {"at_most": 0.2}}
    for word, name, full in (("maximize", "throughput", "throughput_tokens_per_s"), ("minimize", "memory", "memory_bytes")):
        edit(conf / "scenarios" / "latency-70.yaml", objective={word: name, "subject_to": budget}, constraints={})
        assert read_scenario(conf, "latency-70").objective.quantity == full


def test_earlier_scenarios_are_read_along_and_may_not_go_in_a_circle(conf):
    edit(conf / "scenarios" / "latency-70.yaml", structure={"different_from": "memory-60"})
    edit(conf / "scenarios" / "memory-60.yaml", structure={"different_from": ["throughput-1.5x"]})
    scenario = read_scenario(conf, "latency-70")
    earlier = read_earlier(conf, scenario)
    assert list(earlier) == ["memory-60", "throughput-1.5x"]
    content = json.loads(json.dumps(with_earlier(scenario, earlier)))
    assert split_earlier(content)[1]["memory-60"].constraints == earlier["memory-60"].constraints
    edit(conf / "scenarios" / "memory-60.yaml", uptrain={"tokens": 5})
    assert with_earlier(scenario, read_earlier(conf, scenario)) == with_earlier(scenario, earlier)
    edit(conf / "scenarios" / "throughput-1.5x.yaml", structure={"different_from": ["latency-70"]})
    with pytest.raises(
        ConfigError,
        match=r"throughput-1\.5x\.yaml, line \d+: .*a circle, latency-70 -> memory-60 -> throughput-1\.5x -> latency-70; leave one",
    ):
        read_earlier(conf, scenario)
    edit(conf / "scenarios" / "latency-70.yaml", structure={"different_from": ["memory-06"]})
    with pytest.raises(
        ConfigError, match=r"latency-70\.yaml, line \d+: structure\.different_from names 'memory-06', but .* did you mean `memory-60`"
    ):
        check_tiny(conf)


def test_the_examples_of_the_documentation_are_valid(tmp_path):
    text = (CONF.parent / "docs" / "scenario.md").read_text().partition("## Targets")[0]
    whole, *parts = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    examples, of_profiles = [whole], [part for part in parts if part.startswith("# conf/profiles/")]
    for part in of_profiles:
        profile = yaml.safe_load((CONF / "profiles" / "tiny.yaml").read_text())
        Profile.model_validate({**profile, "name": "mine", **yaml.safe_load(part)})
    assert len(of_profiles) == 4
    for part in (part for part in parts if part not in of_profiles):
        options = part.splitlines() if part.startswith("objective") else [part]
        base = {"version": 1, "target": "cpu-prefill", "uptrain": {"tokens": 0}, "constraints": {"latency_s": {"at_most": 1.0}}}
        examples += [yaml.safe_dump({**base, **yaml.safe_load(option)}) for option in options]
    (tmp_path / "scenarios").mkdir()
    for example in examples:
        (tmp_path / "scenarios" / "example.yaml").write_text(example)
        assert read_scenario(tmp_path, "example").target == "cpu-prefill"
    assert len(examples) > 6


def test_errors_name_the_line(conf):
    path = conf / "scenarios" / "latency-70.yaml"
    path.write_text("version: 1\ntarget: cpu-chat\nconstraints:\n  latency_s:\n    at_most: 0\nuptrain: {tokens: 1}\n")
    with pytest.raises(ConfigError, match=r"line 5: field `constraints\.latency_s\.at_most`"):
        read_scenario(conf, "latency-70")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("version: 1\nversion: 1\n", "`version` is there twice"),
        ("- a\n", "must be a mapping"),
        ("a: [\n", "no YAML"),
        ("", "must be a mapping"),
        ("a: !!python/object/apply:os.getcwd []\n", "no YAML"),
    ],
)
def test_files_that_are_no_settings_are_refused(conf, text, message):
    (conf / "targets" / "cpu-chat.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_target(conf, "cpu-chat")


def test_bytes_that_are_no_text_are_refused(conf):
    (conf / "targets" / "cpu-chat.yaml").write_bytes(b"\xff\xfe\x00a")
    with pytest.raises(ConfigError, match="no YAML"):
        read_target(conf, "cpu-chat")


def test_batch_sizes_must_increase(conf):
    edit(conf / "targets" / "cpu-chat.yaml", batch_sizes=[8, 1])
    with pytest.raises(ConfigError, match=r"must be positive and increasing, e\.g\. \[1, 8, 32\]"):
        read_target(conf, "cpu-chat")


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".hidden", "UPPER", "a" * 65, "a b", "a\n", "a'; drop table x"])
def test_names_that_would_leave_the_folder_are_refused(name):
    for read in (read_profile, read_target, read_scenario):
        with pytest.raises(ConfigError, match="name"):
            read(CONF, name)
    with pytest.raises(ConfigError):
        check_name(name)


def test_a_missing_file_lists_what_there_is():
    with pytest.raises(ConfigError, match=r"does not exist; did you mean `cpu-chat`\?; there are: cpu-chat, cpu-chat-precise, cpu-prefill"):
        read_target(CONF, "cpu-chta")


def check_tiny(conf: Path) -> None:
    check_profile(conf, read_profile(conf, "tiny"), bundled_shape())


MISFITS = [
    (
        "profiles/tiny",
        {"targets": ["cpu-chat", "cpu-prefil"]},
        "- cpu-prefil",
        r"targets names 'cpu-prefil', but .*targets/cpu-prefil\.yaml does not exist; did you mean `cpu-prefill`",
    ),
    (
        "profiles/tiny",
        {"scenarios": ["latency-70", "memory-06"]},
        "- memory-06",
        r"scenarios names 'memory-06', but .*scenarios/memory-06\.yaml does not exist; did you mean `memory-60`",
    ),
    (
        "scenarios/latency-70",
        {"target": "gpu-chat"},
        "target: gpu-chat",
        "target is 'gpu-chat', which the profile doesn't measure; use one of cpu-chat, cpu-prefill",
    ),
    ("scenarios/latency-70", {"target": "cpu-cha"}, "target: cpu-cha", r"target is 'cpu-cha'.*did you mean cpu-chat"),
    (
        "scenarios/latency-70",
        {"constraints__latency_s__target": "gpu-chat"},
        "target: gpu-chat",
        r"constraints\.latency_s\.target is 'gpu-chat', which the profile doesn't measure",
    ),
    (
        "scenarios/latency-70",
        {"constraints": {"latency_s": [{"at_most": 9.0}, {"at_most": 1.0, "at": {"batch": 5}}]}},
        "batch: 5",
        r"constraints\.latency_s\.1\.at\.batch is 5; target cpu-prefill measures",
    ),
    (
        "scenarios/latency-70",
        {"batch_sizes": {"at_least": 17}},
        "batch_sizes:",
        r"batch_sizes leaves none; target cpu-prefill measures \[2, 4, 8\]",
    ),
    (
        "scenarios/latency-70",
        {"objective": {"maximize": "throughput", "at": {"batch": 5}, "subject_to": {"kl": {"at_most": 1}}}},
        "batch: 5",
        r"objective\.at\.batch is 5; target cpu-prefill measures",
    ),
    (
        "scenarios/latency-70",
        {"structure": {"fixed": {6: "kv8/*"}}},
        "6: kv8/*",
        r"structure\.fixed\.6 names a layer that isn't there; .* 0 to 5",
    ),
    (
        "scenarios/latency-70",
        {"structure": {"forbidden": {"all": "kv3/*"}}},
        "all: kv3/*",
        r"structure\.forbidden\.all is 'kv3/\*', which matches no block of the search space: kv1",
    ),
    (
        "scenarios/latency-70",
        {"pool": {"min_different_layers": 7}},
        "min_different_layers: 7",
        r"pool\.min_different_layers is 7; the parent has 6 layers",
    ),
    (
        "scenarios/latency-70",
        {"structure": {"min_different_layers": 99}},
        "min_different_layers: 99",
        r"structure\.min_different_layers is 99; the parent has 6 layers",
    ),
    (
        "scenarios/latency-70",
        {"structure": {"different_from": ["memory-60", "nobody"]}},
        "- nobody",
        r"structure\.different_from names 'nobody', but .*scenarios/nobody\.yaml does not exist",
    ),
    ("scenarios/latency-70", {"batch_sizes": [8, 9]}, "batch_sizes:", r"batch_sizes is \[8, 9\]; target cpu-prefill measures \[2, 4, 8\]"),
    (
        "scenarios/latency-70",
        {"constraints__latency_s__at": {"batch": 5}},
        "batch: 5",
        r"constraints\.latency_s\.at\.batch is 5; target cpu-prefill measures",
    ),
    (
        "targets/cpu-chat",
        {"input_length": 2048},
        "input_length: 2048",
        r"input_length \+ output_length is 2072; the parent takes at most 1024",
    ),
    ("profiles/tiny", {"tokens__row_length": 2048}, "row_length: 2048", r"tokens\.row_length is 2048; the parent takes at most 1024"),
    ("profiles/tiny", {"tokens__scores": 100}, "scores: 100", r"tokens\.scores is 100, less than one row of 256; give at least 256"),
    (
        "profiles/tiny",
        {"search_space__ffn": [1.0, "w1024"]},
        "- w1024",
        r"search_space\.ffn has 'w1024': wider than the parent's 768 channels; use at most w768",
    ),
    (
        "profiles/tiny",
        {"search_space__overrides": {2: {"ffn": [0.5, 1.5]}}},
        "- 1.5",
        r"search_space\.overrides\.2\.ffn has 1\.5: a share must be above 0",
    ),
    (
        "profiles/tiny",
        {"search_space__overrides": {2: {"add_attention": ["kv3"]}}},
        "- kv3",
        r"search_space\.overrides\.2\.add_attention has 'kv3': the parent's 8 KV heads can't be merged into 3; use one of",
    ),
    ("profiles/tiny", {"search_space__overrides": {6: {"ffn": [0.5]}}}, "6:", r"search_space\.overrides\.6 names a layer that isn't there"),
    (
        "profiles/tiny",
        {"search_space__runs": {"max_layers": 7}},
        "max_layers: 7",
        r"search_space\.runs\.max_layers is 7, more than the parent's 6 layers",
    ),
    (
        "profiles/tiny",
        {"search_space__runs": {"layers": ["0-1", "4-6"]}},
        "- 4-6",
        r"search_space\.runs\.layers has 4-6, but the parent has layers 0 to 5; end the run there",
    ),
]


@pytest.mark.parametrize(("file", "fields", "line", "message"), MISFITS)
def test_files_that_do_not_fit_each_other_or_the_parent_are_refused(conf, file, fields, line, message):
    path = conf / f"{file}.yaml"
    edit(path, **fields)
    with pytest.raises(ConfigError) as caught:
        check_tiny(conf)
    found = re.fullmatch(rf"{re.escape(str(path))}, line (\d+): {message}.*", str(caught.value))
    assert found is not None, caught.value
    assert path.read_text().splitlines()[int(found[1]) - 1].strip() == line


def test_activations_of_an_8b_parent_are_counted_exactly():
    assert activations_bytes(llama_shape(), 1_048_576) == 33 * 1_048_576 * 4096 * 2
    assert activations_bytes(llama_shape(**MICRO), 10, "float32") == 3 * 10 * 64 * 4


def test_a_full_disk_is_an_error_before_the_compute(tmp_path, monkeypatch):
    asked = []

    def disk_usage(path):
        asked.append(Path(path))
        return SimpleNamespace(total=2**40, used=2**40 - 2**30, free=2**30)

    monkeypatch.setattr(preflight.shutil, "disk_usage", disk_usage)
    with pytest.raises(DiskFullError, match=r"activations need 277\.20 GiB on the disk of .*, which has 1\.00 GiB free; free some"):
        require_disk(tmp_path / "not" / "there", activations_bytes(llama_shape(), 1_048_576), "the activations")
    require_disk(tmp_path / "not" / "there", 2**29, "the activations")
    assert asked == [tmp_path, tmp_path]
