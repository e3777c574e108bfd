"""The search space: which variants a layer may take, and which runs of layers may be replaced at once.

As written in a profile, and as resolved against a parent's shape.
"""

import re
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import Field, field_validator, model_validator

from puzzle_dag.architecture import FFN, Attention, LayerSpace, Run, RunKind
from puzzle_dag.config.reading import Settings, misfit

_Keys = tuple[int | str, ...]
_Written = tuple[_Keys, Any]
"""The keys of where a variant stands (("search_space", "overrides", 3, "ffn", 0)), and how it is written there."""
_Variant = TypeVar("_Variant", Attention, FFN)
_ENDS = re.compile(r"([0-9]+)-([0-9]+)")


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


class RunSettings(Settings):
    """Which runs of layers may be replaced at once, beside the single layers' blocks."""

    max_layers: int | None = Field(default=None, ge=2)
    """Every run of two layers to this many."""
    layers: tuple[str, ...] = ()
    """Single runs by their first and last layer, "3-5", in place of or beside those of `max_layers`."""
    kinds: tuple[RunKind, ...] = Field(default=("drop", "fuse"), min_length=1)
    """`drop` leaves the layers out; `fuse` keeps the first one's attention and sets all FFNs side by side (FFN Fusion)."""

    @model_validator(mode="after")
    def _some_runs(self) -> "RunSettings":
        if self.max_layers is None and not self.layers:
            raise ValueError("names no run; give `max_layers: 3`, or `layers: [3-5]`, or take `runs` out")
        for ends in self.layers:
            match = _ENDS.fullmatch(ends)
            if match is None or int(match[1]) >= int(match[2]):
                raise ValueError(f"layers: {ends!r} is no run; write its first and last layer, such as 3-5")
        return self

    @property
    def ends(self) -> list[tuple[int, int]]:
        """First and last layer of each run that is named by itself, as `layers` has them."""
        return [(int(first), int(last)) for first, last in (run.split("-") for run in self.layers)]


class SearchSpaceSettings(Settings):
    """Which variants a layer may take. The parent's own attention and FFN are always candidates."""

    attention: tuple[str, ...]
    """Attention variants: kvN, linear, noop."""
    ffn: tuple[str | float, ...]
    """FFN variants: a share of the parent's width (0.5), an absolute width (w384), linear, noop."""
    width_multiple: int = Field(default=32, gt=0)
    """Shares are rounded to a multiple of this (256 suits GPU kernels)."""
    overrides: dict[int, LayerOverride] = Field(default_factory=dict)
    """Layer index -> another space for that layer."""
    runs: RunSettings | None = None
    """Runs of layers that are scored and replaced at once; none unless given."""

    @field_validator("attention", "ffn")
    @classmethod
    def _not_empty(cls, value: tuple[Any, ...]) -> tuple[Any, ...]:
        if not value:
            raise ValueError("needs at least one variant")
        return value


def _names_of(settings: SearchSpaceSettings, layer: int, place: Literal["attention", "ffn"]) -> list[_Written]:
    """Return one layer's variants of a place as they are written: its own or the space's, then those beside them."""
    override = settings.overrides.get(layer, LayerOverride())
    own, beside = getattr(override, place), getattr(override, f"add_{place}")
    root: _Keys = ("search_space", "overrides", layer)
    several = [(("search_space", place), getattr(settings, place)) if own is None else ((*root, place), own)]
    return [((*field, i), name) for field, names in (*several, ((*root, f"add_{place}"), beside)) for i, name in enumerate(names)]


def _parse_attention(name: str, kv_heads: int) -> Attention:
    variant = Attention.parse(name)
    if variant.kind == "gqa" and (variant.kv_heads > kv_heads or kv_heads % variant.kv_heads):
        divisors = ", ".join(f"kv{n}" for n in range(kv_heads, 0, -1) if kv_heads % n == 0)
        raise ValueError(f"the parent's {kv_heads} KV heads can't be merged into {variant.kv_heads}; use one of {divisors}")
    return variant


def _parse_ffn(name: str | float, width: int, multiple: int) -> FFN:
    if isinstance(name, str):
        variant = FFN.parse(name)
    elif 0 < name <= 1:
        variant = FFN("swiglu", width if name == 1 else max(multiple, round(name * width / multiple) * multiple))
    else:
        raise ValueError(f"a share must be above 0 and at most 1; write an absolute width as w{round(abs(name))}")
    if variant.intermediate_size > width:
        raise ValueError(f"wider than the parent's {width} channels; use at most w{width}")
    return variant


def _resolve(names: Iterable[_Written], own: _Variant, parse: Callable[[Any], _Variant], file: Path | None) -> tuple[_Variant, ...]:
    variants = {own}
    for field, name in names:
        try:
            variants.add(parse(name))
        except ValueError as error:
            raise misfit(file, field, f"has {name!r}: {error}", owner="profile") from error
    return tuple(sorted(variants))


def resolve_space(
    settings: SearchSpaceSettings, *, layer: int, num_layers: int, kv_heads: int, intermediate_size: int, file: Path | None = None
) -> LayerSpace:
    """Return the variants of one layer, the parent's own included, from the space and its override.

    Args:
        settings: as written in the profile.
        layer: which layer.
        num_layers: layers of the parent.
        kv_heads: the parent's KV heads a layer.
        intermediate_size: the parent's FFN channels a layer.
        file: the profile's file, so that an error names its line.

    Raises:
        ConfigError: a width above the parent's, KV heads that don't divide, an unknown variant, a layer that isn't there.
    """
    beyond = [i for i in settings.overrides if not 0 <= i < num_layers]
    if beyond:
        why = f"names a layer that isn't there; the parent has layers 0 to {num_layers - 1}"
        raise misfit(file, ("search_space", "overrides", str(beyond[0])), why, owner="profile")
    attentions, ffns = (_names_of(settings, layer, place) for place in ("attention", "ffn"))
    return LayerSpace(
        _resolve(attentions, Attention("gqa", kv_heads), partial(_parse_attention, kv_heads=kv_heads), file),
        _resolve(
            ffns, FFN("swiglu", intermediate_size), partial(_parse_ffn, width=intermediate_size, multiple=settings.width_multiple), file
        ),
    )


def resolve_runs(settings: SearchSpaceSettings, *, num_layers: int, file: Path | None = None) -> tuple[Run, ...]:
    """Return the runs that may be replaced at once, by first layer, length and kind; empty where none are asked for.

    Args:
        settings: as written in the profile.
        num_layers: layers of the parent.
        file: the profile's file, so that an error names its line.

    Raises:
        ConfigError: a run of more layers than there are, or of layers that aren't there.
    """
    runs, field = settings.runs, ("search_space", "runs")
    if runs is None:
        return ()
    longest = runs.max_layers or 1
    if longest > num_layers:
        why = f"is {longest}, more than the parent's {num_layers} layers; give at most that"
        raise misfit(file, (*field, "max_layers"), why, owner="profile")
    for i, (_, last) in enumerate(runs.ends):
        if last >= num_layers:
            why = f"has {runs.layers[i]}, but the parent has layers 0 to {num_layers - 1}; end the run there"
            raise misfit(file, (*field, "layers", i), why, owner="profile")
    ends = {*runs.ends, *((i, i + n - 1) for n in range(2, longest + 1) for i in range(num_layers - n + 1))}
    return tuple(Run(first, last, kind) for first, last in sorted(ends) for kind in sorted(set(runs.kinds)))
