"""One variant in training: its weights, its gradient of the block's loss, and its optimiser, all its own."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from puzzle_dag.library.block import BlockStates, ParentLayer, Variant, piece_state, place_of, subblock_state
from puzzle_dag.library.derivatives import use_training_attention
from puzzle_dag.model.modeling_puzzle_dag import GroupedQueryAttention

_WARMUP_SHARE = 0.1


def learning_rate_factor(step: int, num_steps: int) -> float:
    """Return the share of the peak learning rate at a step: linear warm-up over a tenth, then a cosine to zero."""
    warmup = max(1, round(_WARMUP_SHARE * num_steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup + 1) / (num_steps - warmup + 1)))


class Student:
    """A variant's module in the compute type, float32 master weights, and an AdamW for these alone.

    The norm stays the parent's: its scale folds into the matrices behind it.
    """

    def __init__(self, layer: ParentLayer, variant: Variant, state: dict[str, Tensor], learning_rate: float) -> None:
        """Start at `state`, float32 tensors by layer-relative name; `learning_rate` is the peak."""
        self.layer = layer
        self.variant = variant
        self.place = place_of(variant)
        self.module = layer.build(variant, state)
        if isinstance(self.module, GroupedQueryAttention):
            use_training_attention(self.module)
        self.parameters = dict(self.module.named_parameters())
        start = subblock_state(state, self.place)
        self.masters = {name: start[name].detach().to(p.device, torch.float32, copy=True) for name, p in self.parameters.items()}
        self.peak = learning_rate
        self.optimizer = torch.optim.AdamW(self.masters.values(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
        self.losses: list[Tensor] = []
        self.seconds = 0.0

    def _outputs(self, states: BlockStates) -> tuple[list[Tensor], Tensor]:
        """Return what depends on the variant's weights, and the sum of these less that of the parent's."""
        if self.place == "ffn":
            output = self.layer.feed(self.module, states.ffn_input)
            return [output], output.detach() - states.ffn_output
        attention_output = self.layer.attend(self.module, states.attention_input)
        ffn_output = self.layer.feed(self.layer.ffn, self.layer.norms["ffn"](states.hidden + attention_output))
        difference = (attention_output.detach() - states.attention_output) + (ffn_output.detach() - states.ffn_output)
        return [attention_output, ffn_output], difference

    def accumulate(self, batch: Sequence[BlockStates], total: Tensor) -> None:
        """Compute the gradient of sum (o_parent - o_child)^2 / total over the chunks of a batch, and note the loss."""
        parameters = list(self.parameters.values())
        sums = {name: torch.zeros_like(master) for name, master in self.masters.items()}
        error = torch.zeros((), device=self.layer.device)
        for states in batch:
            outputs, difference = self._outputs(states)
            # Both terms have the difference as their gradient (times 2 / total); no graph of the loss is needed.
            gradients = torch.autograd.grad(outputs, parameters, [difference] * len(outputs))
            for accumulated, gradient in zip(sums.values(), gradients, strict=True):
                accumulated.add_(gradient)
            error += torch.linalg.vector_norm(difference, dtype=torch.float32).square()
        for name, master in self.masters.items():
            master.grad = sums[name].mul_(2 / total)
        self.losses.append(error / total)

    def gradients(self) -> dict[str, Tensor]:
        """Return what was accumulated, float32, by the module's own names."""
        gradients = {name: master.grad for name, master in self.masters.items() if master.grad is not None}
        assert gradients.keys() == self.masters.keys(), "accumulate first"
        return gradients

    def update(self, learning_rate_factor: float) -> None:
        """Take an AdamW step with what was accumulated."""
        self.optimizer.param_groups[0]["lr"] = self.peak * learning_rate_factor
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            for name, master in self.masters.items():
                self.parameters[name].copy_(master)

    def state(self) -> dict[str, Tensor]:
        """Return the tensors by layer-relative name, float32, on the CPU; the norm's is the parent's."""
        masters = {name: master.cpu() for name, master in self.masters.items()}
        return piece_state(masters, self.place, self.layer.norm_weight(self.place).cpu())
