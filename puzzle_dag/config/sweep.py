"""A sweep: one scenario with one of its numbers taking many values, solved again on a schedule (conf/sweeps/NAME.yaml)."""

from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from puzzle_dag.config.reading import Name, Settings, check_name, read_settings

_MOST_VALUES = 200


class SweepRange(Settings):
    """Values from `first` to `last`, both included, `step` apart."""

    first: Decimal = Field(gt=0)
    """Smallest value."""
    last: Decimal = Field(gt=0)
    """Largest value; the range ends at or below it."""
    step: Decimal = Field(gt=0)
    """Distance between two values."""

    @field_validator("first", "last", "step", mode="before")
    @classmethod
    def _as_written(cls, value: Any) -> Any:
        # YAML's 0.05 is a binary float; its shortest decimal is what the person wrote.
        return str(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value

    @model_validator(mode="after")
    def _a_range(self) -> "SweepRange":
        if self.first > self.last:
            raise ValueError(f"first {self.first} is above last {self.last}; give the smaller one as first")
        count = int((self.last - self.first) / self.step) + 1
        if count > _MOST_VALUES:
            raise ValueError(f"{count} values; give a larger step, so that there are at most {_MOST_VALUES}")
        return self

    @property
    def values(self) -> tuple[Decimal, ...]:
        """The values, each with as many decimals as the range is written with."""
        count = int((self.last - self.first) / self.step) + 1
        return tuple(self.first + i * self.step for i in range(count))


class Sweep(Settings):
    """Scenarios that differ in one number, and when they are solved."""

    version: Literal[1]
    """Version of this file format."""
    name: Name
    """The file's stem; the scenarios are called NAME-VALUE."""
    description: str = ""
    """What it is for, in words."""
    profile: Name
    """The profile that solves the scenarios."""
    sets: str = Field(pattern=r"^[^.\n]+(\.[^.\n]+)*$")
    """The scenario's field that takes the values, dots between levels: `constraints.memory_bytes.at_most`. A name that has dots itself
    (a number of a foreign library, `constraints.stats.memory_mib.at_most`) is one level."""
    values: SweepRange
    """The values."""
    scenario: dict[str, Any]
    """All other fields of the scenarios, as in a scenario's file."""
    cron: str = "0 3 * * *"
    """When the schedule runs, once it is switched on: minute, hour, day, month, day of the week."""
    timezone: str = "UTC"
    """Time zone of `cron`, such as `Europe/Berlin`."""

    @model_validator(mode="after")
    def _no_name(self) -> "Sweep":
        if "name" in self.scenario:
            raise ValueError("scenario.name: leave it out; the scenarios are called NAME-VALUE")
        return self

    def scenarios(self) -> dict[str, dict[str, Any]]:
        """Return the scenarios' fields by name. Raises ValueError where `sets` leads through something that is no mapping."""
        return {f"{self.name}-{value}": self._with(value) for value in self.values.values}

    def _with(self, value: Decimal) -> dict[str, Any]:
        fields: dict[str, Any] = {
            "version": 1,
            "description": f"{self.sets} = {value}. {self.description}".strip(),
            **_copied(self.scenario),
        }
        *path, last = self._levels(fields)
        place = fields
        for part in path:
            place = place.setdefault(part, {})
            if not isinstance(place, dict):
                raise ValueError(f"sweep {self.name}: sets is {self.sets!r}, but {part!r} is no mapping in `scenario`")
        place[last] = int(value) if value == value.to_integral_value() else float(value)
        return fields

    def _levels(self, fields: dict[str, Any]) -> list[str]:
        """Return the keys that `sets` leads through: at each level the longest that is there, else what is up to the next dot.

        In a foreign library's scenario all between `constraints` and the bound is the number's name, whether it is there or not.
        """
        if "library" in fields and self.sets.startswith("constraints.") and self.sets.count(".") > 1:
            first, _, rest = self.sets.partition(".")
            number, _, bound = rest.rpartition(".")
            return [first, number, bound]
        levels, place, parts = [], fields, self.sets.split(".")
        while parts:
            known = place if isinstance(place, dict) else {}
            num = next((n for n in range(len(parts), 1, -1) if ".".join(parts[:n]) in known), 1)
            levels.append(".".join(parts[:num]))
            place, parts = known.get(levels[-1], {}), parts[num:]
        return levels


def _copied(value: Any) -> Any:
    return {k: _copied(v) for k, v in value.items()} if isinstance(value, dict) else value


def read_sweep(conf: Path, name: str) -> Sweep:
    """Read conf/sweeps/NAME.yaml. Raises ConfigError."""
    return read_settings(Sweep, conf / "sweeps" / f"{check_name(name)}.yaml")


def read_sweeps(conf: Path, profile: str) -> list[Sweep]:
    """Read the sweeps of one profile, by name. Raises ConfigError for any file in conf/sweeps/ that is no sweep."""
    sweeps = [read_sweep(conf, path.stem) for path in sorted((conf / "sweeps").glob("*.yaml"))]
    return [sweep for sweep in sweeps if sweep.profile == profile]
