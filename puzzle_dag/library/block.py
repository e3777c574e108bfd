"""One layer of the parent taken apart: what enters and leaves its two places, and any variant as a module of its own.

Norms stay the parent's in every variant: their scale folds into the matrices that follow, so training them adds
nothing, and the normed input of a place is computed once for all of its variants.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding

from puzzle_dag.architecture import FFN, Attention
from puzzle_dag.model.configuration_puzzle_dag import PuzzleDagConfig
from puzzle_dag.model.modeling_puzzle_dag import GroupedQueryAttention, LinearAttention, LinearFFN, SwiGLU
from puzzle_dag.pieces import Place

if TYPE_CHECKING:
    from puzzle_dag.model.parent import Parent

Variant = Attention | FFN
NORMS: dict[Place, str] = {"attention": "input_layernorm.weight", "ffn": "post_attention_layernorm.weight"}
_PREFIXES: dict[Place, str] = {"attention": "self_attn.", "ffn": "mlp."}


def place_of(variant: Variant) -> Place:
    """Return the place that a variant can stand in."""
    return "attention" if isinstance(variant, Attention) else "ffn"


def subblock_state(state: Mapping[str, Tensor], place: Place) -> dict[str, Tensor]:
    """Return a piece's tensors without the norm's, by the names that they have in the subblock's module."""
    prefix = _PREFIXES[place]
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def piece_state(module_state: Mapping[str, Tensor], place: Place, norm: Tensor) -> dict[str, Tensor]:
    """Return a subblock's tensors and its norm's by layer-relative name, as a piece has them."""
    return {NORMS[place]: norm} | {_PREFIXES[place] + name: tensor for name, tensor in module_state.items()}


def build_subblock(config: PuzzleDagConfig, layer: int, variant: Variant, state: Mapping[str, Tensor], dtype: torch.dtype) -> nn.Module:
    """Build a variant's module (no norm) with copies of the tensors of `state` (layer-relative names) in `dtype`."""
    module: nn.Module
    with torch.device("meta"):
        if variant.kind == "gqa":
            module = GroupedQueryAttention(config, variant.kv_heads, layer)
        elif variant.kind == "swiglu":
            module = SwiGLU(config, variant.intermediate_size)
        else:
            assert variant.kind == "linear", "a no-op has no module"
            module = LinearAttention(config) if isinstance(variant, Attention) else LinearFFN(config)
    tensors = {name: tensor.detach().to(dtype, copy=True) for name, tensor in subblock_state(state, place_of(variant)).items()}
    module.load_state_dict(tensors, assign=True)
    return module


@dataclass(slots=True)
class BlockStates:
    """What the parent's layer computes for a batch of rows, each [rows, row_length, hidden]."""

    hidden: Tensor
    """What enters the layer."""
    attention_input: Tensor
    """Normed input of the attention."""
    attention_output: Tensor
    """Output of the attention, residual not included."""
    ffn_input: Tensor
    """Normed input of the FFN."""
    ffn_output: Tensor
    """Output of the FFN, residual not included."""

    def output_squares(self) -> Tensor:
        """Return the sum of squares of the block's output, residual included: what normalises the loss (float32)."""
        return (self.hidden.float() + self.attention_output.float() + self.ffn_output.float()).square().sum()

    def branch_squares(self) -> Tensor:
        """Return the sum of squares of what the block adds to its input (float32)."""
        return (self.attention_output.float() + self.ffn_output.float()).square().sum()


class ParentLayer:
    """One frozen layer of the parent, in the compute type, and what any attention in its place needs beside its input."""

    def __init__(self, parent: "Parent", layer: int, *, dtype: torch.dtype, row_length: int) -> None:
        """Copy the layer to the parent's device in `dtype`, for rows of `row_length` tokens."""
        self.config = parent.config
        self.layer = layer
        self.dtype = dtype
        self.device = next(parent.model.parameters()).device
        self.block = parent.block
        self.states_of: dict[Place, dict[str, Tensor]] = {
            "attention": parent.layer_state(layer, "attention"),
            "ffn": parent.layer_state(layer, "ffn"),
        }
        self.attention = self.build(self.block.attention, self.states_of["attention"]).requires_grad_(False)
        self.ffn = self.build(self.block.ffn, self.states_of["ffn"]).requires_grad_(False)
        self.norms: dict[Place, nn.Module] = {place: self._build_norm(place) for place in self.states_of}
        positions = torch.arange(row_length, device=self.device).unsqueeze(0)
        sample = torch.empty(1, row_length, self.config.hidden_size, dtype=dtype, device=self.device)
        self.position_embeddings = LlamaRotaryEmbedding(config=self.config).to(self.device)(sample, position_ids=positions)
        layer_types = self.config.layer_types
        assert layer_types is not None
        create_mask = create_sliding_window_causal_mask if layer_types[layer] == "sliding_attention" else create_causal_mask
        self.mask: Tensor | None = create_mask(
            config=self.config, inputs_embeds=sample, attention_mask=None, past_key_values=None, position_ids=positions
        )

    def _build_norm(self, place: Place) -> nn.Module:
        norm = LlamaRMSNorm(self.config.hidden_size, eps=self.config.rms_norm_eps)
        norm.load_state_dict({"weight": self.states_of[place][NORMS[place]]})
        built: nn.Module = norm.to(self.device, self.dtype).requires_grad_(False)
        return built

    def norm_weight(self, place: Place) -> Tensor:
        """Return the parent's norm scale of a place, in the parent's own type."""
        return self.states_of[place][NORMS[place]]

    def build(self, variant: Variant, state: Mapping[str, Tensor]) -> nn.Module:
        """Build a variant's module from layer-relative tensors, on this layer's device and in its compute type."""
        return build_subblock(self.config, self.layer, variant, state, self.dtype).to(self.device)

    def attend(self, attention: nn.Module, normed: Tensor) -> Tensor:
        """Run an attention variant on the normed input [rows, row_length, hidden]; same shape."""
        output: Tensor = attention(normed, self.position_embeddings, attention_mask=self.mask)
        return output

    def feed(self, ffn: nn.Module, normed: Tensor) -> Tensor:
        """Run an FFN variant on its normed input; same shape."""
        output: Tensor = ffn(normed)
        return output

    @torch.no_grad()
    def run(self, hidden: Tensor) -> BlockStates:
        """Run the parent's layer on what enters it, [rows, row_length, hidden]."""
        hidden = hidden.to(self.device, self.dtype)
        attention_input = self.norms["attention"](hidden)
        attention_output = self.attend(self.attention, attention_input)
        ffn_input = self.norms["ffn"](hidden + attention_output)
        return BlockStates(hidden, attention_input, attention_output, ffn_input, self.feed(self.ffn, ffn_input))

    @torch.no_grad()
    def error(self, states: BlockStates, variant: Variant, module: nn.Module | None) -> Tensor:
        """Return the sum of squares of o_parent - o_child for the parent's block with a variant in it (float32 scalar).

        Both blocks have the same input, so what they add to it is all that differs. `module` is None for a no-op.
        """
        if place_of(variant) == "ffn":
            ffn_output = torch.zeros_like(states.ffn_output) if module is None else self.feed(module, states.ffn_input)
            return (ffn_output.float() - states.ffn_output.float()).square().sum()
        attention_output = torch.zeros_like(states.hidden) if module is None else self.attend(module, states.attention_input)
        ffn_output = self.feed(self.ffn, self.norms["ffn"](states.hidden + attention_output))
        difference = (attention_output.float() - states.attention_output.float()) + (ffn_output.float() - states.ffn_output.float())
        return difference.square().sum()
