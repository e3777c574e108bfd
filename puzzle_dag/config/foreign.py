"""A foreign library as a profile: blocks that someone else measured, and the scenarios to search them for.

Such a profile has `library_file` where others have a parent and a corpus. Nothing is trained or measured for it; its
scenarios bound sums of the library's own numbers, named by dotted paths ("stats.memory_mib").
"""

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, model_validator

from puzzle_dag.config.reading import ConfigError, Name, Settings, check_name, locate, read_settings


class ForeignProfile(Settings):
    """A library that someone else measured, and the scenarios that are solved on it."""

    version: Literal[1]
    """Version of this file format."""
    name: Name
    """The file's stem; the prefix of all asset keys."""
    description: str = ""
    """Whose library it is and what was measured, in words."""
    library_file: str
    """The library, relative to the project's root: .json, .csv or .parquet."""
    scenarios: tuple[Name, ...]
    """Names of scenario files that this profile solves."""

    @property
    def targets(self) -> tuple[str, ...]:
        """Return no targets: nothing is measured."""
        return ()


class ForeignBound(Settings):
    """A lower or an upper bound, or both, of the sum of a number over the layers."""

    at_least: float | None = None
    """Lower bound."""
    at_most: float | None = None
    """Upper bound."""

    @model_validator(mode="after")
    def _a_bound(self) -> "ForeignBound":
        if self.at_least is None and self.at_most is None:
            raise ValueError("give `at_least` or `at_most`")
        if self.at_least is not None and self.at_most is not None and self.at_least > self.at_most:
            raise ValueError(f"at_least {self.at_least} is above at_most {self.at_most}; no value is both")
        return self


class ForeignScenario(Settings):
    """One choice of a variant a layer to find in a foreign library."""

    version: Literal[1]
    """Version of this file format."""
    name: Name
    """The file's stem; the partition key."""
    description: str = ""
    """What it is for, in words."""
    library: Name
    """The profile whose library is searched."""
    minimize: str = Field(min_length=1)
    """Dotted name of the number whose sum over the layers is minimised."""
    constraints: dict[str, ForeignBound] = Field(default_factory=dict)
    """Dotted name of a number -> bounds of its sum."""
    num_solutions: int = Field(default=1, ge=1, le=100)
    """How many solutions: the best, the best that differs from it enough, and so on."""
    min_different_layers: int = Field(default=1, ge=1)
    """Layers in which any two solutions differ at least."""


def _read_mapping(path: Path) -> dict[str, Any]:
    """Return a YAML file's mapping, or {} where it has none; what is wrong with it, `read_settings` says."""
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError):
        return {}
    return raw if isinstance(raw, dict) else {}


def is_foreign(conf: Path, name: str) -> bool:
    """Say whether conf/profiles/NAME.yaml is a foreign library's: it has `library_file`, or neither parent nor corpus.

    Raises:
        ConfigError: the name is none, or the file has both a library and a parent.
    """
    path = conf / "profiles" / f"{check_name(name)}.yaml"
    raw = _read_mapping(path)
    both = [field for field in ("parent", "corpus", "search_space") if field in raw]
    if "library_file" in raw and both:
        where = locate(path, (both[0],))
        raise ConfigError(
            f"{where}: fields `library_file` and `{both[0]}` exclude each other; a profile has a parent to compress or the "
            f"library of one that someone else measured: remove one of them"
        )
    return "library_file" in raw or (bool(raw) and not both)


def read_foreign_profile(conf: Path, name: str) -> ForeignProfile:
    """Read conf/profiles/NAME.yaml of a foreign library. Raises ConfigError."""
    return read_settings(ForeignProfile, conf / "profiles" / f"{check_name(name)}.yaml")


def library_of(conf: Path, name: str) -> str | None:
    """Return the foreign library that conf/scenarios/NAME.yaml is for, None where it is for a parent. Raises ConfigError."""
    library = _read_mapping(conf / "scenarios" / f"{check_name(name)}.yaml").get("library")
    return None if library is None else str(library)


def read_foreign_scenario(conf: Path, name: str) -> ForeignScenario:
    """Read conf/scenarios/NAME.yaml of a foreign library. Raises ConfigError."""
    path = conf / "scenarios" / f"{check_name(name)}.yaml"
    if "target" in _read_mapping(path):
        where = locate(path, ("target",))
        raise ConfigError(
            f"{where}: field `target` is for a scenario of a parent; a foreign library's has `library`, `minimize`, `constraints`"
        )
    return read_settings(ForeignScenario, path)
