"""The configuration of a heterogeneous model, on Hugging Face's own per-layer schema.

`per_layer_config` (layer index -> overrides of `num_key_value_heads`, `intermediate_size`, `skip`,
`replace_with_linear`) is the only stored truth about layers. This file is copied into every checkpoint, beside
the modeling file, so it imports nothing but transformers and what transformers requires.
"""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig

PLACES = ("attention", "mlp")


@strict
class PuzzleDagConfig(LlamaConfig):  # type: ignore[misc]
    """A Llama configuration plus what Mistral, Qwen2 and Qwen3 add, and which places of a layer became linear.

    `replace_with_linear` lists the places of a layer ("attention", "mlp") that are one linear map; the global
    default is none. `skip` (transformers' own key) lists the places that are left out. `layer_types` says of each
    layer "full_attention" or "sliding_attention"; transformers' cache and vLLM read it, too. The global
    `num_key_value_heads` and `intermediate_size` are the parent's.
    """

    model_type = "puzzle_dag"

    family: str = "llama"
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    layer_types: list[str] | None = None
    replace_with_linear: list[str] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Resolve per-layer overrides; reading a global default stays allowed, as vLLM does it."""
        if self.replace_with_linear is None:
            self.replace_with_linear = []
        if self.layer_types is None:
            kind = "full_attention" if self.sliding_window is None else "sliding_attention"
            self.layer_types = [kind] * self.num_hidden_layers
        self.allow_global_per_layer_attribute_access = True
        super().__post_init__(**kwargs)
        self._check_layers()

    def validate_architecture(self) -> None:
        """Ask for nothing more: head_dim is explicit, so the hidden size need not be a multiple of the heads, as in Llama."""

    def _check_layers(self) -> None:
        """Raise ValueError, naming layer, field, value and fix, where a layer can't be built."""
        if self.head_dim <= 0 or self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}; rotary embedding needs an even one")
        for index in range(self.num_hidden_layers):
            layer = self.per_layer_config[index]
            skip, linear = getattr(layer, "skip", None) or [], layer.replace_with_linear or []
            unknown = [place for place in (*skip, *linear) if place not in PLACES]
            if unknown:
                fields = "`skip` or `replace_with_linear`"
                raise ValueError(f"layer {index}: place {unknown[0]!r} in {fields} is unknown; use {' or '.join(PLACES)}")
            both = sorted(set(skip) & set(linear))
            if both:
                raise ValueError(f"layer {index}: {both[0]} is in both `skip` and `replace_with_linear`; keep one")
            if layer.num_key_value_heads <= 0 or self.num_attention_heads % layer.num_key_value_heads:
                kv_heads, heads = layer.num_key_value_heads, self.num_attention_heads
                raise ValueError(f"layer {index}: num_key_value_heads is {kv_heads}; use a divisor of num_attention_heads, {heads}")
            if layer.intermediate_size <= 0:
                raise ValueError(f"layer {index}: intermediate_size is {layer.intermediate_size}; for no FFN write skip: [mlp]")

    def layer_window(self, layer: int) -> int | None:
        """Return the tokens that a layer's attention sees, or None where it sees all before."""
        assert self.layer_types is not None
        return self.sliding_window if self.layer_types[layer] == "sliding_attention" else None
