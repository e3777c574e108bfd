"""Scores in context: what exchanging one layer's block does to a child in which others are replaced already.

A block that was scored alone in the parent gets other inputs, and hands its own errors to other layers, as soon as its
neighbours are replaced, too. Here the child is what stays: its layers run before and after the block that is exchanged,
and the outcome is compared with the parent's. All other work is as in `search/score.py`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from puzzle_dag.architecture import Architecture, Block, LayerSpace
from puzzle_dag.model.modeling_puzzle_dag import PuzzleDagForCausalLM
from puzzle_dag.pieces import ActivationCacheLike, LayerPieces
from puzzle_dag.progress import Progress, silent
from puzzle_dag.search.divergence import Reference, ScoreSums
from puzzle_dag.search.layer_runner import LayerRunner, cast_parent, check_computing
from puzzle_dag.search.score import VERSION as SCORE_VERSION
from puzzle_dag.search.score import BlockScore, EnteringRows, block_layer, pair_digest, score_pairs
from puzzle_dag.store import ArtifactStore, fingerprint

if TYPE_CHECKING:
    from puzzle_dag.model.parent import Parent

VERSION = 1
CONTEXT_KIND = "context_scores"
BROKEN_LOSS = 1e6
"""KL and LM loss of an exchange after which a child's outputs are not finite: none that a search would take."""


@dataclass(frozen=True, slots=True)
class Context:
    """What stays the same while blocks are exchanged: the parent, the library's pieces, and the tokens that scores are taken on.

    Attributes:
        parent: the loaded parent.
        spaces: of every layer.
        pieces: of every layer.
        cache: hidden states of the parent; its first boundary is read, and its last, which says what the parent answers.
        compute_dtype: "bfloat16" or "float32"; divergences are always taken in float32.
        num_rows: rows of tokens that scores are taken on, the cache's first; all of them by default.
        rows_per_batch: rows that run through the layers at once; by default as many as suit the parent's device.
    """

    parent: "Parent"
    spaces: Sequence[LayerSpace]
    pieces: Sequence[LayerPieces]
    cache: ActivationCacheLike
    compute_dtype: str = "bfloat16"
    num_rows: int | None = None
    rows_per_batch: int | None = None

    def prepare(self) -> tuple[PuzzleDagForCausalLM, int]:
        """Return the parent's model in the compute dtype, and the rows a batch. Raises ScoreError for settings that are none."""
        dtype, rows_per_batch = check_computing(self.parent, self.compute_dtype, self.rows_per_batch)
        return cast_parent(self.parent, dtype), rows_per_batch

    def entering(self, model: PuzzleDagForCausalLM) -> Tensor:
        """Return the states of all rows that enter the first layer, [rows, length, hidden]."""
        return self.cache.hidden("score", 0, stop=self.num_rows).to(model.lm_head.weight)

    def reference(self, model: PuzzleDagForCausalLM, start: int, stop: int) -> Reference:
        """Return what the parent answers on some rows."""
        final = self.cache.hidden("score", self.parent.num_layers, start=start, stop=stop).to(model.lm_head.weight)
        return Reference(model.lm_head, model.model.norm(final), self.cache.tokens("score")[start:stop].to(final.device))

    def layers(self, model: PuzzleDagForCausalLM, architecture: Architecture) -> dict[int, torch.nn.Module]:
        """Return the layers in which an architecture differs from the parent."""
        if len(architecture) != self.parent.num_layers:
            raise ValueError(f"architecture: {len(architecture)} layers given, the parent has {self.parent.num_layers}")
        changed = [(i, block) for i, block in enumerate(architecture) if block != self.parent.block]
        return {i: block_layer(self.parent, model, i, block, self.pieces[i]) for i, block in changed}

    def inputs(self, architecture: Architecture, layer: int) -> dict[str, Any]:
        """Return all that the scores of one layer's blocks in a child hang on."""
        placed = [pair_digest(pieces, block) for pieces, block in zip(self.pieces, architecture, strict=True)]
        return {
            "versions": [VERSION, SCORE_VERSION],
            "parent": self.parent.digest,
            "child": [[block.name, digest] for i, (block, digest) in enumerate(zip(architecture, placed, strict=True)) if i != layer],
            "layer": layer,
            "pairs": {block.name: pair_digest(self.pieces[layer], block) for block in self.spaces[layer].blocks},
            "activations": self.cache.digest,
            "num_rows": len(self.cache.tokens("score")[: self.num_rows]),
            "compute_dtype": self.compute_dtype,
        }


def _as_score(layer: int, block: Block, pieces: LayerPieces, sums: ScoreSums) -> BlockScore:
    kl, lm_loss, agreement = sums.means()
    if not (math.isfinite(kl) and math.isfinite(lm_loss)):  # the child breaks with it, though the parent did not
        kl, lm_loss, agreement = BROKEN_LOSS, BROKEN_LOSS, 0.0
    return BlockScore(layer, block.name, kl, lm_loss, agreement, sums.num_tokens, pair_digest(pieces, block))


@torch.inference_mode()
def measure_in_context(context: Context, architecture: Architecture) -> ScoreSums:
    """Return how far a child is from its parent on the tokens that scores are taken on; sums may be infinite or NaN.

    Raises:
        ScoreError: an unknown dtype.
        PieceMissingError: a variant was never made.
    """
    model, rows_per_batch = context.prepare()
    sums, states = ScoreSums(), context.entering(model)
    runner = LayerRunner(model, states.shape[1], context.layers(model, architecture))
    for start in range(0, len(states), rows_per_batch):
        normed = model.model.norm(runner.after(-1, states[start : start + rows_per_batch]))
        # Row by row: the parent's probabilities are float32 and as wide as the vocabulary.
        for row, own in enumerate(normed.split(1), start):
            sums.add(context.reference(model, row, row + 1), model.lm_head, own)
    return sums


@torch.inference_mode()
def score_in_context(
    context: Context, architecture: Architecture, store: ArtifactStore, *, rescore: bool = False, progress: Progress = silent
) -> list[list[BlockScore]]:
    """Score every block of every layer, each alone exchanged in a child.

    Args:
        context: the parent, the pieces and the tokens.
        architecture: the child's, one block a layer, each of its layer's space.
        store: scores are kept here, layer by layer; only those that are missing are computed.
        rescore: compute all and replace what is stored.
        progress: told the layers done.

    Returns:
        For each layer one score a pair, in the order of the layer's space. A layer's own block scores what the child does.

    Raises:
        ScoreError: an unknown dtype.
        PieceMissingError: a variant was never made.
    """
    num_layers = context.parent.num_layers
    inputs = [context.inputs(architecture, layer) for layer in range(num_layers)]
    found = {i: known for i in range(num_layers) if not rescore and (known := _find(store, inputs[i]))}
    progress(len(found), num_layers, "layers")
    if len(found) < num_layers:
        model, rows_per_batch = context.prepare()
        states = context.entering(model)
        runner = LayerRunner(model, states.shape[1], context.layers(model, architecture))
        for layer in range(num_layers):
            if layer not in found:
                rows = _rows_of_child(context, model, states)
                own, blocks = context.pieces[layer], context.spaces[layer].blocks
                sums = score_pairs(context.parent, runner, layer, blocks, own, rows, rows_per_batch=rows_per_batch, progress=silent)
                found[layer] = [_as_score(layer, block, own, sums[block]) for block in blocks]
                _write(store, found[layer], inputs[layer])
                progress(len(found), num_layers, "layers")
            states = torch.cat([runner.layer(runner.layers[layer], layer, part) for part in states.split(rows_per_batch)])
    return [found[layer] for layer in range(num_layers)]


def _rows_of_child(context: Context, model: PuzzleDagForCausalLM, states: Tensor) -> EnteringRows:
    """Return rows that enter a layer with these states, to be compared with what the parent answers."""
    tokens = context.cache.tokens("score")[: len(states)]
    return EnteringRows(tokens, lambda start, stop: states[start:stop], lambda _, start, stop: context.reference(model, start, stop))


def _find(store: ArtifactStore, inputs: Mapping[str, Any]) -> list[BlockScore] | None:
    known = store.find(CONTEXT_KIND, fingerprint(inputs))
    return None if known is None else [BlockScore(**score) for score in known.metadata["scores"]]


def _write(store: ArtifactStore, scores: Sequence[BlockScore], inputs: Mapping[str, Any]) -> None:
    content = {"scores": [asdict(score) for score in scores]}
    store.write(CONTEXT_KIND, fingerprint(inputs), lambda _: fingerprint(content), inputs=inputs, metadata=content)
