"""Which models are measured to learn what each variant costs: anchors, one or more models a variant, and mixtures of all.

An anchor or a variant's probe depends on the parent's shape, the parent's block and at most one further variant, never on
which others are asked for: a larger search space plans all of a smaller one's, so only what is new is measured. No-ops
fill the other places: they cost nothing. With noise that is a share of the time measured, the mean error of a
predicted model is 0.36 times that of one engine when each probe runs twice (42 pairs a layer, six layers); probes of the
parent's depth with the parent's partner in every other layer would give 0.68 (`python -m benchmarks.probe_design`).

Mixtures look like children: a random variant in every place. A model of unlike layers can take longer than the sum of what
its layers take among their like (buffers of other sizes find less of themselves in the caches), and only such models tell.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from puzzle_dag.architecture import FFN, Architecture, Attention, Block
from puzzle_dag.model.checkpoint import child_config
from puzzle_dag.model.configuration_puzzle_dag import PuzzleDagConfig

_MAX_DEPTH = 16
_LEAST_MIXED = 4
_NO_ATTENTION, _NO_FFN = Attention("noop"), FFN("noop")

_PieceT = TypeVar("_PieceT", Attention, FFN)
Variant = tuple[Literal["attention", "ffn", "constant"], str]
"""("attention", "kv4"); ("constant", "engine") is what a model costs beside its layers."""


@dataclass(frozen=True, slots=True)
class Probe:
    """A model to measure."""

    name: str
    """Says what it is for: "parent-full", "ffn/w384/0", "mixture/2"."""
    architecture: Architecture
    """Its blocks."""


def name_architecture(architecture: Architecture) -> tuple[str, ...]:
    """Return the blocks' names."""
    return tuple(block.name for block in architecture)


def _depth(num_layers: int) -> int:
    """Return how deep a probe is: noise is a share of the time measured, so the more often a variant stands in a model, the better."""
    return max(2, min(2 * num_layers, _MAX_DEPTH))


def _plan_anchors(parent: Block, num_layers: int) -> list[Probe]:
    """Return the parent at full depth and one layer of it, and deep models with all but one of the FFNs or attentions left out.

    The two depths separate the engine's constant from the blocks, the other two attention from FFN. A single layer tells
    the constant best, since its time is the largest share there.
    """
    attention_only = tuple(Block(parent.attention, parent.ffn if i == 0 else _NO_FFN) for i in range(_depth(num_layers)))
    ffn_only = tuple(Block(parent.attention if i == 0 else _NO_ATTENTION, parent.ffn) for i in range(_depth(num_layers)))
    return [
        Probe("parent-full", (parent,) * num_layers),
        Probe("parent-single", (parent,) * (1 if num_layers > 1 else 2)),
        Probe("parent-attention", attention_only),
        Probe("parent-ffn", ffn_only),
    ]


def _plan_variant(parent: Block, variant: Attention | FFN, num_layers: int, index: int) -> Probe:
    """Return probe `index` of a variant: one parent block, then the variant in every layer, the other place left out.

    Whatever else runs in a probe adds its noise and tells nothing of the variant. Further probes (index 1, 2, ...) trade
    that for the variant's usual company: a quarter shallower each, they have the parent's partner in every other layer.
    The first block has real attention, which the engine needs when the variant has none. An FFN that is wider than the
    parent's, fused of several, makes its probes shallower by as much: none has more channels than other probes.
    """
    num_fused = -(-variant.intermediate_size // parent.ffn.intermediate_size) if isinstance(variant, FFN) else 1
    depth = max(2, _depth(num_layers) * (4 - index % 4) // (4 * max(1, num_fused)))
    blocks = [parent]
    for layer in range(1, depth):
        partnered = index > 0 and (layer + index) % 2 == 1
        if isinstance(variant, Attention):
            blocks.append(Block(variant, parent.ffn if partnered else _NO_FFN))
        else:
            blocks.append(Block(parent.attention if partnered else _NO_ATTENTION, variant))
    place = "attention" if isinstance(variant, Attention) else "ffn"
    return Probe(f"{place}/{variant.name}/{index}", tuple(blocks))


def _drawn(variants: Sequence[_PieceT], place: str, index: int, layer: int) -> _PieceT:
    """Return the variant whose hash is the smallest at this place of this mixture: a new variant changes only places that it wins."""
    return min(variants, key=lambda v: hashlib.sha256(f"{index}/{layer}/{place}/{v.name}".encode()).digest())


def _plan_mixture(parent: Block, attentions: Iterable[Attention], ffns: Iterable[FFN], num_layers: int, index: int) -> Probe:
    """Return mixture `index`: any variant anywhere, all equally likely, but the parent's attention in the first layer.

    It has the parent's depth, or four layers where that has fewer. FFNs that were fused of several, which stand for runs of
    layers, are left out.
    """
    narrow = sorted({parent.ffn, *(f for f in ffns if f.intermediate_size <= parent.ffn.intermediate_size)})
    mixed, blocks = sorted({parent.attention, *attentions}), []
    for layer in range(max(_LEAST_MIXED, min(num_layers, _MAX_DEPTH))):
        attention = _drawn(mixed, "attention", index, layer) if layer else parent.attention
        blocks.append(Block(attention, _drawn(narrow, "ffn", index, layer)))
    return Probe(f"mixture/{index}", tuple(blocks))


def plan_probes(
    parent: Block,
    attentions: Iterable[Attention],
    ffns: Iterable[FFN],
    *,
    num_layers: int,
    probes_per_variant: int = 1,
    mixtures: int = 0,
) -> tuple[Probe, ...]:
    """Return the models to measure: four anchors, `probes_per_variant` for each variant that is neither parent's nor no-op, mixtures.

    Args:
        parent: the parent's own block.
        attentions: attention variants whose cost is wanted, in any order.
        ffns: FFN variants whose cost is wanted, in any order.
        num_layers: the parent's depth.
        probes_per_variant: models in which each variant is measured.
        mixtures: models of many variants; those that come out with fewer than two unlike variants are left out.
    """
    attentions, ffns = list(attentions), list(ffns)
    known = {parent.attention, parent.ffn, _NO_ATTENTION, _NO_FFN}
    variants: list[Attention | FFN] = [*sorted(set(attentions) - known), *sorted(set(ffns) - known)]
    probes = _plan_anchors(parent, num_layers)
    probes += [_plan_variant(parent, v, num_layers, i) for v in variants for i in range(probes_per_variant)]
    mixed = [_plan_mixture(parent, attentions, ffns, num_layers, i) for i in range(mixtures)]
    probes += [p for p, num_unlike in zip(mixed, count_unlike([p.architecture for p in mixed], parent), strict=True) if num_unlike]
    unique: dict[tuple[str, ...], Probe] = {}
    for probe in probes:
        unique.setdefault(name_architecture(probe.architecture), probe)
    return tuple(unique.values())


def list_unknowns(architectures: Iterable[Architecture]) -> tuple[Variant, ...]:
    """Return the variants in some architectures whose seconds have to be measured: all but the no-ops, sorted."""
    found: set[Variant] = set()
    for architecture in architectures:
        for block in architecture:
            found |= {("attention", block.attention.name), ("ffn", block.ffn.name)}
    return tuple(sorted(v for v in found if v[1] != "noop"))


def count_variants(architectures: Iterable[Architecture], unknowns: tuple[Variant, ...]) -> NDArray[np.float64]:
    """Return how often each unknown occurs in each architecture, [architectures, unknowns]."""
    columns = {v: i for i, v in enumerate(unknowns)}
    rows = []
    for architecture in architectures:
        row = np.zeros(len(unknowns))
        for block in architecture:
            pieces: tuple[Variant, Variant] = ("attention", block.attention.name), ("ffn", block.ffn.name)
            for variant in pieces:
                if variant[1] != "noop":
                    row[columns[variant]] += 1
        rows.append(row)
    return np.array(rows).reshape(-1, len(unknowns))


def count_unlike(architectures: Iterable[Architecture], parent: Block) -> NDArray[np.float64]:
    """Return how many pieces of each model are neither the parent's nor no-ops, 0 where these are all of one kind, [architectures].

    A model in which one variant alone stands beside the parent's, as in the probes of a variant, has layers that are alike.
    """
    known, counts = {parent.attention, parent.ffn, _NO_ATTENTION, _NO_FFN}, []
    for architecture in architectures:
        unlike = [piece for block in architecture for piece in (block.attention, block.ffn) if piece not in known]
        counts.append(len(unlike) if len(set(unlike)) > 1 else 0)
    return np.array(counts, dtype=np.float64)


def probe_config(shape: PuzzleDagConfig, architecture: Architecture) -> PuzzleDagConfig:
    """Return the configuration of a model of `architecture`, of any depth, everything else as in `shape`.

    Layers beyond the parent's own repeat its kinds of attention (full or sliding) from the start.
    """
    fields = shape.to_dict()
    for name in ("model_type", "per_layer_config"):
        fields.pop(name, None)
    kinds = fields.get("layer_types") or []
    if kinds:
        fields["layer_types"] = [kinds[i % len(kinds)] for i in range(len(architecture))]
    fields["num_hidden_layers"] = len(architecture)
    return child_config(PuzzleDagConfig(**fields), architecture)


def serving_config(shape: PuzzleDagConfig, architecture: Architecture) -> dict[str, object]:
    """Return what config.json says of a model of `architecture`, JSON types only."""
    config: dict[str, object] = probe_config(shape, architecture).to_dict()
    return {**config, "architectures": ["PuzzleDagForCausalLM"], "per_layer_config": _text_keys(config.get("per_layer_config"))}


def _text_keys(layers: object) -> object:
    return {str(k): v for k, v in layers.items()} if isinstance(layers, dict) else layers
