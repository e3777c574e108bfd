"""The search space: which variants a layer may take, and which runs of layers may be replaced at once.

As written in a profile, and as resolved against a parent's shape.
"""

import re
from collections.abc import Iterable
from typing import Any

from pydantic import Field, field_validator, model_validator

from puzzle_dag.architecture import FFN, Attention, LayerSpace, Run, RunKind
from puzzle_dag.config.reading import ConfigError, Settings

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
    def ends(self) -> set[tuple[int, int]]:
        """First and last layer of each run that is named by itself."""
        return {(int(first), int(last)) for first, last in (run.split("-") for run in self.layers)}


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


def _resolve_attention(names: Iterable[str], kv_heads: int) -> tuple[Attention, ...]:
    variants = {Attention("gqa", kv_heads)}
    for name in names:
        variant = Attention.parse(name)
        if variant.kind == "gqa" and (variant.kv_heads > kv_heads or kv_heads % variant.kv_heads):
            divisors = ", ".join(f"kv{n}" for n in range(kv_heads, 0, -1) if kv_heads % n == 0)
            raise ConfigError(
                f"search_space.attention: {name}: the parent's {kv_heads} KV heads can't be merged into {variant.kv_heads}; "
                f"use one of {divisors}"
            )
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


def resolve_runs(settings: SearchSpaceSettings, *, num_layers: int) -> tuple[Run, ...]:
    """Return the runs that may be replaced at once, by first layer, length and kind; empty where none are asked for.

    Raises:
        ConfigError: a run of more layers than there are, or of layers that aren't there.
    """
    runs = settings.runs
    if runs is None:
        return ()
    longest = runs.max_layers or 1
    if longest > num_layers:
        raise ConfigError(f"search_space.runs.max_layers: {longest} is more than the parent's {num_layers} layers; give at most that")
    for first, last in sorted(runs.ends):
        if last >= num_layers:
            raise ConfigError(f"search_space.runs.layers: {first}-{last}: the parent has layers 0 to {num_layers - 1}; end the run there")
    ends = runs.ends | {(i, i + n - 1) for n in range(2, longest + 1) for i in range(num_layers - n + 1)}
    return tuple(Run(first, last, kind) for first, last in sorted(ends) for kind in sorted(set(runs.kinds)))
