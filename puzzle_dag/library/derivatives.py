"""Causal attention with derivatives written by hand, for training variants on CPUs.

It computes what PyTorch's attention computes. PyTorch's CPU kernel spends eight times as long in its backward as in
its forward pass; matrix products do with half of the time in all, a fifth off the training of an attention variant.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from puzzle_dag.model.modeling_puzzle_dag import GroupedQueryAttention

_ATTENTION_NAME = "puzzle_dag_training"
_QUERIES_PER_BLOCK = 128  # what lies above the diagonal is left out block by block


def _append(tensor: Tensor, column: Tensor) -> Tensor:
    """Append a float32 column to [n, length, d] as two columns of its type that add up to it almost exactly."""
    high = column.to(tensor.dtype)
    low = (column - high.float()).to(tensor.dtype)
    return torch.cat([tensor, high.unsqueeze(-1), low.unsqueeze(-1)], dim=-1)


class CausalAttention(torch.autograd.Function):
    """softmax(scale Q K^T, causal) V; every query head has its own key and value head."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Map three tensors [batch, heads, length, head_dim] to one of that shape."""
        output, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, True, scale=scale)
        ctx.save_for_backward(query, key, value, output, log_sum)
        ctx.scale = scale
        result: Tensor = output
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """Return the gradients of query, key and value.

        With P the attention and D = dO V^T: dV = P^T dO, dS = P * (D - rowsum(dO * O)), dQ = s dS K, dK = s dS^T Q. Both
        subtractions (of the log of the softmax's sum inside P, too) come out of the products, as two more columns.
        """
        query, key, value, output, log_sum = ctx.saved_tensors
        shape, length = query.shape, query.shape[2]
        dot = (gradient * output).sum(-1, dtype=torch.float32).flatten(0, 1)
        query, key, value, gradient = ((t.flatten(0, 1)) for t in (query * ctx.scale, key, value, gradient))
        ones = torch.ones(*key.shape[:2], 2, dtype=key.dtype, device=key.device)
        queries, gradients = _append(query, -log_sum.float().reshape(dot.shape)), _append(gradient, -dot)
        keys, values = torch.cat([key, ones], dim=-1).mT, torch.cat([value, ones], dim=-1).mT
        d_query = torch.empty_like(key)
        d_key, d_value = torch.zeros_like(key, dtype=torch.float32), torch.zeros_like(key, dtype=torch.float32)
        for start in range(0, length, _QUERIES_PER_BLOCK):
            stop = min(start + _QUERIES_PER_BLOCK, length)
            attention = torch.bmm(queries[:, start:stop], keys[:, :, :stop]).exp_().tril_(start)
            d_value[:, :stop] += torch.bmm(attention.mT, gradient[:, start:stop])
            d_scores = torch.bmm(gradients[:, start:stop], values[:, :, :stop]).mul_(attention)
            d_query[:, start:stop] = torch.bmm(d_scores, key[:, :stop])
            d_key[:, :stop] += torch.bmm(d_scores.mT, query[:, start:stop])
        return (d_query * ctx.scale).view(shape), d_key.to(key.dtype).view(shape), d_value.to(key.dtype).view(shape), None


def training_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *, scaling: float, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attend as transformers' attention functions do; PyTorch's own attention where there is a mask or no CPU.

    Args:
        module: the attention module.
        query: [batch, heads, length, head_dim].
        key: [batch, kv_heads, length, head_dim].
        value: as key.
        attention_mask: None for causal attention.
        scaling: factor of the scores.
        kwargs: what PyTorch's attention is called with otherwise.

    Returns:
        [batch, length, heads, head_dim] and None.
    """
    if attention_mask is not None or query.device.type != "cpu":
        output: Tensor = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)[0]
        return output, None
    num_groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(num_groups, dim=1), value.repeat_interleave(num_groups, dim=1)
    attended: Tensor = CausalAttention.apply(query, key, value, scaling)  # type: ignore[no-untyped-call]
    return attended.transpose(1, 2), None


def use_training_attention(module: GroupedQueryAttention) -> None:
    """Make an attention module attend by `training_attention` from now on."""
    ALL_ATTENTION_FUNCTIONS.register(_ATTENTION_NAME, training_attention)
    module.config = copy.copy(module.config)
    module.config._attn_implementation = _ATTENTION_NAME
