"""The losses of global knowledge distillation, with gradients made on the way, in few passes over memory.

On a CPU a child of this size spends more time moving activations than multiplying them, so both losses compute
their gradient in the forward pass, and the KL does so in slices that stay in the cache.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

_SLICE_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 26}


class _DistillationKL(torch.autograd.Function):
    """Mean KL(softmax(parent) || softmax(child)); its gradient is softmax(child) - softmax(parent), over the positions."""

    @staticmethod
    def forward(ctx: Any, child_logits: Tensor, parent_logits: Tensor) -> Tensor:
        vocab = child_logits.shape[-1]
        child, parent = child_logits.reshape(-1, vocab), parent_logits.reshape(-1, vocab)
        num_positions = len(child)
        gradient, total = torch.empty_like(child), torch.zeros((), device=child.device)
        size = max(1, _SLICE_ELEMENTS[child.device.type] // vocab)
        for start in range(0, num_positions, size):
            part = slice(start, start + size)
            logp = functional.log_softmax(parent[part].float(), -1)
            logq = functional.log_softmax(child[part].float(), -1)
            p = logp.exp()
            total += torch.dot(p.flatten(), logp.sub_(logq).flatten())
            gradient[part] = logq.exp_().sub_(p).div_(num_positions)
        ctx.save_for_backward(gradient.view_as(child_logits))
        return total / num_positions

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (difference,) = ctx.saved_tensors
        return difference * gradients[0].to(difference.dtype), None


class _CosineDistance(torch.autograd.Function):
    """Mean of 1 - cos(child, parent) over positions; the gradient is (cos / |c|^2) c - p / (|c| |p|), negated."""

    @staticmethod
    def forward(ctx: Any, child: Tensor, parent: Tensor) -> Tensor:
        child_square = torch.linalg.vecdot(child, child).clamp_min(1e-12)
        parent_square = torch.linalg.vecdot(parent, parent).clamp_min(1e-12)
        inverse = (child_square * parent_square).rsqrt()
        cosine = torch.linalg.vecdot(child, parent) * inverse
        along, across = cosine / child_square / cosine.numel(), -inverse / cosine.numel()
        ctx.save_for_backward(child, parent, along.unsqueeze(-1), across.unsqueeze(-1))
        distance: Tensor = 1 - cosine.mean()
        return distance

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        child, parent, along, across = ctx.saved_tensors
        return (child * (along * gradients[0])).addcmul_(parent, across * gradients[0]), None


def distillation_kl(child_logits: Tensor, parent_logits: Tensor) -> Tensor:
    """Return the mean KL(parent || child) in nats a position, differentiable in the child's logits only.

    Args:
        child_logits: [..., vocab], any float type; softmaxes are in float32.
        parent_logits: the same shape; no gradient.
    """
    kl: Tensor = _DistillationKL.apply(child_logits, parent_logits)  # type: ignore[no-untyped-call]
    return kl


def cosine_loss(child_states: tuple[Tensor, ...], parent_states: tuple[Tensor, ...]) -> Tensor:
    """Return the sum over layers of the mean over positions of 1 - cos(child, parent) (Puzzle, section 5).

    Args:
        child_states: for each layer its output, [..., hidden]; differentiable.
        parent_states: the same layers of the parent; no gradient.
    """
    total = torch.zeros((), device=child_states[0].device)
    for child, parent in zip(child_states, parent_states, strict=True):
        # float32: a bfloat16 cosine near 1 has no digits left to learn from
        total = total + _CosineDistance.apply(child.float(), parent.float())  # type: ignore[no-untyped-call]
    return total
