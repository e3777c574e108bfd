"""From a hidden state to the final ones: single layers, replaced ones among them, run on stacked rows."""

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from puzzle_dag.model.modeling_puzzle_dag import PuzzleDagForCausalLM

if TYPE_CHECKING:
    from puzzle_dag.model.parent import Parent

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# The states that the parent's own block leads to and the cached ones differ by rounding, a percent at most.
_LARGEST_DRIFT = 0.1
# On a CPU larger stacks leave the caches, and their tensors cost a page fault each 4 KiB: 64 rows take 1.5 times as long as 16.
_ROWS_PER_BATCH = {"cpu": 16, "cuda": 64}


class ScoreError(ValueError):
    """Scores that can't be taken: activations of another parent, or a block whose output is not finite."""


def check_computing(parent: "Parent", compute_dtype: str, rows_per_batch: int | None) -> tuple[torch.dtype, int]:
    """Return the dtype and the rows a batch, by default as many as suit the parent's device. Raises ScoreError for unknown ones."""
    if compute_dtype not in _DTYPES:
        raise ScoreError(f"compute_dtype {compute_dtype!r} not understood; use one of {', '.join(_DTYPES)}")
    if rows_per_batch is None:
        rows_per_batch = _ROWS_PER_BATCH[parent.model.device.type]
    if rows_per_batch <= 0:
        raise ScoreError(f"rows_per_batch is {rows_per_batch}; it must be positive")
    return _DTYPES[compute_dtype], rows_per_batch


def cast_parent(parent: "Parent", dtype: torch.dtype) -> PuzzleDagForCausalLM:
    """Return the parent's model in a dtype; a copy where its weights have another."""
    same = next(parent.model.parameters()).dtype == dtype
    return parent.model if same else copy.deepcopy(parent.model).to(dtype)


class LayerRunner:
    """Runs (half) layers of the parent's shape on stacked states."""

    def __init__(self, model: PuzzleDagForCausalLM, row_length: int, replaced: Mapping[int, nn.Module] | None = None) -> None:
        """Run layers of `model`, some of them replaced by others, on rows of `row_length` tokens; the model stays as it is."""
        self.model = model
        self.layers = [(replaced or {}).get(index, layer) for index, layer in enumerate(model.model.layers)]
        weight = model.lm_head.weight
        self.probe = torch.zeros(1, row_length, model.config.hidden_size, device=weight.device, dtype=weight.dtype)
        self.position_ids = torch.arange(row_length, device=weight.device).unsqueeze(0)
        self.position_embeddings = model.model.rotary_emb(self.probe, position_ids=self.position_ids)
        makers = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}
        # A mask of one row broadcasts over the stack; None where the kernel is causal by itself.
        self.masks = {
            kind: makers[kind](
                config=model.config, inputs_embeds=self.probe, attention_mask=None, past_key_values=None, position_ids=self.position_ids
            )
            for kind in sorted(set(model.config.layer_types))
        }

    def layer(self, module: nn.Module, index: int, states: Tensor) -> Tensor:
        """Run one (half) layer as layer `index` of the parent."""
        out: Tensor = module(states, self.position_embeddings, attention_mask=self.masks[self.model.config.layer_types[index]])
        return out

    def after(self, index: int, states: Tensor) -> Tensor:
        """Run the layers after `index`, all of them after -1."""
        for later in range(index + 1, len(self.layers)):
            states = self.layer(self.layers[later], later, states)
        return states


def check_drift(states: Tensor, cached: Tensor, layer: int) -> None:
    """Check that the parent's own final states are the cached ones, rounding aside. Raises ScoreError where they are another parent's."""
    drift = float((states.float() - cached.to(states).float()).norm() / cached.float().norm())
    if not drift < _LARGEST_DRIFT:
        raise ScoreError(
            f"layer {layer}: from its cached hidden states the parent's own blocks lead to final states {drift:.0%} away from "
            "the cached ones; the activations belong to another parent: collect them again"
        )
