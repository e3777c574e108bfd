"""Replace-one-block scores: how far the parent's answers move when one layer's block is exchanged, pair by pair.

Only the layers after the block change, so every run starts from the parent's cached hidden state of that layer.
The work of a layer's pairs is shared: an attention variant runs once for all FFN variants, an FFN variant runs
once on all attention outputs, stacked along the batch, and so do the parent's remaining layers, norm and head.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from puzzle_dag.architecture import FFN, Attention, Block, LayerSpace
from puzzle_dag.model.checkpoint import child_config
from puzzle_dag.model.modeling_puzzle_dag import PuzzleDagForCausalLM, PuzzleDagLayer
from puzzle_dag.pieces import ActivationCacheLike, LayerPieces, Place
from puzzle_dag.progress import Progress, silent
from puzzle_dag.search.divergence import Reference, ScoreSums
from puzzle_dag.store import ArtifactStore, fingerprint

if TYPE_CHECKING:
    from puzzle_dag.model.parent import Parent

VERSION = 2
SCORE_KIND = "score"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# The states that the parent's own block leads to and the cached ones differ by rounding, a percent at most.
_LARGEST_DRIFT = 0.1
# On a CPU larger stacks leave the caches, and their tensors cost a page fault each 4 KiB: 64 rows take 1.5 times as long as 16.
_ROWS_PER_BATCH = {"cpu": 16, "cuda": 64}


class ScoreError(ValueError):
    """Scores that can't be taken: activations of another parent, or a block whose output is not finite."""


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


def _pair_digest(pieces: LayerPieces, block: Block) -> str:
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


def _half_layer(
    parent: "Parent", model: PuzzleDagForCausalLM, layer: int, piece: tuple[Place, Attention | FFN], pieces: LayerPieces
) -> PuzzleDagLayer:
    """Return a layer with one place filled by the variant and the other left out, so that the two compose to a block."""
    place, variant = piece
    block = Block(variant, FFN("noop")) if isinstance(variant, Attention) else Block(Attention("noop"), variant)
    architecture = [parent.block] * parent.num_layers
    architecture[layer] = block
    config = child_config(model.config, tuple(architecture))
    config._attn_implementation = model.config._attn_implementation
    with torch.device("meta"):
        half = PuzzleDagLayer(config, layer)
    state = parent.layer_state(layer, place) if pieces.is_parent(place, variant.name) else pieces.state(place, variant.name)
    weight = model.lm_head.weight
    half.load_state_dict({n: t.to(weight.device, weight.dtype) for n, t in state.items()}, strict=True, assign=True)
    return half.eval()


class _LayerRunner:
    """Runs (half) layers of the parent's shape on stacked states."""

    def __init__(self, model: PuzzleDagForCausalLM, row_length: int) -> None:
        self.model = model
        weight = model.lm_head.weight
        self.probe = torch.zeros(1, row_length, model.config.hidden_size, device=weight.device, dtype=weight.dtype)
        self.position_ids = torch.arange(row_length, device=weight.device).unsqueeze(0)
        self.position_embeddings = model.model.rotary_emb(self.probe, position_ids=self.position_ids)
        makers = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}
        # A mask of one row broadcasts over the stack; None where the kernel is causal by itself.
        self.masks = {
            kind: makers[kind](
                config=model.config, inputs_embeds=self.probe, attention_mask=None, past_key_values=None, position_ids=self.position_ids
            )
            for kind in sorted(set(model.config.layer_types))
        }

    def layer(self, module: nn.Module, index: int, states: Tensor) -> Tensor:
        """Run one (half) layer as layer `index` of the parent."""
        out: Tensor = module(states, self.position_embeddings, attention_mask=self.masks[self.model.config.layer_types[index]])
        return out

    def after(self, index: int, states: Tensor) -> Tensor:
        """Run the parent's layers after `index`."""
        for later in range(index + 1, self.model.config.num_hidden_layers):
            states = self.layer(self.model.model.layers[later], later, states)
        return states


def _check_drift(states: Tensor, cached: Tensor, layer: int) -> None:
    drift = float((states.float() - cached.to(states).float()).norm() / cached.float().norm())
    if not drift < _LARGEST_DRIFT:
        raise ScoreError(
            f"layer {layer}: from its cached hidden states the parent's own blocks lead to final states {drift:.0%} away from "
            "the cached ones; the activations belong to another parent: collect them again"
        )


@torch.inference_mode()
def _score_blocks(
    parent: "Parent",
    layer: int,
    blocks: Sequence[Block],
    pieces: LayerPieces,
    cache: ActivationCacheLike,
    *,
    rows_per_batch: int,
    dtype: torch.dtype,
    progress: Progress,
) -> dict[Block, ScoreSums]:
    """Run every block of `blocks` (the parent's own among them) in place of the layer and return their sums."""
    same = next(parent.model.parameters()).dtype == dtype
    model = parent.model if same else copy.deepcopy(parent.model).to(dtype)
    device = model.lm_head.weight.device
    # The parent's own variants come first: its pair is the reference of its row batch.
    attentions = sorted({b.attention for b in blocks}, key=lambda a: (a != parent.block.attention, a))
    ffns = sorted({b.ffn for b in blocks}, key=lambda f: (f != parent.block.ffn, f))
    runner = _LayerRunner(model, cache.tokens("score").shape[1])
    attention_halves = {a: _half_layer(parent, model, layer, ("attention", a), pieces) for a in attentions}
    ffn_halves = {f: _half_layer(parent, model, layer, ("ffn", f), pieces) for f in ffns}
    sums = {block: ScoreSums() for block in blocks}
    tokens, rows_each = cache.tokens("score"), max(1, rows_per_batch // len(attentions))
    for start in range(0, len(tokens), rows_each):
        batch = tokens[start : start + rows_each].to(device)
        stop = start + len(batch)
        states = cache.hidden("score", layer, start=start, stop=stop).to(device, dtype)
        attended = {a: runner.layer(half, layer, states) for a, half in attention_halves.items()}
        reference: Reference | None = None
        for ffn, half in ffn_halves.items():
            stacked = [a for a in attentions if Block(a, ffn) in sums]
            out = runner.after(layer, runner.layer(half, layer, torch.cat([attended[a] for a in stacked])))
            for attention, final in zip(stacked, out.split(len(batch)), strict=True):
                if reference is None:
                    _check_drift(final, cache.hidden("score", parent.num_layers, start=start, stop=stop), layer)
                    reference = Reference(model.lm_head, model.model.norm(final), batch)
                sums[Block(attention, ffn)].add(reference, model.lm_head, model.model.norm(final))
        progress(stop * tokens.shape[1] * len(blocks), tokens.numel() * len(blocks), "tokens")
    return sums


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
    if compute_dtype not in _DTYPES:
        raise ScoreError(f"compute_dtype {compute_dtype!r} not understood; use one of {', '.join(_DTYPES)}")
    if rows_per_batch is None:
        rows_per_batch = _ROWS_PER_BATCH[parent.model.device.type]
    if rows_per_batch <= 0:
        raise ScoreError(f"rows_per_batch is {rows_per_batch}; it must be positive")
    inputs: dict[Block, dict[str, Any]] = {}
    scores: dict[Block, BlockScore] = {}
    for block in space.blocks:
        digest = _pair_digest(pieces, block)
        inputs[block] = _score_inputs(parent, layer, digest, activations_digest=activations_digest, compute_dtype=compute_dtype)
        if not rescore and (found := store.find(SCORE_KIND, fingerprint(inputs[block]))):
            scores[block] = BlockScore(**found.metadata)
    missing = [b for b in space.blocks if b not in scores]
    if missing:
        blocks = [parent.block, *(b for b in missing if b != parent.block)]
        sums = _score_blocks(
            parent, layer, blocks, pieces, cache, rows_per_batch=rows_per_batch, dtype=_DTYPES[compute_dtype], progress=progress
        )
        for block in missing:
            kl, lm_loss, agreement = sums[block].means()
            if not (math.isfinite(kl) and math.isfinite(lm_loss)):
                raise ScoreError(f"layer {layer}: block {block.name} gives KL {kl} and LM loss {lm_loss}; train its variants again")
            scores[block] = BlockScore(layer, block.name, kl, lm_loss, agreement, sums[block].num_tokens, inputs[block]["pieces"])
            _write_score(store, scores[block], inputs[block])
    return [scores[b] for b in space.blocks]
