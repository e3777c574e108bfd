"""The configuration of Deci / Nemotron-NAS checkpoints, as engines read it: `block_configs`, one block a layer.

transformers has no such model type, so a checkpoint brings this file (`auto_map`), and our vLLM plugin registers it.
It imports nothing but transformers and what transformers requires.
"""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig


class AttributeDict(dict[str, Any]):
    """A JSON object whose keys are attributes, too; keys that are null are left out, since engines ask with `hasattr`."""

    def __init__(self, fields: dict[str, Any]) -> None:
        kept = {name: value for name, value in fields.items() if value is not None}
        super().__init__({name: AttributeDict(value) if isinstance(value, dict) else value for name, value in kept.items()})

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def __reduce__(self) -> tuple[type["AttributeDict"], tuple[dict[str, Any]]]:
        """Copy and pickle as the plain JSON object, which has everything."""
        return AttributeDict, (dict(self),)


@strict
class DeciLMConfig(LlamaConfig):  # type: ignore[misc]
    """A Llama configuration with `block_configs`: of each layer's attention and FFN, whether it is there and how large."""

    model_type = "nemotron-nas"

    block_configs: list[dict[str, Any]] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Give every block its attributes."""
        self.block_configs = [AttributeDict(block) for block in self.block_configs or []]
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Ask for nothing more: head_dim is explicit, so the hidden size need not be a multiple of the heads."""
