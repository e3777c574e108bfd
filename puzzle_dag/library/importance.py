"""How much each FFN channel and each attention head of the parent matters, added up while the parent runs."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor, nn


def is_sum(name: str) -> bool:
    """Say whether a shard's tensor is one of `ImportanceSums`."""
    return name.startswith(("channel_sum.", "head_sum."))


class ImportanceSums:
    """Sums over tokens of |X_i| at each FFN's down_proj and of the norm of each head's share of o_proj's output."""

    def __init__(self, backbone: nn.Module) -> None:
        """Watch a `PuzzleDagModel` with parent blocks only; nothing is added up before `watching`."""
        self.layers = list(backbone.get_submodule("layers").children())
        self.sums: dict[str, Tensor] = {}

    def _add(self, name: str, values: Tensor) -> None:
        self.sums[name] = self.sums[name] + values if name in self.sums else values

    def _on_ffn(self, layer: int, hidden: Tensor) -> None:
        """Add one batch's input of down_proj, [..., intermediate_size]."""
        self._add(f"channel_sum.{layer}", hidden.flatten(0, -2).abs().float().sum(0).double().cpu())

    def _on_attention(self, layer: int, outputs: Tensor, weight: Tensor, head_dim: int) -> None:
        """Add one batch's input of o_proj, [..., heads * head_dim]."""
        # ||W_h x_h||^2 = x_h^T (W_h^T W_h) x_h: one small product a head instead of its whole output.
        heads = outputs.flatten(0, -2).float().unflatten(-1, (-1, head_dim)).transpose(0, 1)
        weights = weight.float().unflatten(1, (-1, head_dim)).transpose(0, 1).transpose(1, 2)
        squares = (heads @ (weights @ weights.transpose(1, 2)) * heads).sum(-1)
        self._add(f"head_sum.{layer}", squares.clamp_min(0).sqrt().sum(1).double().cpu())

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Add up what passes through the model within the context."""
        handles = []
        for index, layer in enumerate(self.layers):
            attention = layer.get_submodule("self_attn")

            def on_ffn(module: nn.Module, args: tuple[Tensor], index: int = index) -> None:
                self._on_ffn(index, args[0])

            def on_attention(module: nn.Module, args: tuple[Tensor], index: int = index, parent: nn.Module = attention) -> None:
                head_dim = parent.head_dim
                assert isinstance(head_dim, int)
                self._on_attention(index, args[0], module.get_parameter("weight"), head_dim)

            handles.append(layer.get_submodule("mlp.down_proj").register_forward_pre_hook(on_ffn))
            handles.append(attention.get_submodule("o_proj").register_forward_pre_hook(on_attention))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def importances(sums: Mapping[str, Tensor], down_weights: Sequence[Tensor], num_tokens: int) -> dict[str, Tensor]:
    """Turn sums over `num_tokens` tokens into importances, float64, by name and layer.

    `channel_contribution.L` [intermediate_size]: mean over tokens of |X_i| times ||W_down[:, i]||_2 (Puzzle, section
    3). `head_importance.L` [heads]: mean over tokens of the L2 norm of the head's share of o_proj's output (ours;
    Minitron takes the norm of the head's own output, which leaves out how much o_proj makes of it).
    """
    tensors = {}
    for layer, weight in enumerate(down_weights):
        tensors[f"channel_contribution.{layer}"] = sums[f"channel_sum.{layer}"] / num_tokens * weight.double().cpu().norm(dim=0)
        tensors[f"head_importance.{layer}"] = sums[f"head_sum.{layer}"] / num_tokens
    return tensors
