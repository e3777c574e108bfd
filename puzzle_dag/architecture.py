"""The words of the search: what may stand in a layer's attention place and in its FFN place.

A *variant* is one choice for one place (`kv4`, `linear`, `noop`; `w768`, `linear`, `noop`); a *block* is a pair
of them ("kv4/w768"); an architecture is one block a layer. A *run* replaces several layers that follow each other at
once ("drop_3-5", "fuse_3-5"). Names are canonical, parse back, and are safe as file names, partition keys and SQL values.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

_ATTENTION_NAME = re.compile(r"kv([1-9][0-9]*)")
_FFN_NAME = re.compile(r"w([1-9][0-9]*)")
_RUN_NAME = re.compile(r"(drop|fuse)_(0|[1-9][0-9]*)-([1-9][0-9]*)")


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
NO_BLOCK = Block(Attention("noop"), FFN("noop"))
"""The block of a layer that is not there."""
RunKind = Literal["drop", "fuse"]


@dataclass(frozen=True, slots=True, order=True)
class Run:
    """A replacement of the layers `first` to `last` at once.

    `drop` leaves all of them out. `fuse` (FFN Fusion, arXiv 2503.18908) leaves out all attentions but the first layer's and
    sets the parent's FFNs side by side, as one FFN of their summed width in the first layer; the other layers do nothing.
    """

    first: int
    last: int
    kind: RunKind

    @property
    def name(self) -> str:
        """Canonical name, e.g. "fuse_3-5"."""
        return f"{self.kind}_{self.first}-{self.last}"

    @staticmethod
    def parse(name: str) -> "Run":
        """Parse a canonical name. Raises ValueError for anything else."""
        match = _RUN_NAME.fullmatch(name)
        if match is None or int(match[2]) >= int(match[3]):
            raise ValueError(f"run {name!r} not understood; write drop_FIRST-LAST or fuse_FIRST-LAST")
        return Run(int(match[2]), int(match[3]), "drop" if match[1] == "drop" else "fuse")

    @property
    def layers(self) -> range:
        """The layers that it replaces."""
        return range(self.first, self.last + 1)

    def blocks(self, parent: Block) -> Architecture:
        """Return the block of each of its layers, in a model whose own block is `parent`."""
        if self.kind == "drop":
            return (NO_BLOCK,) * len(self.layers)
        return (Block(parent.attention, self.fused_ffn(parent.ffn)), *(NO_BLOCK,) * (len(self.layers) - 1))

    def fused_ffn(self, parent: FFN) -> FFN:
        """Return the one FFN that the parent's FFNs of these layers make side by side."""
        return FFN("swiglu", len(self.layers) * parent.intermediate_size)


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
