"""FFN Fusion's exact half (arXiv 2503.18908): FFNs that stand side by side as one wide FFN.

Every FFN of a run reads the run's input X: X + sum_j FFN_j(norm_j(X)). Each layer's norm scale goes into its own gate
and up weights, which leaves the plain RMSNorm to all of them, and so one FFN with the gate and up rows stacked and the
down columns concatenated computes the sum.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

FFN_NORM = "post_attention_layernorm.weight"
"""Layer-relative name of the norm before the FFN."""
_STACKED = ("mlp.gate_proj", "mlp.up_proj")
_DOWN = "mlp.down_proj"


def stack_ffns(states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the tensors of the one FFN that computes the sum of several on the same input, norm included.

    Args:
        states: each FFN's tensors by layer-relative name: the norm [hidden], gate and up [width, hidden], down
            [hidden, width], biases where the family has them. Widths may differ.

    Returns:
        The same names; the norm is all ones. Scales are folded in float32 or wider and rounded once.
    """
    fused = {FFN_NORM: torch.ones_like(states[0][FFN_NORM])}
    for name in _STACKED:
        folded = []
        for state in states:
            weight = state[f"{name}.weight"]
            exact = torch.promote_types(weight.dtype, torch.float32)
            folded.append((weight.to(exact) * state[FFN_NORM].to(exact)).to(weight.dtype))
        fused[f"{name}.weight"] = torch.cat(folded, 0)
        if f"{name}.bias" in states[0]:
            fused[f"{name}.bias"] = torch.cat([state[f"{name}.bias"] for state in states])
    fused[f"{_DOWN}.weight"] = torch.cat([state[f"{_DOWN}.weight"] for state in states], 1)
    if f"{_DOWN}.bias" in states[0]:
        fused[f"{_DOWN}.bias"] = torch.stack([state[f"{_DOWN}.bias"] for state in states]).sum(0)
    return fused
