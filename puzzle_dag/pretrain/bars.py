"""The two bars that a bundled parent must clear before it is worth compressing.

It must know things (every graded skill well above chance), and its FFNs must be needed (keeping only the
channels with the largest contribution, untrained, must cost real KL divergence).
"""

import random
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from puzzle_dag.corpus.skills import Item, Skill


@torch.no_grad()
def grade_items(model: nn.Module, tokenizer: Any, items: list[Item], *, items_per_batch: int = 64) -> float:
    """Return the share of `items` whose right choice has the largest log-likelihood (lm-eval's `acc`)."""
    num_right = 0
    for start in range(0, len(items), items_per_batch):
        batch = items[start : start + items_per_batch]
        prompts = [tokenizer(i.context, add_special_tokens=False)["input_ids"] for i in batch]
        rows, spans = [], []
        for item, prompt in zip(batch, prompts, strict=True):
            for choice in item.choices:
                ids = prompt + tokenizer(choice, add_special_tokens=False)["input_ids"]
                rows.append(ids)
                spans.append((len(prompt), len(ids)))
        width = max(map(len, rows))
        padded = torch.tensor([r + [0] * (width - len(r)) for r in rows])
        logp = functional.log_softmax(model(padded).logits.float(), -1)
        scores = [
            float(logp[i, b - 1 : e - 1].gather(-1, padded[i, b:e, None]).sum()) for i, (b, e) in enumerate(spans)
        ]
        num_choices = len(batch[0].choices)
        for k, item in enumerate(batch):
            s = scores[k * num_choices : (k + 1) * num_choices]
            num_right += s.index(max(s)) == item.answer
    return num_right / len(items)


def grade_skills(model: nn.Module, tokenizer: Any, skills: tuple[Skill, ...], num_items: int, seed: int = 999) -> dict[str, float]:
    """Return the accuracy of each skill on `num_items` fresh questions."""
    rng = random.Random(f"grade/{seed}")
    return {s.name: grade_items(model, tokenizer, [s.item(rng) for _ in range(num_items)]) for s in skills}


@torch.no_grad()
def ffn_pruning_kl(model: Any, rows: Tensor, keep_share: float, *, calibration_rows: int = 32) -> float:
    """Return the mean KL(parent || pruned) in nats a token when every FFN keeps only `keep_share` of its channels.

    The channels kept are those with the largest contribution, mean |X_i| * ||W_down[:, i]|| (Puzzle, section 3),
    estimated on the first `calibration_rows`; nothing is retrained. `rows` is int64 [rows, row_length].
    """
    layers = model.model.layers
    sums = [torch.zeros(layer.mlp.down_proj.in_features) for layer in layers]

    def accumulate(index: int) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            sums[index] += inputs[0].float().abs().flatten(0, -2).sum(0)

        return hook

    handles = [layer.mlp.down_proj.register_forward_pre_hook(accumulate(i)) for i, layer in enumerate(layers)]
    for batch in rows[:calibration_rows].split(8):
        model(batch)
    for handle in handles:
        handle.remove()
    masks = []
    for layer, total in zip(layers, sums, strict=True):
        contribution = total * layer.mlp.down_proj.weight.float().norm(dim=0)
        kept = contribution.topk(round(keep_share * len(total))).indices
        mask = torch.zeros_like(total, dtype=layer.mlp.down_proj.weight.dtype)
        mask[kept] = 1
        masks.append(mask)

    total_kl, num_tokens = 0.0, 0
    for batch in rows.split(8):
        logp = functional.log_softmax(model(batch).logits.float(), -1)
        handles = [
            layer.mlp.down_proj.register_forward_pre_hook(lambda _, inputs, mask=mask: (inputs[0] * mask,))
            for layer, mask in zip(layers, masks, strict=True)
        ]
        logq = functional.log_softmax(model(batch).logits.float(), -1)
        for handle in handles:
            handle.remove()
        total_kl += float((logp.exp() * (logp - logq)).sum())
        num_tokens += batch.numel()
    return total_kl / num_tokens
