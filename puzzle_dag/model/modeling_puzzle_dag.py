"""A causal language model whose layers differ: fewer KV heads, narrower FFNs, linear maps, or nothing at all.

With only parent blocks it computes the parent's logits bit for bit, because it is put together from the same
transformers building blocks in the same order. This file is copied into every checkpoint (`auto_map`), for
people who do not have puzzle_dag installed, so it imports nothing but torch and transformers.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from .configuration_puzzle_dag import PuzzleDagConfig

PositionEmbeddings = tuple[Tensor, Tensor]


class GroupedQueryAttention(nn.Module):
    """Attention with any number of KV heads that divides the query heads; qkv bias and qk-norm as the family has them."""

    def __init__(self, config: PuzzleDagConfig, num_kv_heads: int, layer_index: int = 0) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_index
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // num_kv_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = True
        self.sliding_window = config.layer_window(layer_index)
        q_size, kv_size = config.num_attention_heads * self.head_dim, num_kv_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=config.o_bias)
        if config.qk_norm:
            self.q_norm = LlamaRMSNorm(self.head_dim, eps=config.rms_norm_eps)
            self.k_norm = LlamaRMSNorm(self.head_dim, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: PositionEmbeddings,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Map [batch, length, hidden] to the same shape."""
        shape = hidden_states.shape[:-1]
        heads = (*shape, -1, self.head_dim)
        query = self.q_proj(hidden_states).view(heads)
        key = self.k_proj(hidden_states).view(heads)
        value = self.v_proj(hidden_states).view(heads).transpose(1, 2)
        if self.config.qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        cos, sin = position_embeddings
        query, key = apply_rotary_pos_emb(query.transpose(1, 2), key.transpose(1, 2), cos, sin)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend: Callable[..., tuple[Tensor, Any]] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        if self.sliding_window is not None:
            kwargs["sliding_window"] = self.sliding_window
        output, _ = attend(self, query, key, value, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs)
        projected: Tensor = self.o_proj(output.reshape(*shape, -1).contiguous())
        return projected


class LinearAttention(nn.Module):
    """Attention replaced by one linear map of the normed hidden state: no look at other tokens, no KV cache."""

    def __init__(self, config: PuzzleDagConfig) -> None:
        super().__init__()
        self.linear_attn = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map [batch, length, hidden] to the same shape."""
        mapped: Tensor = self.linear_attn(hidden_states)
        return mapped


class SwiGLU(nn.Module):
    """The gated FFN of any width."""

    def __init__(self, config: PuzzleDagConfig, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map [batch, length, hidden] to the same shape."""
        mapped: Tensor = self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))
        return mapped


class LinearFFN(nn.Module):
    """The FFN replaced by one linear map of the normed hidden state."""

    def __init__(self, config: PuzzleDagConfig) -> None:
        super().__init__()
        self.linear_mlp = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map [batch, length, hidden] to the same shape."""
        mapped: Tensor = self.linear_mlp(hidden_states)
        return mapped


class PuzzleDagLayer(nn.Module):
    """A decoder layer read off its per-layer configuration; a skipped place has neither module nor norm."""

    def __init__(self, config: PuzzleDagConfig, layer_index: int) -> None:
        super().__init__()
        layer = config.per_layer_config[layer_index]
        skip, linear = getattr(layer, "skip", None) or [], layer.replace_with_linear or []
        self.layer_idx = layer_index
        self.self_attn: nn.Module | None = None
        self.mlp: nn.Module | None = None
        if "attention" not in skip:
            self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            self.self_attn = (
                LinearAttention(config)
                if "attention" in linear
                else GroupedQueryAttention(config, layer.num_key_value_heads, layer_index)
            )
        if "mlp" not in skip:
            self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            self.mlp = LinearFFN(config) if "mlp" in linear else SwiGLU(config, layer.intermediate_size)

    @property
    def has_cache(self) -> bool:
        """Whether this layer keeps keys and values."""
        return isinstance(self.self_attn, GroupedQueryAttention)

    def forward(
        self, hidden_states: Tensor, position_embeddings: PositionEmbeddings, past_key_values: Cache | None = None, **kwargs: Any
    ) -> Tensor:
        """Map [batch, length, hidden] to the same shape, residuals included."""
        if past_key_values is not None and not self.has_cache:
            # generate() and the masks ask some layer of the cache how long the text is, so each must know:
            # a layer without attention keeps one number a token.
            counter = hidden_states.new_zeros(hidden_states.shape[0], 1, hidden_states.shape[1], 1)
            past_key_values.update(counter, counter, self.layer_idx)
        if self.self_attn is not None:
            normed = self.input_layernorm(hidden_states)
            hidden_states = hidden_states + self.self_attn(normed, position_embeddings, past_key_values=past_key_values, **kwargs)
        if self.mlp is not None:
            hidden_states = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states


class PuzzleDagRotaryEmbedding(LlamaRotaryEmbedding):  # type: ignore[misc]
    """Llama's rotary embedding whose frequencies stay float32 when the model is cast, as they are when it is loaded."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PuzzleDagRotaryEmbedding":
        exact = {name: buffer for name, buffer in self.named_buffers() if not buffer.is_meta}
        super()._apply(fn, recurse)
        for name, buffer in exact.items():
            setattr(self, name, buffer.to(getattr(self, name).device))
        return self


class PuzzleDagPreTrainedModel(PreTrainedModel):  # type: ignore[misc]
    """What transformers needs to know to load and place the weights."""

    config_class = PuzzleDagConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = False
    _no_split_modules = ["PuzzleDagLayer"]  # noqa: RUF012 (transformers' own convention)
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True


class PuzzleDagModel(PuzzleDagPreTrainedModel):
    """Embedding, heterogeneous layers, final norm."""

    def __init__(self, config: PuzzleDagConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(PuzzleDagLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = PuzzleDagRotaryEmbedding(config=config)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Return the normed last hidden state; with `output_hidden_states`, also the state at every layer boundary."""
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            past = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(hidden_states.shape[1], device=hidden_states.device) + past).unsqueeze(0)
        mask_arguments = {
            "config": self.config,
            "inputs_embeds": hidden_states,
            "attention_mask": attention_mask,
            "past_key_values": past_key_values,
            "position_ids": position_ids,
        }
        makers = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}
        masks = {kind: makers[kind](**mask_arguments) for kind in sorted(set(self.config.layer_types))}
        position_embeddings = self.rotary_emb(hidden_states, position_ids=position_ids)
        boundaries = [hidden_states]
        for layer, kind in zip(self.layers, self.config.layer_types, strict=True):
            hidden_states = layer(
                hidden_states,
                position_embeddings,
                attention_mask=masks[kind],
                past_key_values=past_key_values,
            )
            boundaries.append(hidden_states)
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states),
            past_key_values=past_key_values,
            hidden_states=tuple(boundaries) if output_hidden_states else None,
        )


class PuzzleDagForCausalLM(PuzzleDagPreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """The heterogeneous model with its language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 (transformers' own convention)

    def __init__(self, config: PuzzleDagConfig) -> None:
        super().__init__(config)
        self.model = PuzzleDagModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self, input_ids: Tensor | None = None, labels: Tensor | None = None, logits_to_keep: int | Tensor = 0, **kwargs: Any
    ) -> CausalLMOutputWithPast:
        """Return logits [batch, length, vocab]; with `labels`, the language-model loss as well."""
        outputs = self.model(input_ids=input_ids, **kwargs)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept, :])
        loss = None if labels is None else self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=outputs.past_key_values, hidden_states=outputs.hidden_states
        )
