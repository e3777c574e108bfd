"""The losses of global knowledge distillation, with gradients that take as few passes over memory as there are."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


class _DistillationKL(torch.autograd.Function):
    """Mean KL(softmax(parent) || softmax(child)); the gradient, softmax(child) - softmax(parent), is made on the way."""

    @staticmethod
    def forward(ctx: Any, child_logits: Tensor, parent_logits: Tensor) -> Tensor:
        logp = functional.log_softmax(parent_logits.float(), -1)
        logq = functional.log_softmax(child_logits.float(), -1)
        p = logp.exp()
        num_positions = logp.numel() // logp.shape[-1]
        kl = (p * logp.sub_(logq)).sum() / num_positions
        ctx.save_for_backward(logq.exp_().sub_(p).div_(num_positions).to(child_logits.dtype))
        return kl

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (difference,) = ctx.saved_tensors
        return difference * gradients[0].to(difference.dtype), None


def distillation_kl(child_logits: Tensor, parent_logits: Tensor) -> Tensor:
    """Return the mean KL(parent || child) in nats a position, differentiable in the child's logits only.

    Args:
        child_logits: [..., vocab], any float type; softmaxes are in float32.
        parent_logits: the same shape; no gradient.
    """
    kl: Tensor = _DistillationKL.apply(child_logits, parent_logits)  # type: ignore[no-untyped-call]
    return kl


def cosine_loss(child_states: tuple[Tensor, ...], parent_states: tuple[Tensor, ...]) -> Tensor:
    """Return sum over layers of the mean over positions of 1 - cos(child, parent) (Puzzle, section 5).

    Args:
        child_states: for each layer its output, [..., hidden].
        parent_states: the same layers of the parent; no gradient.
    """
    total = torch.zeros((), device=child_states[0].device)
    for child, parent in zip(child_states, parent_states, strict=True):
        # float32: a bfloat16 cosine near 1 has no digits left to learn from
        total = total + (1 - functional.cosine_similarity(child.float(), parent.float(), dim=-1)).mean()
    return total
