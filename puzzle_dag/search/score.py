"""Replace-one-block scores: how far the parent's answers move when one layer's block is exchanged, pair by pair.

Only the layers after the block change, so every run starts from the parent's cached hidden state of that layer.
The work of a layer's pairs is shared: an attention variant runs once for all FFN variants, an FFN variant runs
once on all attention outputs, stacked along the batch, and so do the parent's remaining layers, norm and head.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from puzzle_dag.architecture import FFN, Attention, Block, LayerSpace
from puzzle_dag.model.modeling_puzzle_dag import PuzzleDagForCausalLM, PuzzleDagLayer
from puzzle_dag.model.replacement import make_layer
from puzzle_dag.pieces import ActivationCacheLike, LayerPieces, Place
from puzzle_dag.progress import Progress, silent
from puzzle_dag.search.divergence import Reference, ScoreSums
from puzzle_dag.search.layer_runner import LayerRunner, ScoreError, cast_parent, check_computing, check_drift
from puzzle_dag.store import ArtifactStore, fingerprint

if TYPE_CHECKING:
    from puzzle_dag.model.parent import Parent

VERSION = 2
SCORE_KIND = "score"


@dataclass(frozen=True, slots=True)
class BlockScore:
    """What replacing one block alone does to the parent (Puzzle, arXiv 2411.19146, section 4.2).

    Attributes:
        layer: index of the layer.
        block: name of the block, e.g. "kv4/w384".
        kl: mean KL(parent || child) over all tokens, in nats; exactly 0 for the parent's own block.
        lm_loss: mean next-token cross entropy of the child, in nats.
        top1_agreement: share of tokens at which parent and child have the same most likely next token.
        num_tokens: tokens that `kl` and `top1_agreement` are means of.
        digest: of the two pieces' tensors.
    """

    layer: int
    block: str
    kl: float
    lm_loss: float
    top1_agreement: float
    num_tokens: int
    digest: str


def pair_digest(pieces: LayerPieces, block: Block) -> str:
    """Return the digest of a pair's tensors."""
    return fingerprint([pieces.digest("attention", block.attention.name), pieces.digest("ffn", block.ffn.name)])


def _score_inputs(parent: "Parent", layer: int, digest: str, *, activations_digest: str, compute_dtype: str) -> dict[str, Any]:
    return {
        "version": VERSION,
        "parent": parent.digest,
        "layer": layer,
        "pieces": digest,
        "activations": activations_digest,
        "compute_dtype": compute_dtype,
    }


def _place_state(parent: "Parent", layer: int, place: Place, variant: Attention | FFN, pieces: LayerPieces) -> Mapping[str, Tensor]:
    return parent.layer_state(layer, place) if pieces.is_parent(place, variant.name) else pieces.state(place, variant.name)


def _half_layer(
    parent: "Parent", model: PuzzleDagForCausalLM, layer: int, piece: tuple[Place, Attention | FFN], pieces: LayerPieces
) -> PuzzleDagLayer:
    """Return a layer with one place filled by the variant and the other left out, so that the two compose to a block."""
    place, variant = piece
    block = Block(variant, FFN("noop")) if isinstance(variant, Attention) else Block(Attention("noop"), variant)
    return make_layer(parent, model, layer, block, _place_state(parent, layer, place, variant, pieces))


def block_layer(parent: "Parent", model: PuzzleDagForCausalLM, layer: int, block: Block, pieces: LayerPieces) -> PuzzleDagLayer:
    """Return a layer made of a pair of the library's pieces, or the parent's, on the device and in the dtype of `model`."""
    attention = _place_state(parent, layer, "attention", block.attention, pieces)
    return make_layer(parent, model, layer, block, {**attention, **_place_state(parent, layer, "ffn", block.ffn, pieces)})


@dataclass(frozen=True, slots=True)
class EnteringRows:
    """The rows that a layer's pairs are run on, and what becomes of them is compared with.

    Attributes:
        tokens: [rows, length].
        states: (start, stop) -> the states of these rows that enter the layer, [rows, length, hidden].
        reference: (final states of the first pair, start, stop) -> the distributions to compare with.
    """

    tokens: Tensor
    states: Callable[[int, int], Tensor]
    reference: Callable[[Tensor, int, int], Reference]


@torch.inference_mode()
def score_pairs(
    parent: "Parent",
    runner: LayerRunner,
    layer: int,
    blocks: Sequence[Block],
    pieces: LayerPieces,
    rows: EnteringRows,
    *,
    rows_per_batch: int,
    progress: Progress,
) -> dict[Block, ScoreSums]:
    """Run every block in place of one layer, then the layers of the runner's model that follow it, and return the blocks' sums.

    The work is shared between pairs (see the module's first lines). The parent's own variants come first.
    """
    model = runner.model
    attentions = sorted({b.attention for b in blocks}, key=lambda a: (a != parent.block.attention, a))
    ffns = sorted({b.ffn for b in blocks}, key=lambda f: (f != parent.block.ffn, f))
    attention_halves = {a: _half_layer(parent, model, layer, ("attention", a), pieces) for a in attentions}
    ffn_halves = {f: _half_layer(parent, model, layer, ("ffn", f), pieces) for f in ffns}
    sums = {block: ScoreSums() for block in blocks}
    tokens, rows_each = rows.tokens, max(1, rows_per_batch // len(attentions))
    for start in range(0, len(tokens), rows_each):
        stop = min(start + rows_each, len(tokens))
        states = rows.states(start, stop)
        attended = {a: runner.layer(half, layer, states) for a, half in attention_halves.items()}
        reference: Reference | None = None
        for ffn, half in ffn_halves.items():
            stacked = [a for a in attentions if Block(a, ffn) in sums]
            out = runner.after(layer, runner.layer(half, layer, torch.cat([attended[a] for a in stacked])))
            for attention, final in zip(stacked, out.split(stop - start), strict=True):
                reference = rows.reference(final, start, stop) if reference is None else reference
                sums[Block(attention, ffn)].add(reference, model.lm_head, model.model.norm(final))
        progress(stop * tokens.shape[1] * len(blocks), tokens.numel() * len(blocks), "tokens")
    return sums


def _rows_of_parent(model: PuzzleDagForCausalLM, layer: int, cache: ActivationCacheLike) -> EnteringRows:
    """Return the cached rows that enter a layer of the parent; the parent's own pair, which comes first, is what they are compared with."""
    device, dtype, tokens = model.lm_head.weight.device, model.lm_head.weight.dtype, cache.tokens("score")

    def reference(final: Tensor, start: int, stop: int) -> Reference:
        check_drift(final, cache.hidden("score", cache.num_layers, start=start, stop=stop), layer)
        return Reference(model.lm_head, model.model.norm(final), tokens[start:stop].to(device))

    return EnteringRows(tokens, lambda start, stop: cache.hidden("score", layer, start=start, stop=stop).to(device, dtype), reference)


def _write_score(store: ArtifactStore, score: BlockScore, inputs: Mapping[str, Any]) -> None:
    store.write(SCORE_KIND, fingerprint(inputs), lambda _: fingerprint(asdict(score)), inputs=inputs, metadata=asdict(score))


def score_layer(
    parent: "Parent",
    layer: int,
    space: LayerSpace,
    pieces: LayerPieces,
    cache: ActivationCacheLike,
    store: ArtifactStore,
    *,
    activations_digest: str,
    rows_per_batch: int | None = None,
    compute_dtype: str = "bfloat16",
    rescore: bool = False,
    progress: Progress = silent,
) -> list[BlockScore]:
    """Score every pair of a layer's space, each alone in the parent, on the cache's score split.

    Args:
        parent: the parent; computed with on its device, in `compute_dtype` (a copy where its weights have another).
        layer: index of the layer.
        space: the layer's variants, the parent's own among them.
        pieces: the layer's trained variants.
        cache: hidden states of the parent; boundary `layer` is read, and the last as a check.
        store: scores are kept here, one a pair; only those that are missing are computed.
        activations_digest: digest of `cache`'s content, part of the scores' key.
        rows_per_batch: rows that run through the remaining layers at once, all stacked pairs together; by default as many as
            suit the parent's device.
        compute_dtype: "bfloat16" or "float32"; divergences are always taken in float32.
        rescore: compute all pairs and replace what is stored.
        progress: told the tokens done, over all pairs.

    Returns:
        One score a pair, in the order of `space.blocks`.

    Raises:
        ScoreError: the activations are not of this parent, a block's output is not finite, an unknown dtype.
        PieceMissingError: a variant was never made.
    """
    dtype, rows_per_batch = check_computing(parent, compute_dtype, rows_per_batch)
    inputs: dict[Block, dict[str, Any]] = {}
    scores: dict[Block, BlockScore] = {}
    for block in space.blocks:
        digest = pair_digest(pieces, block)
        inputs[block] = _score_inputs(parent, layer, digest, activations_digest=activations_digest, compute_dtype=compute_dtype)
        if not rescore and (found := store.find(SCORE_KIND, fingerprint(inputs[block]))):
            scores[block] = BlockScore(**found.metadata)
    missing = [b for b in space.blocks if b not in scores]
    if missing:
        blocks = [parent.block, *(b for b in missing if b != parent.block)]
        runner = LayerRunner(cast_parent(parent, dtype), cache.tokens("score").shape[1])
        rows = _rows_of_parent(runner.model, layer, cache)
        sums = score_pairs(parent, runner, layer, blocks, pieces, rows, rows_per_batch=rows_per_batch, progress=progress)
        for block in missing:
            kl, lm_loss, agreement = sums[block].means()
            if not (math.isfinite(kl) and math.isfinite(lm_loss)):
                raise ScoreError(f"layer {layer}: block {block.name} gives KL {kl} and LM loss {lm_loss}; train its variants again")
            scores[block] = BlockScore(layer, block.name, kl, lm_loss, agreement, sums[block].num_tokens, inputs[block]["pieces"])
            _write_score(store, scores[block], inputs[block])
    return [scores[b] for b in space.blocks]
