"""What a user configures: a profile (parent, corpus, search space, budgets), targets and scenarios.

Each is one YAML file under conf/profiles/, conf/targets/ or conf/scenarios/; the file's stem is its name.
Everything is validated before any compute is spent, and an error names the file, the field, the value and the fix.
"""

import difflib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from puzzle_dag.architecture import FFN, Attention, LayerSpace

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]{0,63}$")]
_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")


class ConfigError(ValueError):
    """A configuration that can't be used; the message names the file, the field, the value and the fix."""


class Settings(BaseModel):
    """What all configuration has in common: unknown keys are errors, values don't change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ParentSource(Settings):
    """Where the parent comes from: exactly one of a local folder and a hub id."""

    path: str | None = None
    """Folder of a Hugging Face checkpoint, relative to the project's root."""
    hub: str | None = None
    """Hugging Face hub id."""
    revision: str | None = None
    """Hub revision (branch, tag or commit)."""
    trust_remote_code: bool = False
    """Run code that comes with the checkpoint. Off unless turned on here."""

    @model_validator(mode="after")
    def _one_source(self) -> "ParentSource":
        if (self.path is None) == (self.hub is None):
            raise ValueError("give exactly one of `path` (a local folder) and `hub` (a hub id)")
        return self


class BundledCorpus(Settings):
    """Our own generator of skills, mixed with Python's standard library."""

    kind: Literal["bundled"]
    """Says which corpus this is."""
    world_seed: int = Field(default=7, ge=0)
    """Seed of the invented world; the parent's."""
    skill_share: float = Field(default=0.72, ge=0, le=1)
    """Share of skill tokens."""


class TextCorpus(Settings):
    """Local text files, split by a hash of the file name, or a hub data set, split by its own splits."""

    kind: Literal["text"]
    """Says which corpus this is."""
    files: str | None = None
    """Glob of UTF-8 text files, relative to the project's root."""
    hub: str | None = None
    """Hub id of a data set."""
    subset: str | None = None
    """Configuration name of the data set."""
    text_field: str = "text"
    """Column that holds the text."""

    @model_validator(mode="after")
    def _one_source(self) -> "TextCorpus":
        if (self.files is None) == (self.hub is None):
            raise ValueError("give exactly one of `files` (a glob) and `hub` (a data-set id)")
        return self


class LayerOverride(Settings):
    """Another space for one layer."""

    attention: tuple[str, ...] | None = None
    """Attention variants of this layer."""
    ffn: tuple[str | float, ...] | None = None
    """FFN variants of this layer."""
    add_attention: tuple[str, ...] = ()
    """Attention variants beside the space's own."""
    add_ffn: tuple[str | float, ...] = ()
    """FFN variants beside the space's own."""


class SearchSpaceSettings(Settings):
    """Which variants a layer may take. The parent's own attention and FFN are always candidates."""

    attention: tuple[str, ...]
    """Attention variants: kvN, linear, noop."""
    ffn: tuple[str | float, ...]
    """FFN variants: a share of the parent's width (0.5), an absolute width (w384), linear, noop."""
    width_multiple: int = Field(default=32, gt=0)
    """Shares are rounded to a multiple of this (256 suits GPU kernels)."""
    overrides: dict[int, LayerOverride] = {}
    """Layer index -> another space for that layer."""

    @field_validator("attention", "ffn")
    @classmethod
    def _not_empty(cls, value: tuple[Any, ...]) -> tuple[Any, ...]:
        if not value:
            raise ValueError("needs at least one variant")
        return value


class LibrarySettings(Settings):
    """How a variant is initialised and trained (block-wise local distillation)."""

    initialisation: Literal["paper", "closed_form"] = "paper"
    """The paper's initialisations, or least squares on the cached activations."""
    num_tokens: int = Field(ge=0)
    """Tokens each variant is trained on, epochs over the cached activations included; 0 leaves it untrained."""
    rows_per_step: int = Field(default=16, gt=0)
    """Rows an optimiser step."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """Peak learning rate of AdamW."""
    seed: int = Field(default=0, ge=0)
    """Seed of the order of the rows."""


class UptrainSettings(Settings):
    """Global knowledge distillation of an assembled child."""

    rows_per_step: int = Field(default=16, gt=0)
    """Rows an optimiser step."""
    learning_rate: float = Field(default=5e-4, gt=0)
    """Peak learning rate of AdamW."""
    seed: int = Field(default=0, ge=0)
    """Seed of the order of the rows."""


class AccuracySettings(Settings):
    """What lm-eval grades parent and children on."""

    tasks: tuple[str, ...]
    """lm-eval task names; `skill_NAME`, `stdlib_cloze` and `stdlib_perplexity` are the bundled, local ones."""
    num_items: int = Field(default=500, gt=0)
    """Items a task."""
    batch_size: int = Field(default=32, gt=0)
    """Requests a batch."""
    num_fewshot: int = Field(default=0, ge=0)
    """Solved examples before each question (hub tasks)."""


class TokenBudgets(Settings):
    """Tokens a stage reads. No two stages share a token, save that the library trains on the activations' tokens."""

    activations: int = Field(gt=0)
    """Tokens whose hidden states are cached; what variants are initialised from and trained on."""
    scores: int = Field(gt=0)
    """Tokens that every block is scored on; nothing is trained on them."""
    row_length: int = Field(default=256, gt=8)
    """Tokens a row."""


class Profile(Settings):
    """One parent and everything about how its children are found."""

    version: Literal[1]
    """Version of this file format."""
    name: Name
    """The file's stem; the prefix of all asset keys."""
    parent: ParentSource
    """The model to compress."""
    corpus: Annotated[BundledCorpus | TextCorpus, Field(discriminator="kind")]
    """The text to do it with."""
    search_space: SearchSpaceSettings
    """Which variants a layer may take."""
    tokens: TokenBudgets
    """Token budgets."""
    library: LibrarySettings
    """Training of the variants."""
    uptrain: UptrainSettings
    """Training of the children."""
    accuracy: AccuracySettings
    """Grading."""
    targets: tuple[Name, ...]
    """Names of target files that this profile measures."""
    scenarios: tuple[Name, ...]
    """Names of scenario files that this profile solves."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where training and scoring run."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute type of training and scoring."""
    seed: int = Field(default=0, ge=0)
    """Seed of everything that has no seed of its own."""


class Target(Settings):
    """Hardware, engine and workload that costs are measured for."""

    version: Literal[1]
    """Version of this file format."""
    name: Name
    """The file's stem; the partition key."""
    hardware: Literal["local-cpu", "h100", "h200", "rtx4090"]
    """What the engine runs on; `local-cpu` is the machine at hand, whatever it is, and is recorded by its model name."""
    engine: Literal["vllm"] = "vllm"
    """The serving engine."""
    mode: Literal["eager", "compiled"] = "eager"
    """Eager, or compiled with CUDA graphs on GPUs: whatever will serve."""
    multiprocess: bool = False
    """Engine core in a process of its own, as `vllm serve` runs it."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Type of weights and activations."""
    quantization: str | None = None
    """vLLM's name of a weight quantisation."""
    kv_cache_dtype: str = "auto"
    """vLLM's name of the KV cache's type."""
    tensor_parallel_size: int = Field(default=1, gt=0)
    """GPUs a layer is spread over."""
    input_length: int = Field(gt=0)
    """Prompt tokens a request."""
    output_length: int = Field(gt=0)
    """Generated tokens a request."""
    batch_sizes: tuple[int, ...] = Field(min_length=1)
    """Concurrent requests that are measured."""
    num_probes: int | None = Field(default=None, gt=0)
    """Probe models; by default as many as the unknowns ask for."""
    engines_per_probe: int = Field(default=2, gt=0)
    """Engines each probe is measured in."""
    repeats: int = Field(default=5, gt=1)
    """Timed repeats an engine; the median counts."""

    @field_validator("batch_sizes")
    @classmethod
    def _positive_and_increasing(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if any(b <= 0 for b in value) or list(value) != sorted(set(value)):
            raise ValueError(f"{list(value)} must be positive and increasing, e.g. [1, 8, 32]")
        return value


class At(Settings):
    """The workload point at which a constraint holds."""

    batch: int = Field(gt=0)
    """Concurrent requests."""
    length: int | None = Field(default=None, gt=0)
    """Tokens a sequence (memory and KV)."""


class Bound(Settings):
    """A lower or an upper bound, absolute or as a multiple of the parent's value."""

    at_least: float | None = Field(default=None, gt=0)
    """Lower bound."""
    at_most: float | None = Field(default=None, gt=0)
    """Upper bound."""
    relative_to: Literal["parent"] | None = None
    """Read the bound as a multiple of the parent's own value on the same target."""
    at: At | None = None
    """Where it holds; by default at the batch size that is solved for and the target's lengths."""

    @model_validator(mode="after")
    def _a_bound(self) -> "Bound":
        if self.at_least is None and self.at_most is None:
            raise ValueError("give `at_least` or `at_most`")
        return self


ConstraintName = Literal[
    "throughput_tokens_per_s", "latency_s", "ttft_s", "tpot_s", "memory_bytes", "parameters", "kv_bytes_per_token", "num_attention_layers"
]


class Objective(Settings):
    """What the search minimises."""

    minimize: Literal["kl", "lm_loss", "top1_loss"] = "kl"
    """The score that is summed over the layers."""


class UptrainBudget(Settings):
    """How long a child is healed."""

    tokens: int = Field(ge=0)
    """Tokens of global knowledge distillation; 0 leaves the child as assembled."""


class Scenario(Settings):
    """One deployment to find a child for."""

    version: Literal[1]
    """Version of this file format."""
    name: Name
    """The file's stem; the partition key."""
    description: str = ""
    """What it is for, in words."""
    target: Name
    """The target whose costs bound the child."""
    objective: Objective = Objective()
    """What is minimised."""
    constraints: dict[ConstraintName, Bound] = Field(min_length=1)
    """What the child must meet."""
    batch_sizes: Literal["all"] | tuple[int, ...] = "all"
    """The target's batch sizes that may serve; each is solved, the best feasible one is kept."""
    uptrain: UptrainBudget
    """How long the child is healed."""
    retention_floor: float = Field(default=0.9, gt=0, le=1)
    """Share of the parent's accuracy, corrected for chance, below which the asset check fails."""


_Model = TypeVar("_Model", bound=Settings)


def check_name(name: str) -> str:
    """Return a name that is safe as a file name, partition key and SQL value. Raises ConfigError otherwise."""
    if not _NAME.fullmatch(name):
        raise ConfigError(f"name {name!r} must be lower-case letters, digits, '.', '_' and '-', at most 64, starting with a letter or digit")
    return name


def _known_keys(model: type[BaseModel]) -> set[str]:
    keys = set(model.model_fields)
    for field in model.model_fields.values():
        for candidate in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                keys |= _known_keys(candidate)
    return keys


def _explain(error: ValidationError, model: type[BaseModel], path: Path) -> str:
    lines = []
    for problem in error.errors():
        field = ".".join(str(p) for p in problem["loc"])
        message = f"{path}: field `{field}`: {problem['msg']}"
        if problem["type"] == "extra_forbidden":
            near = difflib.get_close_matches(str(problem["loc"][-1]), _known_keys(model), n=1)
            message = f"{path}: field `{field}` is unknown" + (f"; did you mean `{near[0]}`?" if near else "")
        elif problem["type"] != "missing":
            message += f" (got {problem['input']!r})"
        lines.append(message)
    return "\n".join(lines)


def read_settings(model: type[_Model], path: Path) -> _Model:
    """Read and validate one YAML file whose `name` is the file's stem.

    Raises:
        ConfigError: the file is missing, is no YAML mapping, or a field is missing, unknown or out of range.
    """
    try:
        raw = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        near = sorted(p.stem for p in path.parent.glob("*.yaml"))
        raise ConfigError(f"{path} does not exist; there are: {', '.join(near) or 'none'}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: no YAML: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: must be a mapping of fields, got {type(raw).__name__}")
    raw.setdefault("name", path.stem)
    try:
        settings = model.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(_explain(error, model, path)) from error
    if raw["name"] != path.stem:
        raise ConfigError(f"{path}: field `name` is {raw['name']!r}, but the file's stem is {path.stem!r}; make them equal")
    return settings


def read_profile(conf: Path, name: str) -> Profile:
    """Read conf/profiles/NAME.yaml. Raises ConfigError."""
    return read_settings(Profile, conf / "profiles" / f"{check_name(name)}.yaml")


def read_target(conf: Path, name: str) -> Target:
    """Read conf/targets/NAME.yaml. Raises ConfigError."""
    return read_settings(Target, conf / "targets" / f"{check_name(name)}.yaml")


def read_scenario(conf: Path, name: str) -> Scenario:
    """Read conf/scenarios/NAME.yaml. Raises ConfigError."""
    return read_settings(Scenario, conf / "scenarios" / f"{check_name(name)}.yaml")


def _resolve_attention(names: Iterable[str], kv_heads: int) -> tuple[Attention, ...]:
    variants = {Attention("gqa", kv_heads)}
    for name in names:
        variant = Attention.parse(name)
        if variant.kind == "gqa" and (variant.kv_heads > kv_heads or kv_heads % variant.kv_heads):
            raise ConfigError(f"search_space.attention: {name}: the parent's {kv_heads} KV heads can't be merged into {variant.kv_heads}; use a divisor")
        variants.add(variant)
    return tuple(sorted(variants))


def _resolve_ffn(names: Iterable[str | float], width: int, multiple: int) -> tuple[FFN, ...]:
    variants = {FFN("swiglu", width)}
    for name in names:
        if isinstance(name, str):
            variant = FFN.parse(name)
        elif 0 < name <= 1:
            variant = FFN("swiglu", width if name == 1 else max(multiple, round(name * width / multiple) * multiple))
        else:
            raise ConfigError(f"search_space.ffn: share {name} must be above 0 and at most 1; write an absolute width as w{round(name)}")
        if variant.intermediate_size > width:
            raise ConfigError(f"search_space.ffn: {name}: wider than the parent's {width} channels; use at most w{width}")
        variants.add(variant)
    return tuple(sorted(variants))


def resolve_space(settings: SearchSpaceSettings, *, layer: int, num_layers: int, kv_heads: int, intermediate_size: int) -> LayerSpace:
    """Return the variants of one layer, the parent's own included, from the space and its override.

    Raises:
        ConfigError: a width above the parent's, KV heads that don't divide, an unknown variant, a layer that isn't there.
    """
    beyond = [i for i in settings.overrides if not 0 <= i < num_layers]
    if beyond:
        raise ConfigError(f"search_space.overrides: layer {beyond[0]} isn't there; the parent has layers 0 to {num_layers - 1}")
    override = settings.overrides.get(layer, LayerOverride())
    attention = (settings.attention if override.attention is None else override.attention) + override.add_attention
    ffn = (settings.ffn if override.ffn is None else override.ffn) + override.add_ffn
    try:
        return LayerSpace(_resolve_attention(attention, kv_heads), _resolve_ffn(ffn, intermediate_size, settings.width_multiple))
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"search_space, layer {layer}: {error}") from error
