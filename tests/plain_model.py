"""A plain float64 forward pass of any child, written from the papers' formulas with loops over heads: slow and independent."""

from typing import Any

import torch
from torch import Tensor


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def _rotate(x: Tensor, theta: float) -> Tensor:
    """Rotate [length, head_dim] pairs (i, i + head_dim / 2) by position * theta^(-2i / head_dim)."""
    length, dim = x.shape
    angles = torch.arange(length, dtype=x.dtype)[:, None] * theta ** (-torch.arange(0, dim, 2, dtype=x.dtype) / dim)
    first, second = x[:, : dim // 2], x[:, dim // 2 :]
    return torch.cat([first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], -1)


def _attention(x: Tensor, state: dict[str, Tensor], config: dict[str, Any], kv_heads: int, window: int | None) -> Tensor:
    heads, dim, length = config["num_attention_heads"], config["head_dim"], x.shape[0]
    query, key, value = (x @ state[f"{n}_proj.weight"].T + state.get(f"{n}_proj.bias", 0) for n in "qkv")
    position = torch.arange(length)
    visible = position[:, None] >= position
    if window is not None:
        visible &= position[:, None] - position < window
    outputs = []
    for head in range(heads):
        group = head * kv_heads // heads
        q, k, v = query[:, head * dim : (head + 1) * dim], *(t[:, group * dim : (group + 1) * dim] for t in (key, value))
        if config["qk_norm"]:
            q, k = _norm(q, state["q_norm.weight"], config["rms_norm_eps"]), _norm(k, state["k_norm.weight"], config["rms_norm_eps"])
        theta = config["rope_parameters"]["rope_theta"]
        scores = _rotate(q, theta) @ _rotate(k, theta).T / dim**0.5
        outputs.append(scores.masked_fill(~visible, float("-inf")).softmax(-1) @ v)
    return torch.cat(outputs, -1) @ state["o_proj.weight"].T + state.get("o_proj.bias", 0)


def plain_logits(tokens: Tensor, tensors: dict[str, Tensor], config: dict[str, Any]) -> Tensor:
    """Return float64 logits [length, vocab] of `tokens` [length], from a checkpoint's tensors and its config.json, default rope."""
    tensors = {name: tensor.double() for name, tensor in tensors.items()}
    eps, per_layer = config["rms_norm_eps"], {int(k): v for k, v in config.get("per_layer_config", {}).items()}
    x = tensors["model.embed_tokens.weight"][tokens]
    for index in range(config["num_hidden_layers"]):
        layer = {**config, **per_layer.get(index, {})}
        prefix = f"model.layers.{index}."
        state = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        if "attention" not in layer.get("skip", []):
            normed = _norm(x, state["input_layernorm.weight"], eps)
            if "attention" in layer["replace_with_linear"]:
                x = x + normed @ state["self_attn.linear_attn.weight"].T
            else:
                own = {n.removeprefix("self_attn."): t for n, t in state.items()}
                window = config["sliding_window"] if config["layer_types"][index] == "sliding_attention" else None
                x = x + _attention(normed, own, config, layer["num_key_value_heads"], window)
        if "mlp" not in layer.get("skip", []):
            normed = _norm(x, state["post_attention_layernorm.weight"], eps)
            if "mlp" in layer["replace_with_linear"]:
                x = x + normed @ state["mlp.linear_mlp.weight"].T
            else:
                gate, up = (normed @ state[f"mlp.{n}_proj.weight"].T + state.get(f"mlp.{n}_proj.bias", 0) for n in ("gate", "up"))
                x = x + (gate * gate.sigmoid() * up) @ state["mlp.down_proj.weight"].T + state.get("mlp.down_proj.bias", 0)
    head = tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"])
    return _norm(x, tensors["model.norm.weight"], eps) @ head.T
