"""The search space: which variants a layer may take, as written in a profile and as resolved against a parent's shape."""

from collections.abc import Iterable
from typing import Any

from pydantic import Field, field_validator

from puzzle_dag.architecture import FFN, Attention, LayerSpace
from puzzle_dag.config.reading import ConfigError, Settings


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
    overrides: dict[int, LayerOverride] = Field(default_factory=dict)
    """Layer index -> another space for that layer."""

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
