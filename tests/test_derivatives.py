"""Hand-written derivatives against autograd through plain PyTorch in float64."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from puzzle_dag.library.derivatives import CausalAttention, training_attention


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.015)])
@pytest.mark.parametrize("length", [1, 7, 128, 300])
def test_causal_attention_equals_autograd_through_its_definition(length: int, dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(length)
    query, key, value = (torch.randn(2, length, 3, 32, dtype=dtype).transpose(1, 2).requires_grad_() for _ in range(3))
    gradient = torch.randn(2, length, 3, 32, dtype=dtype).transpose(1, 2)
    output = CausalAttention.apply(query, key, value, 0.2)
    output.backward(gradient)
    exact = [t.detach().double().requires_grad_() for t in (query, key, value)]
    scores = 0.2 * exact[0] @ exact[1].mT
    above = torch.ones(length, length, dtype=torch.bool).triu(1)
    expected = scores.masked_fill(above, float("-inf")).softmax(-1) @ exact[2]
    expected.backward(gradient.double())
    assert relative_error(output, expected) < tolerance
    for ours, theirs in zip((query, key, value), exact, strict=True):
        assert ours.grad is not None and theirs.grad is not None
        if length > 1 or ours is value:  # one token attends to itself whatever query and key are
            assert relative_error(ours.grad, theirs.grad) < tolerance
        else:
            assert ours.grad.abs().max() < 0.05


@pytest.mark.parametrize("masked", [False, True])
def test_training_attention_groups_heads_as_pytorch_does(masked: bool) -> None:
    query, key, value = torch.randn(2, 8, 20, 16), torch.randn(2, 2, 20, 16), torch.randn(2, 2, 20, 16)
    mask = torch.ones(20, 20, dtype=torch.bool).tril().triu(-4)[None, None] if masked else None
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = 4, True
    output, _ = training_attention(module, query, key, value, mask, scaling=0.3, dropout=0.0)
    repeated = key.repeat_interleave(4, dim=1), value.repeat_interleave(4, dim=1)
    expected = functional.scaled_dot_product_attention(query, *repeated, attn_mask=mask, is_causal=not masked, scale=0.3)
    torch.testing.assert_close(output, expected.transpose(1, 2))
