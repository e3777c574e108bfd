"""Initialisations against loops, float64 and NumPy's least squares, and against what the parent itself computes."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from puzzle_dag.architecture import FFN, Attention
from puzzle_dag.config import ParentSource
from puzzle_dag.library.activations import ActivationCache, collect_activations
from puzzle_dag.library.block import ParentLayer, Variant
from puzzle_dag.library.distill import held_out_losses
from puzzle_dag.library.initialise import held_out_rows, initialise_piece, initialise_pieces, kept_channels, merge_kv_heads
from puzzle_dag.library.least_squares import Moments, ridge_weight
from puzzle_dag.model.parent import Parent, load_parent

FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]
ROW_LENGTH = 16


def read_parent(folder: Path) -> Parent:
    return load_parent(ParentSource(path=folder.name), folder.parent)


@pytest.fixture(scope="module")
def cached(family_parent_folder: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Parent, ActivationCache]]:
    found = {}
    for family in FAMILIES:
        parent, folder = read_parent(family_parent_folder[family]), tmp_path_factory.mktemp(family)
        rows = torch.randint(0, 500, (40, ROW_LENGTH), generator=torch.Generator().manual_seed(0))
        collect_activations(parent, rows, rows[:1], folder, dtype="float32", rows_per_shard=16)
        found[family] = parent, ActivationCache(folder)
    return found


def layer_of(parent: Parent, layer: int = 1) -> ParentLayer:
    return ParentLayer(parent, layer, dtype=torch.float32, row_length=ROW_LENGTH)


def test_the_channels_that_contribute_most_are_kept_in_order() -> None:
    contribution = torch.tensor([0.3, 5.0, 0.1, 2.0, 2.0, 0.2])
    assert kept_channels(contribution, 2).tolist() == [1, 3]
    assert kept_channels(contribution, 3).tolist() == [1, 3, 4]
    assert kept_channels(contribution, 6).tolist() == [0, 1, 2, 3, 4, 5]


def test_a_pruned_ffn_computes_the_parents_with_the_other_channels_silent(cached: dict[str, tuple[Parent, ActivationCache]]) -> None:
    parent, cache = cached["llama"]
    layer = layer_of(parent)
    state = initialise_piece(parent, 1, "ffn", FFN("swiglu", 32), cache, "paper")
    assert state["mlp.gate_proj.weight"].shape == (32, 64) and state["mlp.down_proj.weight"].shape == (64, 32)
    weights = {name: tensor.double() for name, tensor in parent.layer_state(1, "ffn").items()}
    x = torch.randn(50, 64, dtype=torch.float64)
    hidden = torch.nn.functional.silu(x @ weights["mlp.gate_proj.weight"].T) * (x @ weights["mlp.up_proj.weight"].T)
    silent = torch.argsort(cache.channel_contribution(1))[: 128 - 32]
    hidden[:, silent] = 0
    expected = hidden @ weights["mlp.down_proj.weight"].T
    torch.testing.assert_close(layer.build(FFN("swiglu", 32), state)(x.float()).double(), expected, atol=1e-5, rtol=1e-4)
    assert torch.equal(state["post_attention_layernorm.weight"], parent.layer_state(1, "ffn")["post_attention_layernorm.weight"])


def test_merged_kv_heads_are_the_mean_of_neighbours() -> None:
    weight = torch.randn(6 * 4, 10, dtype=torch.float64)
    merged = merge_kv_heads(weight, head_dim=4, kv_heads=2)
    for new_head in range(2):
        for row in range(4):
            mean = sum(weight[(3 * new_head + old) * 4 + row] for old in range(3)) / 3
            torch.testing.assert_close(merged[new_head * 4 + row], mean)
    bias = torch.arange(8.0)
    assert merge_kv_heads(bias, head_dim=2, kv_heads=2).tolist() == [1.0, 2.0, 5.0, 6.0]


@pytest.mark.parametrize("family", FAMILIES)
def test_merging_heads_that_are_equal_changes_nothing(family: str, cached: dict[str, tuple[Parent, ActivationCache]]) -> None:
    parent, cache = cached[family]
    layer = layer_of(parent)
    head_dim = layer.config.head_dim
    for name, tensor in layer.states_of["attention"].items():
        if name.startswith(("self_attn.k_proj", "self_attn.v_proj")):
            heads = tensor.clone().unflatten(0, (2, 2, head_dim))
            heads[:, 1] = heads[:, 0]
            layer.states_of["attention"][name] = heads.flatten(0, 2)
    attention = layer.build(layer.block.attention, layer.states_of["attention"])
    state = initialise_pieces(layer, [Attention("gqa", 2)], cache, "paper")[Attention("gqa", 2)]
    x = torch.randn(3, ROW_LENGTH, layer.config.hidden_size)
    merged = layer.build(Attention("gqa", 2), state)
    torch.testing.assert_close(layer.attend(merged, x), layer.attend(attention, x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_a_linear_attention_starts_as_attention_to_oneself(
    family: str, kv_heads: int, save_parent: Callable[..., Path], tmp_path: Path
) -> None:
    parent = read_parent(save_parent(family, num_key_value_heads=kv_heads))
    rows = torch.randint(0, 500, (6, ROW_LENGTH))
    collect_activations(parent, rows, rows[:1], tmp_path, dtype="float32")
    state = initialise_piece(parent, 1, "attention", Attention("linear"), ActivationCache(tmp_path), "paper")
    layer = ParentLayer(parent, 1, dtype=torch.float32, row_length=1)
    alone = torch.randn(9, 1, 64)  # a row of one token has nothing else to look at
    linear = layer.build(Attention("linear"), state)
    torch.testing.assert_close(layer.attend(linear, alone), layer.attend(layer.attention, alone), atol=1e-5, rtol=1e-4)


def test_a_linear_ffn_starts_as_up_then_down(cached: dict[str, tuple[Parent, ActivationCache]]) -> None:
    parent, cache = cached["llama"]
    state = initialise_piece(parent, 0, "ffn", FFN("linear"), cache, "paper")
    weights = parent.layer_state(0, "ffn")
    x = torch.randn(5, 64, dtype=torch.float64)
    expected = (x @ weights["mlp.up_proj.weight"].double().T) @ weights["mlp.down_proj.weight"].double().T
    torch.testing.assert_close(x @ state["mlp.linear_mlp.weight"].double().T, expected, atol=1e-6, rtol=1e-5)


def test_ridge_regression_equals_numpys_least_squares_on_the_augmented_system() -> None:
    rng = np.random.default_rng(0)
    x, y, prior = rng.normal(size=(200, 7)), rng.normal(size=(200, 3)), rng.normal(size=(3, 7))
    moments = Moments()
    for part in (slice(0, 50), slice(50, 200)):
        moments.add(torch.from_numpy(x[part]).reshape(5, -1, 7), torch.from_numpy(y[part]).reshape(5, -1, 3))
    assert moments.gram is not None and moments.cross is not None
    weight = ridge_weight(moments.gram, moments.cross, torch.from_numpy(prior), ridge=0.3).numpy()
    root = np.sqrt(0.3 * np.diag(x.T @ x).mean())
    expected = np.linalg.lstsq(np.vstack([x, root * np.eye(7)]), np.vstack([y, root * prior.T]), rcond=None)[0].T
    np.testing.assert_allclose(weight, expected, rtol=1e-5, atol=1e-6)


def test_a_dead_feature_keeps_its_prior() -> None:
    x = torch.randn(100, 4)
    x[:, 2] = 0
    moments, prior = Moments(), torch.randn(2, 4)
    moments.add(x, x @ torch.randn(4, 2))
    assert moments.gram is not None and moments.cross is not None
    weight = ridge_weight(moments.gram, moments.cross, prior)
    torch.testing.assert_close(weight[:, 2], prior[:, 2].double())
    silent = ridge_weight(torch.zeros(4, 4), torch.zeros(4, 2), prior)
    torch.testing.assert_close(silent, prior.double())


def _features_and_target(layer: ParentLayer, variant: Variant, state: dict[str, Tensor], hidden: Tensor) -> tuple[Tensor, Tensor]:
    """What the last matrix sees and what it should give, by running modules whose last matrix is the identity."""
    states = layer.run(hidden)
    module = layer.build(variant, state)
    last = module.get_submodule({"gqa": "o_proj", "swiglu": "down_proj"}[variant.kind])
    size = last.get_parameter("weight").shape[1]
    last.weight, last.bias = torch.nn.Parameter(torch.eye(size)), None
    if isinstance(variant, Attention):
        features, target, bias = layer.attend(module, states.attention_input), states.attention_output, state.get("self_attn.o_proj.bias")
    else:
        features, target, bias = layer.feed(module, states.ffn_input), states.ffn_output, state.get("mlp.down_proj.bias")
    target = target if bias is None else target - bias
    return features.detach().flatten(0, 1), target.flatten(0, 1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("variant", "last"), [(Attention("gqa", 2), "self_attn.o_proj"), (FFN("swiglu", 48), "mlp.down_proj")])
def test_the_closed_form_solves_the_last_matrix_for_the_parents_output(
    family: str, variant: Variant, last: str, cached: dict[str, tuple[Parent, ActivationCache]]
) -> None:
    parent, cache = cached[family]
    layer = layer_of(parent)
    paper = initialise_pieces(layer, [variant], cache, "paper")[variant]
    solved = initialise_pieces(layer, [variant], cache, "closed_form")[variant]
    fitted = cache.hidden("train", 1)[: 40 - held_out_rows(cache)]
    features, target = (t.double().numpy() for t in _features_and_target(layer, variant, paper, fitted))
    root = np.sqrt(1e-4 * (features**2).sum(0).mean())
    prior = paper[f"{last}.weight"].double().numpy()
    stacked = np.vstack([features, root * np.eye(len(prior.T))]), np.vstack([target, root * prior.T])
    expected = torch.from_numpy(np.linalg.lstsq(*stacked, rcond=None)[0].T)
    difference = solved[f"{last}.weight"].double() - expected
    assert difference.norm() < 1e-3 * expected.norm()  # X^T X is summed in float32 a batch
    assert (expected - torch.from_numpy(prior)).norm() > 0.1 * expected.norm()
    assert all(torch.equal(solved[name], paper[name]) for name in paper if name != f"{last}.weight")


@pytest.mark.parametrize("variant", [Attention("linear"), FFN("linear")])
def test_a_closed_form_linear_is_the_regression_of_the_parents_output_on_the_normed_input(
    variant: Variant, cached: dict[str, tuple[Parent, ActivationCache]]
) -> None:
    parent, cache = cached["llama"]
    layer = layer_of(parent)
    state = initialise_pieces(layer, [variant], cache, "closed_form")[variant]
    hf = parent.model.model.layers[1]
    seen: dict[str, Tensor] = {}
    place = hf.self_attn if isinstance(variant, Attention) else hf.mlp
    handle = place.register_forward_hook(lambda _, args, output: seen.update(x=args[0], y=output))
    with torch.no_grad():
        parent.model(cache.tokens("train")[:36])
    handle.remove()
    x, y = seen["x"].flatten(0, 1).double(), seen["y"].flatten(0, 1).double()
    weight = state["self_attn.linear_attn.weight" if isinstance(variant, Attention) else "mlp.linear_mlp.weight"].double()
    best = torch.linalg.lstsq(x, y).solution.T
    error, least = ((x @ w.T - y).square().sum() for w in (weight, best))
    assert least <= error <= 1.001 * least


@pytest.mark.parametrize("family", FAMILIES)
def test_the_closed_form_starts_below_the_papers_loss(family: str, cached: dict[str, tuple[Parent, ActivationCache]]) -> None:
    parent, cache = cached[family]
    layer = layer_of(parent)
    variants: list[Variant] = [Attention("gqa", 1), Attention("linear"), FFN("linear")]
    losses = {}
    for method in ("paper", "closed_form"):
        states = initialise_pieces(layer, variants, cache, method)  # type: ignore[arg-type]
        losses[method] = held_out_losses(layer, {v: layer.build(v, s) for v, s in states.items()}, cache)
    for variant in variants:
        assert losses["closed_form"][variant].branch < losses["paper"][variant].branch


def test_a_variant_out_of_place_and_a_cache_too_small_are_refused(
    cached: dict[str, tuple[Parent, ActivationCache]], tmp_path: Path
) -> None:
    parent, cache = cached["llama"]
    with pytest.raises(ValueError, match="can't stand in the ffn place"):
        initialise_piece(parent, 0, "ffn", Attention("linear"), cache, "paper")
    assert initialise_piece(parent, 0, "ffn", FFN("noop"), cache, "paper") == {}
    collect_activations(parent, torch.zeros(1, 8, dtype=torch.long), torch.zeros(1, 8, dtype=torch.long), tmp_path)
    with pytest.raises(ValueError, match=r"1 train row.*raise tokens\.activations"):
        initialise_piece(parent, 0, "ffn", FFN("linear"), ActivationCache(tmp_path), "closed_form")
