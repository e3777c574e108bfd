"""A scenario: the constraints of one deployment, for which a child is searched (conf/scenarios/NAME.yaml)."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, ValidationInfo, field_validator, model_validator

from puzzle_dag.config.objective import ConstraintName, Objective
from puzzle_dag.config.reading import At, Name, Settings, check_name, misfit, read_named, read_settings
from puzzle_dag.config.structure import PoolSettings, StructureSettings

COUNTS: tuple[ConstraintName, ...] = ("parameters", "kv_bytes_per_token", "num_attention_layers")
"""Constraints on whole numbers of the architecture alone: an equality needs no tolerance, and a batch size no meaning."""

TIMED: tuple[ConstraintName, ...] = ("throughput_tokens_per_s", "latency_s", "ttft_s", "tpot_s")
"""Quantities that were measured at the target's batch sizes and lengths, and only there."""


class Bound(Settings):
    """A lower bound, an upper bound, both, or an equality; absolute or as a multiple of the parent's value."""

    at_least: float | None = Field(default=None, gt=0)
    """Lower bound."""
    at_most: float | None = Field(default=None, gt=0)
    """Upper bound."""
    equals: float | None = Field(default=None, ge=0)
    """The value itself."""
    within: float | None = Field(default=None, gt=0, lt=1)
    """Share of `equals` by which the value may differ from it, up or down; counts may leave it out and are then met exactly."""
    relative_to: Literal["parent"] | None = None
    """Read the bound as a multiple of the parent's own value on the same target."""
    target: Name | None = None
    """The target whose costs are bounded; by default the scenario's own."""
    at: At | None = None
    """Where it holds; by default at the batch size that is solved for and the target's lengths."""

    @model_validator(mode="before")
    @classmethod
    def _not_bare(cls, value: Any) -> Any:
        if isinstance(value, int | float | str):
            raise ValueError(f"write it as a bound: {{at_most: {value}}} or {{at_least: {value}}}")
        return value

    @model_validator(mode="after")
    def _a_bound(self) -> "Bound":
        if self.equals is None and self.at_least is None and self.at_most is None:
            raise ValueError("give `at_least` or `at_most`, or `equals`")
        if self.equals is not None and (self.at_least is not None or self.at_most is not None):
            raise ValueError("give either `equals` or bounds (`at_least`, `at_most`), not both")
        if self.equals is None and self.within is not None:
            raise ValueError("`within` is the tolerance of `equals`, which isn't given; leave it out")
        if self.at_least is not None and self.at_most is not None and self.at_least > self.at_most:
            raise ValueError(f"at_least {self.at_least} is above at_most {self.at_most}; no value is both")
        return self

    @property
    def lowest(self) -> float | None:
        """The lower bound; of an equality, what is left of it by the tolerance."""
        return self.at_least if self.equals is None else self.equals * (1 - (self.within or 0.0))

    @property
    def highest(self) -> float | None:
        """The upper bound; of an equality, what it is raised to by the tolerance."""
        return self.at_most if self.equals is None else self.equals * (1 + (self.within or 0.0))

    @property
    def words(self) -> str:
        """The bound in words: "at least 1.5 x the parent's", "equal to 4"."""
        sides = (("at least", self.at_least), ("at most", self.at_most), ("equal to", self.equals))
        tolerance = f" within {100 * self.within:g} %" if self.within is not None else ""
        return (
            " and ".join(f"{side} {b:g}" for side, b in sides if b is not None)
            + (" x the parent's" if self.relative_to else "")
            + tolerance
        )


class BatchRange(Settings):
    """The target's batch sizes within a range."""

    at_least: int = Field(default=1, gt=0)
    """Smallest batch size that may serve."""
    at_most: int | None = Field(default=None, gt=0)
    """Largest one."""

    @model_validator(mode="after")
    def _not_empty(self) -> "BatchRange":
        if self.at_most is not None and self.at_least > self.at_most:
            raise ValueError(f"at_least {self.at_least} is above at_most {self.at_most}; no batch size is both")
        return self


class UptrainBudget(Settings):
    """How long a child is healed."""

    tokens: int = Field(ge=0)
    """Tokens of global knowledge distillation; 0 leaves the child as assembled."""


def _form(value: Any) -> str:
    """Return which form of a field was written, so that an error speaks of that form alone."""
    return "<word>" if isinstance(value, str) else "<list>" if isinstance(value, list | tuple) else "<mapping>"


def _form_of_bounds(value: Any) -> str:
    return "<list>" if isinstance(value, list | tuple) else "<mapping>"


Bounds = Annotated[
    Annotated[Bound, Tag("<mapping>")] | Annotated[tuple[Bound, ...], Tag("<list>"), Field(min_length=1)],
    Discriminator(_form_of_bounds),
]
"""One bound, or several of the same quantity (on other targets, at other batch sizes)."""
BatchSizes = Annotated[
    Annotated[Literal["all"], Tag("<word>")] | Annotated[tuple[int, ...], Tag("<list>")] | Annotated[BatchRange, Tag("<mapping>")],
    Discriminator(_form),
]


def _listed(constraints: Mapping[ConstraintName, Bounds]) -> Iterator[tuple[ConstraintName, Bound]]:
    for name in sorted(constraints):
        found = constraints[name]
        yield from ((name, bound) for bound in ((found,) if isinstance(found, Bound) else found))


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
    costs: Literal["measured", "analytic"] = Field(default="measured", exclude_if=lambda value: value == "measured")
    """Which costs will do. `measured`: only what an engine measured, here or where it was imported from. `analytic`: where nobody
    measured the target, a roofline from published peaks will do as well; what rests on it is labelled analytic everywhere."""
    objective: Objective = Objective()
    """What is minimised or maximised."""
    structure: StructureSettings = StructureSettings()
    """What the architecture must look like, whatever it costs."""
    pool: PoolSettings = PoolSettings()
    """How many solutions are found; the child is built from the best."""
    constraints: dict[ConstraintName, Bounds] = Field(default={}, validate_default=True)
    """What the child must meet."""
    batch_sizes: BatchSizes = "all"
    """The target's batch sizes that may serve; each is solved, the best feasible one is kept."""
    uptrain: UptrainBudget
    """How long the child is healed."""
    retention_floor: float = Field(default=0.9, gt=0, le=1)
    """Share of the parent's accuracy, corrected for chance, below which the asset check fails."""

    @field_validator("constraints")
    @classmethod
    def _something_is_asked(cls, value: dict[ConstraintName, Bounds], info: ValidationInfo) -> dict[ConstraintName, Bounds]:
        objective, structure = info.data.get("objective"), info.data.get("structure")
        asked = (objective is not None and objective.quantity) or (structure is not None and structure != StructureSettings())
        checked = objective is not None and structure is not None  # what is wrong with these is said of them
        if not value and not asked and checked:
            raise ValueError("give at least 1 constraint: without any, and without a `structure`, the parent itself is the answer")
        return value

    @field_validator("constraints")
    @classmethod
    def _bounds_make_sense(cls, value: dict[ConstraintName, Bounds], info: ValidationInfo) -> dict[ConstraintName, Bounds]:
        seen = set()
        for name, bound in _listed(value):
            if bound.equals is not None and bound.within is None and name not in COUNTS:
                raise ValueError(f"{name}: `equals` needs `within` (0.02 is 2 %): no architecture has exactly {bound.equals:g}")
            point = (name, bound.target or info.data.get("target"), bound.at)
            if point in seen:
                raise ValueError(f"{name}: two bounds on target {point[1]} at the same point; make them one, or give them different `at`")
            seen.add(point)
        return value

    @property
    def bounds(self) -> tuple[tuple[ConstraintName, Bound], ...]:
        """Every bound with its constraint's name, sorted by name; those of one name in the file's order."""
        return tuple(_listed(self.constraints))

    @property
    def targets(self) -> tuple[str, ...]:
        """The scenario's own target, then the others that its constraints name."""
        return tuple(dict.fromkeys((self.target, *(b.target for _, b in self.bounds if b.target is not None))))

    def allows_batch(self, batch: int) -> bool:
        """Say whether `batch_sizes` lets a batch size of the scenario's own target serve."""
        if isinstance(self.batch_sizes, BatchRange):
            return batch >= self.batch_sizes.at_least and (self.batch_sizes.at_most is None or batch <= self.batch_sizes.at_most)
        return self.batch_sizes == "all" or batch in self.batch_sizes


def read_scenario(conf: Path, name: str) -> Scenario:
    """Read conf/scenarios/NAME.yaml. Raises ConfigError."""
    return read_settings(Scenario, scenario_file(conf, name))


def scenario_file(conf: Path, name: str) -> Path:
    """Return the path of a scenario's file. Raises ConfigError for a name that would leave the folder."""
    return conf / "scenarios" / f"{check_name(name)}.yaml"


def read_earlier(conf: Path, scenario: Scenario, *, file: Path | None = None) -> dict[str, Scenario]:
    """Read the scenarios that a scenario's answer must differ from, and those that theirs must differ from, and so on.

    Args:
        conf: folder of the configuration.
        scenario: as read.
        file: where it was read; its place in `conf` unless given.

    Raises:
        ConfigError: one has no file, or can't be read, or a scenario would have to differ from its own answer.
    """
    found: dict[str, Scenario] = {}

    def read(current: Scenario, way: tuple[str, ...], where: Path) -> None:
        for i, name in enumerate(current.structure.different_from):
            field = ("structure", "different_from", i)
            if name in way:
                circle = " -> ".join((*way[way.index(name) :], name))
                why = f"leads round in a circle, {circle}; leave one of them out"
                raise misfit(where, field, why, owner=f"scenario {current.name}")
            if name not in found:
                found[name] = read_named(read_scenario, conf, name, file=where, location=field)
                read(found[name], (*way, name), scenario_file(conf, name))

    read(scenario, (scenario.name,), file or scenario_file(conf, scenario.name))
    return found


_OF_THE_CHILD = {"description": "", "uptrain": {"tokens": 0}, "retention_floor": 0.9}
"""Fields that no answer of the search hangs on, and what they are read as in an earlier scenario."""


def with_earlier(scenario: Scenario, earlier: Mapping[str, Scenario]) -> dict[str, Any]:
    """Return a scenario as JSON, and under "earlier", where there are any, those that it must differ from.

    Of those only what their answers hang on is kept, so that another training budget of theirs is no change of this one.
    """
    content = scenario.model_dump(mode="json")
    if earlier:
        content["earlier"] = {name: {**found.model_dump(mode="json"), **_OF_THE_CHILD} for name, found in sorted(earlier.items())}
    return content


def split_earlier(content: Mapping[str, Any]) -> tuple[Scenario, dict[str, Scenario]]:
    """Read what `with_earlier` returned."""
    scenario = Scenario.model_validate({k: v for k, v in content.items() if k != "earlier"})
    return scenario, {name: Scenario.model_validate(found) for name, found in content.get("earlier", {}).items()}
