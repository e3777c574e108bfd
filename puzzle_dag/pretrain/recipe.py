"""The recipe of a bundled parent: shape, data and optimiser, read from conf/pretrain/NAME.yaml."""

from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, Field
from transformers import LlamaConfig


class Shape(BaseModel):
    """Shape of the Llama that is trained."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    vocab_size: int = Field(gt=256)
    """Tokens of the BPE vocabulary."""
    hidden_size: int = Field(gt=0)
    """Width of the residual stream."""
    num_layers: int = Field(gt=0)
    """Transformer layers."""
    intermediate_size: int = Field(gt=0)
    """FFN width."""
    num_heads: int = Field(gt=0)
    """Attention heads; as many KV heads, so that every reduction of KV heads is a real one."""
    head_dim: int = Field(gt=0)
    """Width of a head; vLLM's CPU attention wants 32, 48, 64 or 128."""
    max_length: int = Field(gt=0)
    """Longest sequence that the model is served with."""

    def to_llama(self, eos_token_id: int) -> LlamaConfig:
        """Return transformers' configuration of this shape, with tied embeddings."""
        return LlamaConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_layers,
            intermediate_size=self.intermediate_size,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_heads,
            head_dim=self.head_dim,
            max_position_embeddings=self.max_length,
            tie_word_embeddings=True,
            rms_norm_eps=1e-5,
            bos_token_id=eos_token_id,
            eos_token_id=eos_token_id,
        )


class Recipe(BaseModel):
    """Everything that determines the trained checkpoint, save the machine's rounding."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[a-z][a-z0-9-]*$")
    """Name of the parent and of its folder under parents/."""
    shape: Shape
    """Shape of the model."""
    seed: int = Field(ge=0)
    """Seed of the initialisation and of the data."""
    world_seed: int = Field(ge=0)
    """Seed of the invented world; grading uses the same."""
    skill_share: float = Field(ge=0, le=1)
    """Share of the tokens that comes from the skills; the rest is the standard library."""
    num_tokens: int = Field(gt=0)
    """Tokens trained on."""
    row_length: int = Field(gt=8)
    """Tokens a row."""
    rows_per_step: int = Field(gt=0)
    """Rows an optimiser step."""
    muon_lr: float = Field(gt=0)
    """Learning rate of Muon (matrices inside the layers)."""
    adam_lr: float = Field(gt=0)
    """Learning rate of AdamW (embeddings and norms)."""
    warmup_share: float = Field(ge=0, lt=1)
    """Share of the steps in which the learning rate grows."""
    decay_share: float = Field(gt=0, le=1)
    """Share of the steps, the last ones, in which it falls linearly to zero."""

    @property
    def num_steps(self) -> int:
        """Optimiser steps of the whole run."""
        return self.num_tokens // (self.row_length * self.rows_per_step)


def read_recipe(path: Path) -> Recipe:
    """Read and validate a recipe file.

    Raises:
        pydantic.ValidationError: a field is missing, unknown or out of range.
    """
    return Recipe.model_validate(yaml.safe_load(path.read_text()))
