"""A configuration file as a form of Dagster's Launchpad: the fields, types, choices and descriptions of its pydantic model.

The form is made from the model, so it can't fall behind the file. It checks types, choices and required fields while one
types; ranges, what fields mean together, and fields that take several shapes are checked by the model itself when the run begins.
"""

import re
import types
from collections.abc import Collection, Mapping
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import dagster as dg
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from puzzle_dag.store import fingerprint

_SCALARS = {str: str, int: int, float: float, bool: bool}
_LISTS = (tuple, list, set, frozenset)
_WORDS = {str: "text", int: "whole number", float: "number", bool: "true or false"}


def form_fields(model: type[BaseModel], *, without: Collection[str] = (), choices: Mapping[str, Collection[str]] | None = None) -> dict:
    """Return the Dagster config fields of a pydantic model.

    Args:
        model: the settings of one file.
        without: fields that the form doesn't ask for.
        choices: names that a string field may take, known only now (the targets of a profile).
    """
    asked = {name: field for name, field in model.model_fields.items() if name not in without}
    return {name: _field(field, (choices or {}).get(name)) for name, field in asked.items()}


def _field(field: FieldInfo, choices: Collection[str] | None) -> dg.Field:
    kind = _enum(choices) if choices else _kind(field.annotation)
    text = " ".join(filter(None, (field.description, _shapes(field.annotation) if kind is dg.Any else "")))
    if not field.is_required() and field.default not in (None, ""):
        default = field.get_default(call_default_factory=True, validated_data={})
        shown = default.model_dump(mode="json") if isinstance(default, BaseModel) else default
        text = f"{text} Default: {shown}."
    return dg.Field(kind, is_required=field.is_required(), description=text.strip() or None)


def _enum(names: Collection[str]) -> dg.Enum:
    # Dagster tells enums apart by name, so the name says what is in it.
    shown = re.sub(r"\W", "_", "_or_".join(names))[:60]
    return dg.Enum(f"one_of_{shown}_{fingerprint(sorted(names))[:6]}", [dg.EnumValue(n) for n in names])


def _kind(annotation: Any) -> Any:
    """Return what Dagster calls a type annotation; `Any` where it has no word for it."""
    annotation = _bare(annotation)
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return _enum(arguments) if all(isinstance(a, str) for a in arguments) else type(arguments[0])
    if origin in (Union, types.UnionType):
        return _union([a for a in arguments if a is not type(None)])
    if origin in _LISTS:
        return dg.Array(_kind(arguments[0]))
    if origin is dict:
        return _mapping(*arguments)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return dg.Shape(form_fields(annotation))
    return _SCALARS.get(annotation, dg.Any)


def _mapping(key: Any, value: Any) -> Any:
    if get_origin(key) is Literal:
        kind = _kind(value)
        said = _shapes(value) if kind is dg.Any else None
        return dg.Shape({name: dg.Field(kind, is_required=False, description=said) for name in get_args(key)})
    # A run's config is kept as JSON, where every key is a text; a map of numbers would refuse what the form took.
    return dg.Map(str, _kind(value)) if _kind(key) is str else dg.Permissive()


def _union(arguments: list[Any]) -> Any:
    if len(arguments) == 1:
        return _kind(arguments[0])
    # A form has room for a word or one other shape of a field. Where the file takes more (a mapping or a list of them, a word or a map
    # of names) Dagster can only say "anything": the description then says what, and the model refuses the rest before anything runs.
    kinds = [_kind(a) for a in arguments]
    scalars = [str if isinstance(k, dg.Enum) else k for k in kinds if isinstance(k, dg.Enum) or k in _SCALARS.values()]
    others = [k for k in kinds if k not in scalars and not isinstance(k, dg.Enum)]
    if len(others) == len(scalars) == 1 and isinstance(others[0], (dg.Array, dg.Shape)):
        return dg.ScalarUnion(scalar_type=scalars[0], non_scalar_schema=others[0])
    return dg.Any


def _shapes(annotation: Any) -> str:
    """Return in words what a field takes for which Dagster has no type: "Takes all, or a list (whole number)."."""
    return f"Takes {_words(annotation)}."


def _words(annotation: Any) -> str:
    annotation = _bare(annotation)
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        several = [_bare(a) for a in arguments if a is not type(None)]
        return ", or ".join("a list of such" if _items(a) in several else _words(a) for a in several)
    if origin is Literal:
        return ", ".join(map(str, arguments))
    if origin in _LISTS:
        return f"a list ({_words(arguments[0])})"
    if origin is dict:
        return f"a mapping (name: {_words(arguments[1])})"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"a mapping ({', '.join(f'{name}: {_words(field.annotation)}' for name, field in annotation.model_fields.items())})"
    return _WORDS.get(annotation, "anything")


def _bare(annotation: Any) -> Any:
    return _bare(get_args(annotation)[0]) if get_origin(annotation) is Annotated else annotation


def _items(annotation: Any) -> Any:
    """Return what a list holds; None for what is no list."""
    return _bare(get_args(annotation)[0]) if get_origin(annotation) in _LISTS else None
