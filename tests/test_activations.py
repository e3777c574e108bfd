"""Cached activations against plain transformers, importances against float64 brute force, and passes cut short."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM

from puzzle_dag.config import ParentSource
from puzzle_dag.library.activations import ActivationCache, ActivationCacheError, collect_activations
from puzzle_dag.model.parent import Parent, load_parent


def rows_of(num_rows: int, row_length: int = 16, seed: int = 0) -> Tensor:
    return torch.randint(0, 500, (num_rows, row_length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def parent(micro_parent_folder: Path) -> Parent:
    return load_parent(ParentSource(path=micro_parent_folder.name), micro_parent_folder.parent)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_boundaries_are_the_states_between_the_familys_layers(family: str, family_parent_folder: dict[str, Path], tmp_path: Path) -> None:
    folder = family_parent_folder[family]
    train, score = rows_of(5), rows_of(3, seed=1)
    parent = load_parent(ParentSource(path=folder.name), folder.parent)
    collect_activations(parent, train, score, tmp_path, dtype="float32", rows_per_shard=2)
    model = AutoModelForCausalLM.from_pretrained(folder)
    entered: list[Tensor] = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    model.model.norm.register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    cache = ActivationCache(tmp_path)
    for split, rows in (("train", train), ("score", score)):
        entered.clear()
        with torch.no_grad():
            model(rows, use_cache=False)
        assert torch.equal(cache.tokens(split), rows)
        assert len(entered) == cache.num_layers + 1 == 3
        for boundary, expected in enumerate(entered):
            torch.testing.assert_close(cache.hidden(split, boundary), expected, atol=1e-5, rtol=1e-5)


def test_importances_equal_brute_force_in_float64(parent: Parent, micro_parent_folder: Path, tmp_path: Path) -> None:
    train = rows_of(7)
    collect_activations(parent, train, rows_of(2, seed=1), tmp_path, dtype="float32", rows_per_shard=3)
    model = AutoModelForCausalLM.from_pretrained(micro_parent_folder, dtype=torch.float64)
    inputs: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if name.endswith(("down_proj", "o_proj")):
            module.register_forward_pre_hook(lambda _, args, name=name: inputs.__setitem__(name, args[0]))
    with torch.no_grad():
        model(train, use_cache=False)
    cache = ActivationCache(tmp_path)
    for layer in range(2):
        prefix = f"model.layers.{layer}"
        x, down = inputs[f"{prefix}.mlp.down_proj"], model.model.layers[layer].mlp.down_proj.weight.detach()
        expected = torch.tensor([x[..., i].abs().mean() * down[:, i].norm() for i in range(128)])
        torch.testing.assert_close(cache.channel_contribution(layer), expected, rtol=1e-4, atol=0, check_dtype=False)
        x, out = inputs[f"{prefix}.self_attn.o_proj"], model.model.layers[layer].self_attn.o_proj.weight
        shares = [x[..., 32 * h : 32 * h + 32] @ out[:, 32 * h : 32 * h + 32].T for h in range(4)]
        expected = torch.stack([share.norm(dim=-1).mean() for share in shares]).detach()
        torch.testing.assert_close(cache.head_importance(layer), expected, rtol=1e-4, atol=0, check_dtype=False)


def test_importances_come_from_the_train_rows_only(parent: Parent, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 2)):
        collect_activations(parent, rows_of(3), rows_of(3, seed=seed), tmp_path / name)
    a, b = ActivationCache(tmp_path / "a"), ActivationCache(tmp_path / "b")
    assert torch.equal(a.channel_contribution(1), b.channel_contribution(1))
    assert a.digest != b.digest


def test_a_pass_that_was_cut_short_goes_on_where_it_stopped(parent: Parent, tmp_path: Path) -> None:
    train, score = rows_of(6), rows_of(2, seed=1)
    collect_activations(parent, train, score, tmp_path / "whole", rows_per_shard=2)

    class Killed(Exception):
        pass

    def stop_after_two(done: int, total: int, unit: str) -> None:
        if done >= 4 * 16:
            raise Killed

    with pytest.raises(Killed):
        collect_activations(parent, train, score, tmp_path / "cut", rows_per_shard=2, progress=stop_after_two)
    with pytest.raises(ActivationCacheError, match="no finished activations"):
        ActivationCache(tmp_path / "cut")
    first = tmp_path / "cut" / "train-00000.safetensors"
    before = first.stat().st_mtime_ns
    (tmp_path / "cut" / ".train-00002.safetensors.half").write_bytes(b"what a kill leaves")
    collect_activations(parent, train, score, tmp_path / "cut", rows_per_shard=2)
    assert first.stat().st_mtime_ns == before
    assert not list((tmp_path / "cut").glob(".train*"))
    whole, cut = ActivationCache(tmp_path / "whole"), ActivationCache(tmp_path / "cut")
    assert cut.digest == whole.digest
    assert torch.equal(cut.channel_contribution(0), whole.channel_contribution(0))


def test_another_pass_into_the_same_folder_replaces_what_was_there(parent: Parent, tmp_path: Path) -> None:
    collect_activations(parent, rows_of(6), rows_of(2, seed=1), tmp_path, rows_per_shard=2)
    collect_activations(parent, rows_of(3, seed=5), rows_of(1, seed=6), tmp_path, rows_per_shard=2)
    cache = ActivationCache(tmp_path)
    assert torch.equal(cache.tokens("train"), rows_of(3, seed=5))
    assert torch.equal(cache.tokens("score"), rows_of(1, seed=6))
    assert len(list(tmp_path.glob("train-*.safetensors"))) == 2


def test_rows_are_read_in_part_and_in_any_order(parent: Parent, tmp_path: Path) -> None:
    collect_activations(parent, rows_of(7), rows_of(1, seed=1), tmp_path, rows_per_shard=3)
    cache = ActivationCache(tmp_path)
    whole = cache.hidden("train", 1)
    assert whole.shape == (7, 16, 64)
    assert whole.dtype == cache.dtype == torch.bfloat16
    assert cache.num_rows("train") == 7
    assert torch.equal(cache.hidden("train", 1, start=2, stop=5), whole[2:5])
    assert torch.equal(cache.hidden("train", 1, start=6), whole[6:])
    order = torch.tensor([6, 0, 3, 0])
    assert torch.equal(cache.gather("train", 1, order), whole[order])


def test_one_layer_can_be_read_without_the_others(parent: Parent, tmp_path: Path) -> None:
    collect_activations(parent, rows_of(2), rows_of(1, seed=1), tmp_path)
    with safe_open(tmp_path / "train-00000.safetensors", framework="pt") as shard:
        assert {"hidden.000", "hidden.001", "hidden.002", "tokens"} <= set(shard.keys())


def test_float32_and_bfloat16_agree_to_bfloat16(parent: Parent, tmp_path: Path) -> None:
    for dtype in ("float32", "bfloat16"):
        collect_activations(parent, rows_of(3), rows_of(1, seed=1), tmp_path / dtype, dtype=dtype)
    exact, rounded = (ActivationCache(tmp_path / dtype).hidden("train", 2).float() for dtype in ("float32", "bfloat16"))
    assert 0 < (rounded - exact).norm() / exact.norm() < 0.02


def test_a_bfloat16_parent_is_run_in_float32_where_asked(save_parent: Callable[..., Path], tmp_path: Path) -> None:
    folder = save_parent("llama", dtype=torch.bfloat16)
    parent = load_parent(ParentSource(path=folder.name), folder.parent)
    collect_activations(parent, rows_of(2), rows_of(1, seed=1), tmp_path, dtype="float32")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        expected = model(rows_of(2), output_hidden_states=True).hidden_states[1]
    torch.testing.assert_close(ActivationCache(tmp_path).hidden("train", 1), expected, atol=1e-5, rtol=1e-5)
    assert next(parent.model.parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("train", "dtype", "message"),
    [
        (torch.zeros(0, 16, dtype=torch.long), "bfloat16", r"train_rows has shape \(0, 16\)"),
        (torch.zeros(16, dtype=torch.long), "bfloat16", r"train_rows has shape \(16,\)"),
        (torch.zeros(2, 16, dtype=torch.long), "float16", "float16.*use one of float32, bfloat16"),
    ],
)
def test_bad_input_is_refused_before_the_parent_runs(parent: Parent, tmp_path: Path, train: Tensor, dtype: str, message: str) -> None:
    with pytest.raises(ActivationCacheError, match=message):
        collect_activations(parent, train, rows_of(1), tmp_path / "new", dtype=dtype)
    assert not (tmp_path / "new").exists()


def test_what_is_not_there_is_named(parent: Parent, tmp_path: Path) -> None:
    with pytest.raises(ActivationCacheError, match="collect them first"):
        ActivationCache(tmp_path)
    collect_activations(parent, rows_of(2), rows_of(1), tmp_path)
    cache = ActivationCache(tmp_path)
    with pytest.raises(ActivationCacheError, match=r"boundary 3 isn't there.*0 to 2"):
        cache.hidden("train", 3)
    with pytest.raises(ActivationCacheError, match=r"rows 2 to 4.*it has 2"):
        cache.hidden("train", 0, start=2, stop=4)
