"""Where a variant starts: the Puzzle paper's initialisations, or least squares on the cached activations.

The paper (section 3): an FFN keeps the channels that contribute most; merged KV heads are the mean of their
projections; a linear attention is W_V W_O, a linear FFN W_up W_down. The closed form is ours: a linear is the ridge
regression of the parent's output at that place on its normed input, and the last matrix of a pruned FFN or a merged
attention is solved again for the parent's output; both are drawn to the paper's values where the data say nothing.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from puzzle_dag.architecture import FFN, Attention
from puzzle_dag.library.activations import ActivationCache
from puzzle_dag.library.block import ParentLayer, Variant
from puzzle_dag.library.least_squares import Moments, ridge_weight
from puzzle_dag.pieces import Place

if TYPE_CHECKING:
    from puzzle_dag.model.parent import Parent

Method = Literal["paper", "closed_form"]
_ROWS_PER_BATCH = 8
State = dict[str, Tensor]


def held_out_rows(cache: ActivationCache) -> int:
    """Return how many of the last train rows nothing is fitted to: a tenth, one at least.

    Raises:
        ValueError: there is only one row.
    """
    num_rows = cache.num_rows("train")
    if num_rows < 2:
        raise ValueError(f"the activations have {num_rows} train row(s); one is held out, so raise tokens.activations to 2 rows or more")
    return max(1, num_rows // 10)


def kept_channels(contribution: Tensor, width: int) -> Tensor:
    """Return the indices, increasing, of the `width` channels that contribute most (ties: the lower index)."""
    order = torch.sort(contribution, descending=True, stable=True).indices
    return order[:width].sort().values


def merge_kv_heads(tensor: Tensor, head_dim: int, kv_heads: int) -> Tensor:
    """Return the mean over each group of KV heads of a k or v projection's weight or bias, [kv_heads * head_dim, ...].

    Neighbours are merged: query head q reads KV head q // (heads / kv_heads), before and after.
    """
    merged: Tensor = tensor.unflatten(0, (kv_heads, -1, head_dim)).mean(1).flatten(0, 1)
    return merged


def prune_ffn(state: Mapping[str, Tensor], channels: Tensor) -> State:
    """Return a SwiGLU's tensors with only the given channels."""
    pruned = dict(state)
    for name in state:
        if name.startswith(("mlp.gate_proj", "mlp.up_proj")):
            pruned[name] = state[name][channels]
        elif name == "mlp.down_proj.weight":
            pruned[name] = state[name][:, channels]
    return pruned


def paper_state(layer: ParentLayer, variant: Variant, contribution: Tensor) -> State:
    """Return a variant's tensors, float32, by layer-relative name, as the paper starts them.

    Args:
        layer: the parent's layer.
        variant: a gqa, SwiGLU or linear variant.
        contribution: what each of the parent's FFN channels contributes, [intermediate_size].
    """
    place: Place = "attention" if isinstance(variant, Attention) else "ffn"
    state = {name: tensor.detach().float().cpu() for name, tensor in layer.states_of[place].items()}
    if isinstance(variant, FFN):
        if variant.kind == "swiglu":
            return prune_ffn(state, kept_channels(contribution.cpu(), variant.intermediate_size))
        linear = state["mlp.down_proj.weight"] @ state["mlp.up_proj.weight"]
        return {"post_attention_layernorm.weight": state["post_attention_layernorm.weight"], "mlp.linear_mlp.weight": linear}
    head_dim, num_heads = layer.config.head_dim, layer.config.num_attention_heads
    if variant.kind == "gqa":
        merged = ("self_attn.k_proj.", "self_attn.v_proj.")
        return {n: merge_kv_heads(t, head_dim, variant.kv_heads) if n.startswith(merged) else t for n, t in state.items()}
    # What attention computes when every token looks at itself only, biases left out.
    value = state["self_attn.v_proj.weight"].unflatten(0, (-1, head_dim))
    value = value.repeat_interleave(num_heads // len(value), dim=0).flatten(0, 1)
    return {
        "input_layernorm.weight": state["input_layernorm.weight"],
        "self_attn.linear_attn.weight": state["self_attn.o_proj.weight"] @ value,
    }


class _LastInput:
    """Remembers the input of a module's last matrix during its forward pass."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.value = torch.empty(0)
        self.module = module
        module.register_forward_pre_hook(self._keep)

    def _keep(self, module: torch.nn.Module, args: tuple[Tensor]) -> None:
        self.value = args[0]


def _last_matrix(variant: Variant) -> str:
    names = {"gqa": "self_attn.o_proj", "swiglu": "mlp.down_proj"}
    linear = "self_attn.linear_attn" if isinstance(variant, Attention) else "mlp.linear_mlp"
    return names.get(variant.kind, linear)


@torch.no_grad()
def _solve_last_matrices(layer: ParentLayer, states: dict[Variant, State], cache: ActivationCache) -> None:
    """Replace the last matrix of each variant by the least-squares one, in one pass over the rows that are not held out."""
    modules = {variant: layer.build(variant, state) for variant, state in states.items()}
    last_inputs = {v: _LastInput(m.get_submodule(_last_matrix(v).split(".", 1)[1])) for v, m in modules.items()}
    moments = {variant: Moments() for variant in states}
    num_rows = cache.num_rows("train") - held_out_rows(cache)
    for start in range(0, num_rows, _ROWS_PER_BATCH):
        batch = layer.run(cache.hidden("train", layer.layer, start=start, stop=min(start + _ROWS_PER_BATCH, num_rows)))
        for variant, module in modules.items():
            if isinstance(variant, Attention):
                layer.attend(module, batch.attention_input)
                target = batch.attention_output
            else:
                layer.feed(module, batch.ffn_input)
                target = batch.ffn_output
            bias = states[variant].get(_last_matrix(variant) + ".bias")
            moments[variant].add(last_inputs[variant].value, target if bias is None else target - bias.to(target))
    for variant, state in states.items():
        name, sums = _last_matrix(variant) + ".weight", moments[variant]
        assert sums.gram is not None and sums.cross is not None
        state[name] = ridge_weight(sums.gram, sums.cross, state[name].to(sums.gram.device)).float().cpu()


def initialise_pieces(layer: ParentLayer, variants: Sequence[Variant], cache: ActivationCache, method: Method) -> dict[Variant, State]:
    """Return where each variant (no no-ops) starts: float32 tensors by layer-relative name; one pass for all."""
    contribution = cache.channel_contribution(layer.layer)
    states = {variant: paper_state(layer, variant, contribution) for variant in variants}
    if method == "closed_form" and states:
        _solve_last_matrices(layer, states, cache)
    return states


def initialise_piece(parent: "Parent", layer: int, place: Place, variant: Variant, cache: ActivationCache, method: Method) -> State:
    """Return where one variant starts: float32 tensors by layer-relative name; none for a no-op.

    Raises:
        ValueError: the variant does not belong to the place.
    """
    if isinstance(variant, Attention) != (place == "attention"):
        raise ValueError(f"variant {variant.name!r} can't stand in the {place} place; give one of its own")
    if variant.kind == "noop":
        return {}
    frozen = ParentLayer(parent, layer, dtype=cache.dtype, row_length=cache.tokens("train").shape[1])
    return initialise_pieces(frozen, [variant], cache, method)[variant]
