"""What all configuration files have in common: strict settings, safe names, and errors that say what to fix."""

import difflib
import re
from collections.abc import Callable, Hashable, Iterable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]{0,63}$")]
_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")


class ConfigError(ValueError):
    """A configuration that can't be used; the message names the file, the field, the value and the fix."""


class MissingFileError(ConfigError):
    """A configuration file that isn't there; whoever read it because another file names it says where that is (`read_named`)."""


class Settings(BaseModel):
    """What all configuration has in common: unknown keys are errors, values don't change."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


class At(Settings):
    """The workload point at which a constraint holds or a quantity is optimised."""

    batch: int = Field(gt=0)
    """Concurrent requests."""
    length: int | None = Field(default=None, gt=0)
    """Tokens a sequence (memory)."""


_Model = TypeVar("_Model", bound=Settings)


def check_name(name: str) -> str:
    """Return a name that is safe as a file name, partition key and SQL value. Raises ConfigError otherwise."""
    if not _NAME.fullmatch(name):
        raise ConfigError(f"name {name!r}: at most 64 lower-case letters, digits, '.', '_' and '-', and start with a letter or digit")
    return name


class _StrictLoader(yaml.SafeLoader):
    """Safe YAML that refuses a key written twice, where the plain loader would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key `{key.value}` is there twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


def _known_keys(model: type[BaseModel]) -> set[str]:
    keys = set(model.model_fields)
    for field in model.model_fields.values():
        for candidate in _models_in(field.annotation):
            keys |= _known_keys(candidate)
    return keys


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    """Return the settings classes inside an annotation, however nested: X, X | None, dict[int, X], Annotated[X | Y, ...]."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for part in getattr(annotation, "__args__", ()) for m in _models_in(part)]


def _line(text: str, location: tuple[int | str, ...]) -> int:
    """Return the line (from 1) of the innermost part of `location` that is written in the YAML text."""
    node = yaml.compose(text, _StrictLoader)
    line = 1
    for part in location:
        if isinstance(node, yaml.MappingNode):
            found = [(key, value) for key, value in node.value if key.value == str(part)]
            if found:  # pydantic's location also names union members, which the file doesn't
                line, node = found[0][0].start_mark.line + 1, found[0][1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line + 1
    return line


def locate(path: Path, location: tuple[int | str, ...]) -> str:
    """Return "FILE, line N": where a field of a YAML file is written, or the innermost part of its location that is."""
    return f"{path}, line {_line(path.read_text(encoding='utf-8'), location)}"


def misfit(file: Path | None, location: tuple[int | str, ...], message: str, *, owner: str) -> ConfigError:
    """Return the error of a field that doesn't fit another file: where it is written, its dotted name, and what is wrong.

    Args:
        file: the YAML file that has the field; None where it isn't known.
        location: the field's keys from the outside in; a number at the end is a place in a list, which gives the line alone.
        message: value and fix, as the continuation of the field's name.
        owner: what the message begins with where there is no file: "scenario fast".
    """
    names = location[:-1] if location and isinstance(location[-1], int) else location
    where = owner if file is None else locate(file, location)
    return ConfigError(f"{where}: {'.'.join(map(str, names))} {message}")


def read_named(read: Callable[[Path, str], _Model], conf: Path, name: str, *, file: Path, location: tuple[int | str, ...]) -> _Model:
    """Read a configuration file that another one names.

    Args:
        read: reads the file called `name` below `conf`.
        conf: folder of the configuration.
        name: the file's stem.
        file: the file that names it.
        location: the keys of the field that names it.

    Raises:
        ConfigError: as `read`; where there is no such file, the message begins with the line that asks for it.
    """
    try:
        return read(conf, name)
    except MissingFileError as error:
        raise misfit(file, location, f"names {name!r}, but {error}", owner=name) from None


def _suggest(wrong: object, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(wrong), list(known), n=1)
    return f"; did you mean `{near[0]}`?" if near else ""


def _explain(error: ValidationError, model: type[BaseModel], path: Path, text: str) -> str:
    lines = []
    for problem in error.errors():
        # Pydantic also names the form of a field that it took ("<list>"), which nobody wrote.
        location = tuple(p for p in problem["loc"] if p != "[key]" and not str(p).startswith("<"))
        place = f"{path}, line {_line(text, location)}: field `{'.'.join(map(str, location))}`"
        if problem["type"] == "extra_forbidden":
            message = f"{place} is unknown" + _suggest(location[-1], _known_keys(model))
        elif problem["type"] == "missing":
            message = f"{place} is missing"
        else:
            message = f"{place}: {problem['msg'].removeprefix('Value error, ')} (got {problem['input']!r})"
            if problem["type"] == "literal_error":
                message += _suggest(problem["input"], problem["ctx"]["expected"].replace("'", "").replace(" or ", ", ").split(", "))
        lines.append(message)
    return "\n".join(lines)


def read_settings(model: type[_Model], path: Path) -> _Model:
    """Read and validate one YAML file whose `name` is the file's stem.

    Raises:
        MissingFileError: there is no such file.
        ConfigError: the file is no YAML mapping, or its name isn't the file's stem, or a field is missing, unknown or out of range.
    """
    try:
        text = path.read_text(encoding="utf-8")
        raw = yaml.load(text, _StrictLoader)
    except FileNotFoundError:
        near = sorted(p.stem for p in path.parent.glob("*.yaml"))
        raise MissingFileError(f"{path} does not exist{_suggest(path.stem, near)}; there are: {', '.join(near) or 'none'}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: no YAML: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: must be a mapping of fields, got {type(raw).__name__}")
    raw.setdefault("name", path.stem)
    try:
        settings = model.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(_explain(error, model, path, text)) from error
    if raw["name"] != path.stem:
        where = locate(path, ("name",))
        raise ConfigError(f"{where}: field `name` is {raw['name']!r}, but the file's stem is {path.stem!r}; make them equal")
    return settings
