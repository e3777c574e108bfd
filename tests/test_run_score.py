"""Scores of runs against plain models: the parent with several layers replaced, run whole, in the plainest code."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from score_instances import Cache
from torch import Tensor

from puzzle_dag.architecture import FFN, Attention, Block, Run
from puzzle_dag.children.assemble import build_child
from puzzle_dag.model.checkpoint import child_config
from puzzle_dag.model.configuration_puzzle_dag import PuzzleDagConfig
from puzzle_dag.model.modeling_puzzle_dag import PuzzleDagForCausalLM
from puzzle_dag.model.parent import Parent
from puzzle_dag.pieces import LayerPieces
from puzzle_dag.search.layer_runner import ScoreError
from puzzle_dag.search.run_score import RunScore, digest_run, score_runs
from puzzle_dag.store import ArtifactStore

PARENT_BLOCK = Block(Attention("gqa", 4), FFN("swiglu", 96))
NUM_LAYERS = 4
FROM_FIRST = tuple(Run(0, last, kind) for last in (1, 2, 3) for kind in ("drop", "fuse"))
FROM_SECOND = tuple(Run(1, last, kind) for last in (2, 3) for kind in ("drop", "fuse"))


@pytest.fixture(params=["llama", "sliding"])
def parent(request: pytest.FixtureRequest) -> Parent:
    torch.manual_seed(0)
    kinds = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    extra = {"sliding_window": 5, "layer_types": kinds, "mlp_bias": True} if request.param == "sliding" else {}
    config = PuzzleDagConfig(
        vocab_size=61,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=16,
        initializer_range=0.15,
        tie_word_embeddings=False,
        **extra,
    )
    model = PuzzleDagForCausalLM(child_config(config, (PARENT_BLOCK,) * NUM_LAYERS)).eval()
    with torch.no_grad():  # norms of ones would hide whether each FFN gets its own
        for name, parameter in model.named_parameters():
            if name.endswith(("norm.weight", "bias")):
                parameter.copy_(float(name.endswith("weight")) + 0.2 * torch.randn(parameter.shape))
    return Parent(model, None, PARENT_BLOCK, "parent", Path(), tuple("abcd"))


@pytest.fixture
def cache(parent: Parent) -> Cache:
    rows = torch.randint(0, 61, (5, 13), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        out = parent.model.model(input_ids=rows, output_hidden_states=True)
    return Cache(list(out.hidden_states), rows)


def plain_logits(parent: Parent, cache: Cache, run: Run | None) -> Tensor:
    """The parent layer by layer, with a run replaced as its definition says: X + sum_j FFN_j(norm_j(X)) after the first attention."""
    backbone = parent.model.model
    length = cache.rows.shape[1]
    position_ids = torch.arange(length).unsqueeze(0)
    with torch.no_grad():
        states = backbone.embed_tokens(cache.rows)
        rotary = backbone.rotary_emb(states, position_ids=position_ids)
        for index, layer in enumerate(backbone.layers):
            window = parent.config.layer_window(index) or length
            ages = position_ids.T - position_ids
            mask = ((ages >= 0) & (ages < window))[None, None]
            if run is not None and index in run.layers:
                if run.kind == "fuse" and index == run.first:
                    attended = states + layer.self_attn(layer.input_layernorm(states), rotary, attention_mask=mask)
                    own = [backbone.layers[i] for i in run.layers]
                    states = attended + sum(each.mlp(each.post_attention_layernorm(attended)) for each in own)
                continue
            states = layer(states, rotary, attention_mask=mask)
        return parent.model.lm_head(backbone.norm(states))


def plain_scores(parent: Parent, cache: Cache, run: Run) -> tuple[float, float, float]:
    log_p, log_q = (plain_logits(parent, cache, r).double().log_softmax(-1) for r in (None, run))
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
    loss = torch.nn.functional.nll_loss(log_q[:, :-1].flatten(0, 1), cache.rows[:, 1:].flatten()).item()
    return kl, loss, (log_p.argmax(-1) == log_q.argmax(-1)).double().mean().item()


def score(parent: Parent, runs: tuple[Run, ...], cache: Cache, folder: Path, **options: object) -> list[RunScore]:
    return score_runs(parent, runs, cache, ArtifactStore(folder), activations_digest="x", compute_dtype="float32", **options)


@pytest.mark.parametrize("rows_per_batch", [1, 8, 64])
@pytest.mark.parametrize("runs", [FROM_FIRST, FROM_SECOND, (Run(2, 3, "fuse"),)])
def test_every_run_equals_a_whole_model_in_plain_code(
    parent: Parent, cache: Cache, tmp_path: Path, runs: tuple[Run, ...], rows_per_batch: int
) -> None:
    scores = score(parent, runs, cache, tmp_path, rows_per_batch=rows_per_batch)
    assert [s.block for s in scores] == [run.name for run in runs]
    for run, found in zip(runs, scores, strict=True):
        kl, loss, agreement = plain_scores(parent, cache, run)
        assert found.kl == pytest.approx(kl, rel=1e-3, abs=1e-6), run.name
        assert found.lm_loss == pytest.approx(loss, rel=1e-4)
        assert found.top1_agreement == pytest.approx(agreement, abs=1e-9)
        assert found.layer == run.first and found.num_tokens == cache.rows.numel()
        assert found.blocks == tuple(b.name for b in run.blocks(PARENT_BLOCK)) and len(found.digests) == len(run.layers)
    assert set(cache.reads) == {runs[0].first, NUM_LAYERS}, "only the runs' first boundary is read, and the last as a check"


def test_a_run_is_not_the_sum_of_its_layers(parent: Parent, cache: Cache) -> None:
    """What the scores are for: on this parent the layers' single no-ops don't add up to the run's."""
    singles = []
    for layer in (1, 2):
        log_p = plain_logits(parent, cache, None).double().log_softmax(-1)
        log_q = plain_logits(parent, cache, Run(layer, layer, "drop")).double().log_softmax(-1)
        singles.append((log_p.exp() * (log_p - log_q)).sum(-1).mean().item())
    together = plain_scores(parent, cache, Run(1, 2, "drop"))[0]
    assert abs(together - sum(singles)) > 0.05 * together


def test_the_child_computes_what_was_scored(parent: Parent, cache: Cache) -> None:
    """Assembled from the run's blocks and its fused piece, the child gives the plain model's logits."""
    for run in (*FROM_FIRST, *FROM_SECOND):
        blocks, pieces = [PARENT_BLOCK] * NUM_LAYERS, [LayerPieces(i, {}) for i in range(NUM_LAYERS)]
        blocks[run.first : run.last + 1] = run.blocks(PARENT_BLOCK)
        if run.kind == "fuse":
            pieces[run.first] = LayerPieces(run.first, {}, fused={f"ffn/{blocks[run.first].ffn.name}": tuple(run.layers)})
        child = build_child(parent, tuple(blocks), pieces)
        with torch.no_grad():
            logits = child(input_ids=cache.rows).logits
        torch.testing.assert_close(logits, plain_logits(parent, cache, run), atol=2e-4, rtol=1e-4)


def test_only_missing_runs_are_computed_and_rows_read_back(parent: Parent, cache: Cache, tmp_path: Path) -> None:
    before = score(parent, FROM_FIRST[:2], cache, tmp_path)
    cache.reads.clear()
    assert score(parent, FROM_FIRST[:2], cache, tmp_path) == before and cache.reads == []
    assert score(parent, (), cache, tmp_path) == []
    both = score(parent, FROM_FIRST, cache, tmp_path)
    assert both[:2] == before and cache.reads != []
    graded = replace(before[1], tasks={"quiz": 0.5})
    assert RunScore.of_row(graded.to_row()) == graded and RunScore.of_row(before[0].to_row()) == before[0]
    cache.reads.clear()
    assert score(parent, FROM_FIRST[:2], cache, tmp_path, rescore=True) == before and cache.reads != []


def test_digests_say_what_a_child_is_made_of(parent: Parent) -> None:
    """Layers of nothing are the same everywhere, so a dropped run and single no-ops are one child; a fused FFN names its layers."""
    nothing = {*digest_run(parent, Run(0, 1, "drop")), *digest_run(parent, Run(1, 3, "drop")), *digest_run(parent, Run(0, 2, "fuse"))[1:]}
    assert len(nothing) == 1
    fused = [digest_run(parent, Run(0, 1, "fuse"))[0], digest_run(parent, Run(0, 2, "fuse"))[0], digest_run(parent, Run(1, 2, "fuse"))[0]]
    assert len({*fused, *nothing}) == 4


def test_activations_of_another_parent_and_what_is_not_finite_are_refused(parent: Parent, cache: Cache, tmp_path: Path) -> None:
    with pytest.raises(ScoreError, match="compute_dtype 'int8'"):
        score_runs(parent, FROM_FIRST, cache, ArtifactStore(tmp_path), activations_digest="x", compute_dtype="int8")
    cache.states[-1] = cache.states[-1] * -1
    with pytest.raises(ScoreError, match="another parent"):
        score(parent, FROM_FIRST, cache, tmp_path)
    cache.states[-1] = cache.states[-1] * -1
    with torch.no_grad():
        parent.model.model.layers[1].mlp.down_proj.weight[0, 0] = float("inf")
    with pytest.raises(ScoreError):
        score(parent, FROM_FIRST[1:2], cache, tmp_path)
