"""The parent's training: resumable, and its bars measure what they say."""

import random
from pathlib import Path

import pytest
import torch
from torch.nn import functional
from transformers import LlamaForCausalLM

from puzzle_dag.corpus.skills import Item, build_skills
from puzzle_dag.corpus.tokenizer import train_tokenizer
from puzzle_dag.corpus.world import build_world
from puzzle_dag.pretrain import train
from puzzle_dag.pretrain.bars import ffn_pruning_kl, grade_items
from puzzle_dag.pretrain.recipe import Recipe, read_recipe

RECIPES = sorted((Path(__file__).parent.parent / "conf" / "pretrain").glob("*.yaml"))


@pytest.fixture(scope="module")
def tokenizer():
    skills = build_skills(build_world())
    rng = random.Random(0)
    return train_tokenizer([s.line(rng) for s in skills for _ in range(200)], 512)


@pytest.fixture
def recipe() -> Recipe:
    return Recipe(
        name="micro",
        shape={
            "vocab_size": 512,
            "hidden_size": 32,
            "num_layers": 2,
            "intermediate_size": 64,
            "num_heads": 2,
            "head_dim": 32,
            "max_length": 128,
        },
        seed=0,
        world_seed=7,
        skill_share=1.0,
        num_tokens=6 * 2 * 128,
        row_length=128,
        rows_per_step=2,
        muon_lr=0.01,
        adam_lr=0.01,
        warmup_share=0.1,
        decay_share=0.5,
    )


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_shipped_recipes_are_valid(path):
    assert read_recipe(path).name == path.stem


def test_an_interrupted_training_ends_where_an_uninterrupted_one_does(recipe, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "_STEPS_PER_CHECKPOINT", 2)
    monkeypatch.setattr(torch, "compile", lambda f: f)
    whole, curve = train.train_parent(recipe, tokenizer, tmp_path / "whole")

    rows = train._rows
    monkeypatch.setattr(train, "_rows", lambda r, t, first: (batch for _, batch in zip(range(4 - first), rows(r, t, first), strict=False)))
    train.train_parent(recipe, tokenizer, tmp_path / "parts")
    monkeypatch.setattr(train, "_rows", rows)
    resumed, resumed_curve = train.train_parent(recipe, tokenizer, tmp_path / "parts")

    assert [p["step"] for p in resumed_curve] == [p["step"] for p in curve] == [2, 4, 6]
    for (name, a), b in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=name)


def test_grading_agrees_with_one_choice_at_a_time(recipe, tokenizer):
    torch.manual_seed(0)
    model = LlamaForCausalLM(recipe.shape.to_llama(0)).eval()
    rng = random.Random(1)
    items: list[Item] = [s.item(rng) for s in build_skills(build_world()) for _ in range(4)]

    def score(item: Item, choice: str) -> float:
        prompt = tokenizer(item.context, add_special_tokens=False)["input_ids"]
        answer = tokenizer(choice, add_special_tokens=False)["input_ids"]
        logp = functional.log_softmax(model(torch.tensor([prompt + answer])).logits[0], -1)
        return sum(float(logp[len(prompt) + i - 1, t]) for i, t in enumerate(answer))

    with torch.no_grad():
        right = [max(range(4), key=lambda c, i=i: score(i, i.choices[c])) == i.answer for i in items]
    assert grade_items(model, tokenizer, items, items_per_batch=5) == pytest.approx(sum(right) / len(right))


def test_pruning_kl_is_zero_for_all_channels_and_matches_a_model_with_zeroed_weights(recipe):
    torch.manual_seed(0)
    model = LlamaForCausalLM(recipe.shape.to_llama(0)).eval()
    rows = torch.randint(0, 512, (4, 32))
    assert ffn_pruning_kl(model, rows, 1.0) == pytest.approx(0, abs=1e-6)

    with torch.no_grad():
        logp = functional.log_softmax(model(rows).logits, -1)
        kept = []
        for layer in model.model.layers:
            inputs: list[torch.Tensor] = []
            handle = layer.mlp.down_proj.register_forward_pre_hook(lambda _, i, s=inputs: s.append(i[0]))
            model(rows)
            handle.remove()
            contribution = inputs[0].abs().mean((0, 1)) * layer.mlp.down_proj.weight.norm(dim=0)
            kept.append(contribution.argsort(descending=True)[:16])
        for layer, channels in zip(model.model.layers, kept, strict=True):
            mask = torch.zeros(64)
            mask[channels] = 1
            layer.mlp.down_proj.weight.mul_(mask)
        pruned = functional.log_softmax(model(rows).logits, -1)
    torch.manual_seed(0)
    fresh = LlamaForCausalLM(recipe.shape.to_llama(0)).eval()
    expected = float((logp.exp() * (logp - pruned)).sum(-1).mean())
    assert ffn_pruning_kl(fresh, rows, 0.25) == pytest.approx(expected, rel=1e-3)
