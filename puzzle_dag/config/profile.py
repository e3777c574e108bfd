"""A profile: one parent, its corpus, its search space, and the budgets of every stage (conf/profiles/NAME.yaml)."""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from puzzle_dag.config.foreign import ForeignProfile, is_foreign, read_foreign_profile
from puzzle_dag.config.online import LoadCurveSettings, ServingSettings, SpeculationSettings
from puzzle_dag.config.reading import ConfigError, Name, Settings, check_name, locate, read_settings
from puzzle_dag.config.refinement import RefinementSettings
from puzzle_dag.config.space import SearchSpaceSettings
from puzzle_dag.config.trial import TrialSettings


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
    shape: Name | None = Field(default=None, exclude_if=lambda value: value is None)
    """Name of a file in conf/shapes that says what the checkpoint's config.json would, so that planning and measuring need nothing
    of a gated or absent checkpoint; held against the checkpoint when that is loaded."""

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


_SCORE_COLUMNS = (
    "layer", "block", "kl", "lm_loss", "top1_agreement", "top1_loss", "num_tokens", "digest", "run", "num_layers", "blocks", "digests",
)  # fmt: skip
_LIBRARY_PREFIX = "stdlib_"
BUNDLED_TASK_PREFIXES = ("skill_", _LIBRARY_PREFIX)
"""How the names of our own lm-eval tasks begin; every other name is looked up among lm-eval's."""


def ask_python_library(tasks: Iterable[str]) -> bool:
    """Say whether items of one of these tasks are drawn from the library of the Python that runs."""
    return any(task.startswith(_LIBRARY_PREFIX) for task in tasks)


class AccuracySettings(Settings):
    """What lm-eval grades parent and children on."""

    tasks: tuple[str, ...]
    """lm-eval task names; `skill_NAME`, `stdlib_cloze` and `stdlib_perplexity` are the bundled, local ones."""
    num_items: int = Field(default=500, gt=0)
    """Items a task."""
    task_items: dict[str, Annotated[int, Field(gt=0)]] = Field(default_factory=dict)
    """Items of single bundled tasks, in place of `num_items`: a task that children fail more often needs more for the same error."""
    batch_size: int = Field(default=32, gt=0)
    """Requests a batch."""
    num_fewshot: int = Field(default=0, ge=0)
    """Solved examples before each question (hub tasks)."""

    @model_validator(mode="after")
    def _items_of_tasks_of_ours(self) -> "AccuracySettings":
        for name in self.task_items:
            if name not in self.tasks or not name.startswith(BUNDLED_TASK_PREFIXES):
                ours = [t for t in self.tasks if t.startswith(BUNDLED_TASK_PREFIXES)]
                raise ValueError(f"task_items names {name!r}, which is no bundled task of this profile; they are {ours}")
        return self


class TaskScoreSettings(Settings):
    """What each block, alone in the parent, is graded on, so that scenarios can minimise what tasks lose."""

    tasks: tuple[str, ...] = Field(min_length=1)
    """lm-eval tasks with an accuracy; `skill_NAME` and `stdlib_cloze` are the bundled, local ones."""
    num_items: int = Field(default=32, gt=0)
    """Items a task: every pair of every layer answers them all."""
    batch_size: int = Field(default=32, gt=0)
    """Requests a batch."""
    num_fewshot: int = Field(default=0, ge=0)
    """Solved examples before each question (hub tasks)."""
    seed: int = Field(default=1, ge=0)
    """Seed of the bundled tasks' items. Another than the profile's: children are graded on that one's items."""

    @field_validator("tasks")
    @classmethod
    def _are_scores(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if name == "stdlib_perplexity":
                raise ValueError("stdlib_perplexity is no accuracy; every block has `lm_loss`, so leave it out")
            if name in _SCORE_COLUMNS:
                raise ValueError(f"a task can't be called {name!r}, as a column of the score table is")
        return value

    @property
    def grading(self) -> AccuracySettings:
        """The settings of lm-eval."""
        return AccuracySettings(tasks=self.tasks, num_items=self.num_items, batch_size=self.batch_size, num_fewshot=self.num_fewshot)


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
    task_scores: TaskScoreSettings | None = None
    """Grades of each block, alone in the parent, on lm-eval tasks; none unless given."""
    refinement: RefinementSettings | None = None
    """Solutions improved with scores taken inside the child; as the search found them unless given."""
    trial: TrialSettings | None = None
    """Solutions tried on the engine before anything is trained, and searched again where they miss their bounds; not unless given."""
    serving: ServingSettings = ServingSettings()
    """Parent and children on the engine, by turns."""
    load_curve: LoadCurveSettings | None = None
    """Parent and children behind `vllm serve`, under load; not measured unless given."""
    speculation: SpeculationSettings | None = None
    """Children as draft models of their parent; not measured unless given."""
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

    @model_validator(mode="after")
    def _other_items(self) -> "Profile":
        if self.task_scores is not None and self.task_scores.seed == self.seed:
            raise ValueError(f"task_scores.seed is {self.seed}, the profile's: blocks would be chosen by the items that grade the children")
        return self

    @model_validator(mode="after")
    def _measures_its_own_scenarios(self) -> "Profile":
        for field, settings in (("load_curve", self.load_curve), ("speculation", self.speculation)):
            unknown = [name for name in (settings.scenarios if settings else None) or () if name not in self.scenarios]
            if unknown:
                there = ", ".join(self.scenarios)
                fix = "add it there, or take it out here"
                raise ValueError(f"{field}.scenarios names {unknown[0]}, none of the profile's `scenarios` ({there}); {fix}")
        return self

    @model_validator(mode="after")
    def _can_refine(self) -> "Profile":
        if self.refinement is not None and self.search_space.runs is not None:
            raise ValueError("refinement doesn't go with search_space.runs, which are scored in the parent alone; leave one of them out")
        if self.refinement is not None and self.refinement.tokens is not None:
            given, row, most = self.refinement.tokens, self.tokens.row_length, self.tokens.scores
            if not row <= given <= most:
                raise ValueError(f"refinement.tokens is {given}; give at least one row ({row}) and at most tokens.scores ({most})")
        return self


def read_any_profile(conf: Path, name: str) -> Profile | ForeignProfile:
    """Read conf/profiles/NAME.yaml, be it of a parent or of a foreign library. Raises ConfigError."""
    return read_foreign_profile(conf, name) if is_foreign(conf, name) else read_profile(conf, name)


def profile_file(conf: Path, name: str) -> Path:
    """Return the path of a profile's file. Raises ConfigError for a name that would leave the folder."""
    return conf / "profiles" / f"{check_name(name)}.yaml"


def read_profile(conf: Path, name: str) -> Profile:
    """Read conf/profiles/NAME.yaml. Raises ConfigError, also where it is a foreign library's."""
    path = profile_file(conf, name)
    if is_foreign(conf, name):
        where = locate(path, ("library_file",))
        raise ConfigError(f"{where}: it has no `parent`, but a library that someone else measured; use a profile with a parent here")
    return read_settings(Profile, path)
