"""Block-wise distillation against autograd through whole child models, and each variant's independence of the others."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from puzzle_dag.architecture import FFN, Attention, Block
from puzzle_dag.config import LibrarySettings, ParentSource
from puzzle_dag.library.activations import ActivationCache, collect_activations
from puzzle_dag.library.block import ParentLayer, Variant, place_of
from puzzle_dag.library.distill import distill_pieces, held_out_losses, row_order
from puzzle_dag.library.initialise import initialise_pieces
from puzzle_dag.library.student import Student, learning_rate_factor
from puzzle_dag.model.checkpoint import child_config
from puzzle_dag.model.modeling_puzzle_dag import PuzzleDagForCausalLM
from puzzle_dag.model.parent import Parent, load_parent

FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]
ATTENTIONS: list[Variant] = [Attention("gqa", 2), Attention("gqa", 1), Attention("linear")]
FFNS: list[Variant] = [FFN("swiglu", 64), FFN("swiglu", 32), FFN("linear")]
VARIANTS = ATTENTIONS + FFNS
NOOPS: list[Variant] = [Attention("noop"), FFN("noop")]
NUM_ROWS, ROW_LENGTH = 200, 16


@pytest.fixture(scope="module")
def cached(family_parent_folder: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Parent, ActivationCache]]:
    found = {}
    for family in FAMILIES:
        folder, cache_folder = family_parent_folder[family], tmp_path_factory.mktemp(family)
        parent = load_parent(ParentSource(path=folder.name), folder.parent)
        rows = torch.randint(0, 500, (NUM_ROWS, ROW_LENGTH), generator=torch.Generator().manual_seed(0))
        collect_activations(parent, rows, rows[:1], cache_folder, dtype="float32", rows_per_shard=16)
        found[family] = parent, ActivationCache(cache_folder)
    return found


def layer_of(parent: Parent, dtype: torch.dtype = torch.float32) -> ParentLayer:
    return ParentLayer(parent, 1, dtype=dtype, row_length=ROW_LENGTH)


def child_with(parent: Parent, variant: Variant, state: dict[str, Tensor]) -> PuzzleDagForCausalLM:
    """The whole child whose layer 1 has the variant, in float32."""
    own = parent.block
    block = Block(variant, own.ffn) if isinstance(variant, Attention) else Block(own.attention, variant)
    child = PuzzleDagForCausalLM(child_config(parent.config, (own, block)))
    place_prefixes = ("input_layernorm", "self_attn") if isinstance(variant, Attention) else ("post_attention_layernorm", "mlp")
    replaced = tuple(f"model.layers.1.{prefix}" for prefix in place_prefixes)
    tensors = {name: tensor for name, tensor in parent.model.state_dict().items() if not name.startswith(replaced)}
    child.load_state_dict(tensors | {f"model.layers.1.{name}": tensor for name, tensor in state.items()}, strict=True)
    return child


def block_output(model: PuzzleDagForCausalLM, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Input and output of layer 1."""
    states = model.model(tokens, output_hidden_states=True, use_cache=False).hidden_states
    assert states is not None
    return states[1], states[2]


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_are_those_of_whole_children_on_the_held_out_rows(family: str, cached: dict[str, tuple[Parent, ActivationCache]]) -> None:
    parent, cache = cached[family]
    layer = layer_of(parent)
    states = initialise_pieces(layer, VARIANTS, cache, "paper") | {variant: {} for variant in NOOPS}
    losses = held_out_losses(layer, {v: layer.build(v, s) if s else None for v, s in states.items()}, cache)
    tokens = cache.tokens("train")[-NUM_ROWS // 10 :]
    with torch.no_grad():
        entering, expected = block_output(parent.model, tokens)
        for variant, state in states.items():
            _, output = block_output(child_with(parent, variant, state), tokens)
            error = (output - expected).double().square().sum()
            assert losses[variant].block == pytest.approx((error / expected.double().square().sum()).item(), rel=1e-4)
            assert losses[variant].branch == pytest.approx((error / (expected - entering).double().square().sum()).item(), rel=1e-4)
            assert losses[variant].block > 1e-4


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: f"{place_of(v)}-{v.name}")
def test_gradients_equal_autograd_through_the_whole_child(
    family: str, variant: Variant, cached: dict[str, tuple[Parent, ActivationCache]]
) -> None:
    parent, cache = cached[family]
    layer = layer_of(parent)
    state = initialise_pieces(layer, [variant], cache, "paper")[variant]
    student = Student(layer, variant, state, 1e-3)
    batch = [layer.run(rows) for rows in cache.hidden("train", 1, stop=6).split(4)]
    total = torch.stack([states.output_squares() for states in batch]).sum()
    student.accumulate(batch, total)
    child, tokens = child_with(parent, variant, state), cache.tokens("train")[:6]
    with torch.no_grad():
        _, expected = block_output(parent.model, tokens)
    loss = (block_output(child, tokens)[1] - expected).square().mean() / expected.square().mean()
    loss.backward()
    assert student.losses[0].item() == pytest.approx(loss.item(), rel=1e-4)
    place = child.model.layers[1].get_submodule("self_attn" if isinstance(variant, Attention) else "mlp")
    for name, gradient in student.gradients().items():
        reference = place.get_parameter(name).grad
        assert reference is not None
        torch.testing.assert_close(gradient, reference, rtol=1e-3, atol=1e-4 * reference.abs().max().item() + 1e-8)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: f"{place_of(v)}-{v.name}")
def test_bfloat16_gradients_point_where_float32_ones_do(
    family: str, variant: Variant, cached: dict[str, tuple[Parent, ActivationCache]]
) -> None:
    parent, cache = cached[family]
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        layer = layer_of(parent, dtype)
        student = Student(layer, variant, initialise_pieces(layer_of(parent), [variant], cache, "paper")[variant], 1e-3)
        batch = [layer.run(cache.hidden("train", 1, stop=6))]
        student.accumulate(batch, batch[0].output_squares())
        gradients.append(torch.cat([g.float().flatten() for g in student.gradients().values()]))
    assert torch.cosine_similarity(gradients[0], gradients[1], dim=0) > 0.995
    assert gradients[1].norm().item() == pytest.approx(gradients[0].norm().item(), rel=0.05)


def settings_of(**changes: object) -> LibrarySettings:
    return LibrarySettings.model_validate({"num_tokens": 12 * 6 * ROW_LENGTH, "rows_per_step": 6, "learning_rate": 2e-3, **changes})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_becomes_of_a_variant_does_not_depend_on_the_others(
    dtype: torch.dtype, cached: dict[str, tuple[Parent, ActivationCache]]
) -> None:
    parent, cache = cached["llama"]
    layer = layer_of(parent, dtype)
    initial = initialise_pieces(layer, VARIANTS, cache, "paper")
    together = distill_pieces(layer, initial, cache, settings_of(), store_dtype=torch.float32)
    for variant in (VARIANTS[1], VARIANTS[4]):
        alone = distill_pieces(layer, {variant: initial[variant]}, cache, settings_of(), store_dtype=torch.float32)[variant]
        assert alone.initial == together[variant].initial and alone.trained == together[variant].trained
        assert alone.curve == together[variant].curve
        assert all(torch.equal(alone.state[name], tensor) for name, tensor in together[variant].state.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_training_lowers_the_held_out_loss_of_every_variant(family: str, cached: dict[str, tuple[Parent, ActivationCache]]) -> None:
    parent, cache = cached[family]
    layer = layer_of(parent)
    initial = initialise_pieces(layer, VARIANTS, cache, "paper")
    results = distill_pieces(layer, initial, cache, settings_of(num_tokens=40 * 6 * ROW_LENGTH), store_dtype=torch.float32)
    for variant, result in results.items():
        assert result.kept == "trained"
        assert result.trained.block < result.initial.block and result.trained.branch < result.initial.branch
        norm = "input_layernorm.weight" if isinstance(variant, Attention) else "post_attention_layernorm.weight"
        assert torch.equal(result.state[norm], parent.layer_state(1, place_of(variant))[norm])
        judged = held_out_losses(layer, {variant: layer.build(variant, result.state)}, cache)[variant]
        assert judged == result.trained
        assert result.state.keys() == initial[variant].keys()
        losses = [loss for _, loss in result.curve]
        assert sum(losses[-10:]) < sum(losses[:10])


def test_training_that_does_harm_is_undone(cached: dict[str, tuple[Parent, ActivationCache]]) -> None:
    parent, cache = cached["llama"]
    layer, variant = layer_of(parent), FFN("swiglu", 64)
    initial = initialise_pieces(layer, [variant], cache, "paper")
    result = distill_pieces(layer, initial, cache, settings_of(learning_rate=3.0), store_dtype=torch.float32)[variant]
    assert result.trained.block > result.initial.block
    assert result.kept == "initialised"
    assert all(torch.equal(result.state[name], tensor) for name, tensor in initial[variant].items())


def test_without_tokens_variants_stay_as_initialised_and_noops_are_judged(cached: dict[str, tuple[Parent, ActivationCache]]) -> None:
    parent, cache = cached["llama"]
    layer = layer_of(parent)
    initial = initialise_pieces(layer, VARIANTS[:1], cache, "paper") | {variant: {} for variant in NOOPS}
    results = distill_pieces(layer, initial, cache, settings_of(num_tokens=0), store_dtype=torch.bfloat16)
    for result in results.values():
        assert (result.kept, result.num_tokens, result.curve) == ("initialised", 0, [])
        assert result.trained == result.initial
    assert results[NOOPS[0]].state == {}
    for name, tensor in results[VARIANTS[0]].state.items():
        assert torch.equal(tensor, initial[VARIANTS[0]][name].bfloat16())


def test_more_tokens_than_there_are_go_round_in_epochs(cached: dict[str, tuple[Parent, ActivationCache]]) -> None:
    parent, cache = cached["llama"]
    told: list[tuple[int, int, str]] = []
    initial = initialise_pieces(layer_of(parent), [FFN("linear")], cache, "paper")
    asked = 3 * NUM_ROWS * ROW_LENGTH + 1
    result = distill_pieces(
        layer_of(parent), initial, cache, settings_of(num_tokens=asked), store_dtype=torch.float32, progress=lambda *a: told.append(a)
    )[FFN("linear")]
    assert asked <= result.num_tokens < asked + 6 * ROW_LENGTH
    assert told[-1] == (result.num_tokens, result.num_tokens, "tokens")
    assert result.curve[-1][0] == result.num_tokens and len(result.curve) <= 50


def test_rows_come_in_shuffled_epochs_that_only_the_seed_decides() -> None:
    order = row_order(10, 25, seed=3)
    assert len(order) == 25
    assert sorted(order[:10].tolist()) == sorted(order[10:20].tolist()) == list(range(10))
    assert order[:10].tolist() != order[10:20].tolist()
    assert torch.equal(order, row_order(10, 25, seed=3))
    assert not torch.equal(order, row_order(10, 25, seed=4))
    assert torch.equal(order[:12], row_order(10, 12, seed=3))


@pytest.mark.parametrize("num_steps", [1, 2, 10, 1000])
def test_the_learning_rate_warms_up_and_falls_to_almost_nothing(num_steps: int) -> None:
    factors = [learning_rate_factor(step, num_steps) for step in range(num_steps)]
    assert all(0 < factor <= 1 for factor in factors)
    peak = factors.index(max(factors))
    assert factors[: peak + 1] == sorted(factors[: peak + 1])
    assert factors[peak:] == sorted(factors[peak:], reverse=True)
    if num_steps == 1000:
        assert factors[0] == 0.01 and peak == 99
        assert factors[-1] < 1e-4
