"""What all configuration files have in common: strict settings, safe names, and errors that say what to fix."""

import difflib
import re
from pathlib import Path
from typing import Annotated, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]{0,63}$")]
_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")


class ConfigError(ValueError):
    """A configuration that can't be used; the message names the file, the field, the value and the fix."""


class Settings(BaseModel):
    """What all configuration has in common: unknown keys are errors, values don't change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


_Model = TypeVar("_Model", bound=Settings)


def check_name(name: str) -> str:
    """Return a name that is safe as a file name, partition key and SQL value. Raises ConfigError otherwise."""
    if not _NAME.fullmatch(name):
        raise ConfigError(f"name {name!r}: at most 64 lower-case letters, digits, '.', '_' and '-', and start with a letter or digit")
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
