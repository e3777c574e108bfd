"""Scores against plain models: a child with one block exchanged, run whole, in the plainest code."""

from pathlib import Path

import pytest
import torch
from score_instances import PARENT_BLOCK, SPACE, Cache, make_parent, make_pieces
from torch import Tensor

from puzzle_dag.architecture import Block, LayerSpace
from puzzle_dag.model.checkpoint import child_config
from puzzle_dag.model.modeling_puzzle_dag import PuzzleDagForCausalLM
from puzzle_dag.model.parent import Parent
from puzzle_dag.pieces import LayerPieces
from puzzle_dag.search.score import ScoreError, score_layer
from puzzle_dag.store import Artifact, ArtifactStore, digest_tensors


@pytest.fixture(params=["llama", "sliding"])
def parent(request: pytest.FixtureRequest) -> Parent:
    return make_parent(sliding=request.param == "sliding")


@pytest.fixture
def cache(parent: Parent) -> Cache:
    rows = torch.randint(0, 61, (5, 13), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        out = parent.model.model(input_ids=rows, output_hidden_states=True)
    return Cache([h.bfloat16().float() for h in out.hidden_states], rows)


def plain_scores(parent: Parent, layer: int, block: Block, pieces: LayerPieces, cache: Cache) -> tuple[float, float, float]:
    """Assemble the child as a whole model and compare all its logits with the parent's in float64."""
    architecture = [PARENT_BLOCK] * 3
    architecture[layer] = block
    child = PuzzleDagForCausalLM(child_config(parent.config, tuple(architecture))).eval()
    state = {n: t for n, t in parent.model.state_dict().items() if not n.startswith(f"model.layers.{layer}.")}
    for place, variant in (("attention", block.attention), ("ffn", block.ffn)):
        own = pieces.is_parent(place, variant.name)
        tensors = parent.layer_state(layer, place) if own else pieces.state(place, variant.name)
        state.update({f"model.layers.{layer}.{n}": t for n, t in tensors.items()})
    child.load_state_dict(state)

    def log_probabilities(model: PuzzleDagForCausalLM) -> Tensor:
        def enter(module: torch.nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (cache.states[layer], *args[1:])

        hook = model.model.layers[layer].register_forward_pre_hook(enter)
        with torch.no_grad():
            logits = model(input_ids=cache.rows).logits
        hook.remove()
        return logits.double().log_softmax(-1)

    log_p, log_q = log_probabilities(parent.model), log_probabilities(child)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
    loss = torch.nn.functional.nll_loss(log_q[:, :-1].flatten(0, 1), cache.rows[:, 1:].flatten()).item()
    agreement = (log_p.argmax(-1) == log_q.argmax(-1)).double().mean().item()
    return kl, loss, agreement


@pytest.mark.parametrize("rows_per_batch", [1, 8, 64])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_every_pair_equals_a_whole_child_in_plain_code(
    parent: Parent, cache: Cache, tmp_path: Path, layer: int, rows_per_batch: int
) -> None:
    pieces = make_pieces(parent, layer, tmp_path)
    scores = score_layer(
        parent,
        layer,
        SPACE,
        pieces,
        cache,
        ArtifactStore(tmp_path / "store"),
        activations_digest="x",
        rows_per_batch=rows_per_batch,
        compute_dtype="float32",
    )
    assert [s.block for s in scores] == [b.name for b in SPACE.blocks]
    for block, score in zip(SPACE.blocks, scores, strict=True):
        kl, loss, agreement = plain_scores(parent, layer, block, pieces, cache)
        assert score.kl == pytest.approx(kl, rel=1e-4, abs=1e-6)
        assert score.lm_loss == pytest.approx(loss, rel=1e-5)
        assert score.top1_agreement == pytest.approx(agreement, abs=1e-12)
        assert score.num_tokens == cache.rows.numel()
        assert (score.kl > 1e-3) == (block != PARENT_BLOCK)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_parents_own_pair_is_exactly_zero(parent: Parent, cache: Cache, tmp_path: Path, dtype: str) -> None:
    pieces = make_pieces(parent, 1, tmp_path)
    scores = score_layer(
        parent, 1, SPACE, pieces, cache, ArtifactStore(tmp_path / "s"), activations_digest="x", rows_per_batch=9, compute_dtype=dtype
    )
    own = next(s for s in scores if s.block == PARENT_BLOCK.name)
    assert (own.kl, own.top1_agreement) == (0.0, 1.0)


def test_a_copy_of_the_parents_variant_scores_nothing(parent: Parent, cache: Cache, tmp_path: Path) -> None:
    """The same tensors under another name take another slot of the stack, and must still give no divergence."""
    pieces = make_pieces(parent, 1, tmp_path)
    copied = {**parent.layer_state(1, "attention")}
    copied["self_attn.k_proj.weight"] = copied["self_attn.k_proj.weight"].clone()
    store = ArtifactStore(tmp_path / "copies")
    pieces.artifacts["attention/kv4"] = store.write_tensors("piece", digest_tensors(copied), copied, inputs=None)
    del pieces.parents["attention/kv4"]
    scores = score_layer(
        parent, 1, SPACE, pieces, cache, ArtifactStore(tmp_path / "s"), activations_digest="x", compute_dtype="float32"
    )
    own = next(s for s in scores if s.block == PARENT_BLOCK.name)
    assert own.kl < 1e-9


def test_only_missing_pairs_are_computed(parent: Parent, cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, pieces = ArtifactStore(tmp_path / "store"), make_pieces(parent, 1, tmp_path)
    narrow = LayerSpace(SPACE.attentions[1:], SPACE.ffns[1:])

    def score(space: LayerSpace, **arguments: object) -> list[object]:
        options = {"activations_digest": "x", "compute_dtype": "float32", **arguments}
        return list(score_layer(parent, 1, space, pieces, cache, store, **options))

    first = score(narrow)
    cache.reads.clear()
    assert score(narrow) == first
    assert cache.reads == [], "nothing is read where every pair is stored"
    scored: list[Block] = []
    write = store.write

    def counting(kind: str, key: str, fill: object, **rest: object) -> Artifact:
        scored.append(rest["metadata"]["block"])
        return write(kind, key, fill, **rest)

    monkeypatch.setattr(store, "write", counting)
    wide = score(SPACE)
    assert sorted(scored) == sorted({b.name for b in SPACE.blocks} - {b.name for b in narrow.blocks})
    assert [s for s in wide if s.block in {f.block for f in first}] == first
    scored.clear()
    score(SPACE, activations_digest="other")
    assert len(scored) == len(SPACE.blocks), "other activations, other scores"
    scored.clear()
    score(SPACE, rescore=True)
    assert len(scored) == len(SPACE.blocks)


def test_a_retrained_piece_changes_only_its_pairs(parent: Parent, cache: Cache, tmp_path: Path) -> None:
    store, pieces = ArtifactStore(tmp_path / "store"), make_pieces(parent, 1, tmp_path)
    options = {"activations_digest": "x", "compute_dtype": "float32"}
    before = score_layer(parent, 1, SPACE, pieces, cache, store, **options)
    pieces.artifacts["ffn/w32"] = make_pieces(parent, 1, tmp_path / "other", seed=4).artifacts["ffn/w32"]
    after = score_layer(parent, 1, SPACE, pieces, cache, store, **options)
    for old, new in zip(before, after, strict=True):
        assert (old == new) == (not new.block.endswith("/w32"))


def test_activations_of_another_parent_are_refused(parent: Parent, cache: Cache, tmp_path: Path) -> None:
    pieces = make_pieces(parent, 1, tmp_path)
    cache.states[1] = torch.randn_like(cache.states[1])
    with pytest.raises(ScoreError, match="another parent"):
        score_layer(parent, 1, SPACE, pieces, cache, ArtifactStore(tmp_path / "s"), activations_digest="x", compute_dtype="float32")


def test_a_broken_piece_is_named(parent: Parent, cache: Cache, tmp_path: Path) -> None:
    pieces = make_pieces(parent, 1, tmp_path)
    tensors = pieces.state("ffn", "linear")
    tensors["mlp.linear_mlp.weight"][0, 0] = float("nan")
    pieces.artifacts["ffn/linear"] = ArtifactStore(tmp_path / "bad").write_tensors("piece", digest_tensors(tensors), tensors, inputs=None)
    with pytest.raises(ScoreError, match=r"block .*/linear gives KL nan"):
        score_layer(parent, 1, SPACE, pieces, cache, ArtifactStore(tmp_path / "s"), activations_digest="x", compute_dtype="float32")


@pytest.mark.parametrize(("field_name", "value"), [("compute_dtype", "float16"), ("rows_per_batch", 0)])
def test_bad_settings_are_refused(parent: Parent, cache: Cache, tmp_path: Path, field_name: str, value: object) -> None:
    pieces = make_pieces(parent, 1, tmp_path)
    with pytest.raises(ScoreError, match=field_name):
        score_layer(parent, 1, SPACE, pieces, cache, ArtifactStore(tmp_path / "s"), activations_digest="x", **{field_name: value})
