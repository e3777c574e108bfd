"""A parent in our model computes what transformers' own model computes, bit for bit."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import FAMILY_NAMES
from transformers import AutoModelForCausalLM

from puzzle_dag.architecture import Block
from puzzle_dag.config import ParentSource
from puzzle_dag.model.parent import ParentNotFoundError, load_parent, read_parent_shape


def _tokens(vocab_size: int) -> torch.Tensor:
    return torch.randint(0, vocab_size, (2, 24), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_parent_logits_are_transformers_bit_for_bit(family: str, dtype: torch.dtype, save_parent: Callable[..., Path]) -> None:
    folder = save_parent(family, dtype=dtype)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    parent = load_parent(ParentSource(path=str(folder)), folder)
    assert parent.model.dtype == reference.dtype == dtype
    tokens = _tokens(parent.config.vocab_size)
    with torch.no_grad():
        expected, got = reference(tokens).logits, parent.model(tokens).logits
    assert expected.float().std() > 0.1
    assert torch.equal(got, expected)
