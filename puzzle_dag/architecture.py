"""The words of the search: what may stand in a layer's attention place and in its FFN place.

A *variant* is one choice for one place (`kv4`, `linear`, `noop`; `w768`, `linear`, `noop`); a *block* is a pair
of them ("kv4/w768"); an architecture is one block a layer. Names are canonical, parse back, and are safe as
file names, partition keys and SQL values.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

_ATTENTION_NAME = re.compile(r"kv([1-9][0-9]*)")
_FFN_NAME = re.compile(r"w([1-9][0-9]*)")


@dataclass(frozen=True, slots=True, order=True)
class Attention:
    """An attention variant: grouped-query attention with `kv_heads`, a linear map of the normed input, or nothing."""

    kind: Literal["gqa", "linear", "noop"]
    kv_heads: int = 0

    @property
    def name(self) -> str:
        """Canonical name: "kv4", "linear" or "noop"."""
        return f"kv{self.kv_heads}" if self.kind == "gqa" else self.kind

    @staticmethod
    def parse(name: str) -> "Attention":
        """Parse a canonical name. Raises ValueError for anything else."""
        if name in ("linear", "noop"):
            return Attention("linear" if name == "linear" else "noop")
        if match := _ATTENTION_NAME.fullmatch(name):
            return Attention("gqa", int(match[1]))
        raise ValueError(f"attention variant {name!r} not understood; write kvN, linear or noop")


@dataclass(frozen=True, slots=True, order=True)
class FFN:
    """An FFN variant: a SwiGLU of `intermediate_size` channels, a linear map of the normed input, or nothing."""

    kind: Literal["swiglu", "linear", "noop"]
    intermediate_size: int = 0

    @property
    def name(self) -> str:
        """Canonical name: "w768", "linear" or "noop"."""
        return f"w{self.intermediate_size}" if self.kind == "swiglu" else self.kind

    @staticmethod
    def parse(name: str) -> "FFN":
        """Parse a canonical name. Raises ValueError for anything else."""
        if name in ("linear", "noop"):
            return FFN("linear" if name == "linear" else "noop")
        if match := _FFN_NAME.fullmatch(name):
            return FFN("swiglu", int(match[1]))
        raise ValueError(f"FFN variant {name!r} not understood; write wN, linear or noop")


@dataclass(frozen=True, slots=True, order=True)
class Block:
    """One layer's choice: an attention variant and an FFN variant."""

    attention: Attention
    ffn: FFN

    @property
    def name(self) -> str:
        """Canonical name, e.g. "kv4/w768"."""
        return f"{self.attention.name}/{self.ffn.name}"

    @staticmethod
    def parse(name: str) -> "Block":
        """Parse "attention/ffn". Raises ValueError for anything else."""
        attention, _, ffn = name.partition("/")
        return Block(Attention.parse(attention), FFN.parse(ffn))


Architecture = tuple[Block, ...]


@dataclass(frozen=True, slots=True)
class LayerSpace:
    """The variants that one layer may take; every pair of them is a candidate. The parent's own are always in."""

    attentions: tuple[Attention, ...]
    ffns: tuple[FFN, ...]

    @property
    def blocks(self) -> tuple[Block, ...]:
        """Every pair, sorted."""
        return tuple(Block(a, f) for a in self.attentions for f in self.ffns)


def layer_key(index: int) -> str:
    """Return the partition key of a layer: "L00", "L01", ... (three digits from layer 100 on: "L100")."""
    return f"L{index:02d}"


def layer_index(key: str) -> int:
    """Return the index of a layer's partition key. Raises ValueError for anything else."""
    if not re.fullmatch(r"L[0-9]{2,3}", key):
        raise ValueError(f"layer key {key!r} not understood; write L00, L01, ...")
    return int(key[1:])


def variant_union(spaces: Iterable[LayerSpace]) -> tuple[tuple[Attention, ...], tuple[FFN, ...]]:
    """Return the sorted union of the layers' variants: what costs must be known for."""
    spaces = list(spaces)
    return tuple(sorted({a for s in spaces for a in s.attentions})), tuple(sorted({f for s in spaces for f in s.ffns}))
