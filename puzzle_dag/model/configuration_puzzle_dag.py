"""The configuration of a heterogeneous model, on Hugging Face's own per-layer schema.

`per_layer_config` (layer index -> overrides of `num_key_value_heads`, `intermediate_size`, `skip`,
`replace_with_linear`) is the only stored truth about layers. This file is copied into every checkpoint, beside
the modeling file, so it imports nothing but transformers.
"""

from typing import Any

from transformers import LlamaConfig


class PuzzleDagConfig(LlamaConfig):
    """A Llama configuration plus what Mistral, Qwen2 and Qwen3 add, and which places of a layer became linear.

    `replace_with_linear` lists the places of a layer ("attention", "mlp") that are one linear map; the global
    default is none. `skip` (transformers' own key) lists the places that are left out.
    """

    model_type = "puzzle_dag"

    family: str = "llama"
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    sliding_layers: list[int] | None = None
    replace_with_linear: list[str] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Resolve per-layer overrides; reading a global default stays allowed, as vLLM does it."""
        if self.replace_with_linear is None:
            self.replace_with_linear = []
        if self.sliding_layers is None:
            self.sliding_layers = []
        self.allow_global_per_layer_attribute_access = True
        super().__post_init__(**kwargs)
