"""The heterogeneous model in vLLM: its Llama with layers read off `per_layer_config`.

Attention and SwiGLU are vLLM's own (fused projections, paged KV cache with each layer's own KV heads, tensor and
pipeline parallel, quantisation, LoRA). What is ours: linear maps, no-ops anywhere, qk-norm, and a residual stream
that starts at the first place that runs, wherever that is.
"""

from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import ColumnParallelLinear
from vllm.model_executor.models.llama import LlamaAttention, LlamaForCausalLM, LlamaMLP, LlamaModel
from vllm.model_executor.models.utils import extract_layer_index
from vllm.sequence import IntermediateTensors


def _add_and_norm(norm: RMSNorm, hidden_states: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """Add the residual and norm, fused; there is no residual before the first place that runs."""
    if residual is None:
        return norm(hidden_states), hidden_states
    added: tuple[Tensor, Tensor] = norm(hidden_states, residual)
    return added


class GroupedQueryAttention(LlamaAttention):  # type: ignore[misc]
    """vLLM's Llama attention (which reads `layer_types` and `sliding_window` itself) with the layer's KV heads and Qwen3's qk-norm."""

    def __init__(self, vllm_config: VllmConfig, num_kv_heads: int, prefix: str) -> None:
        config = vllm_config.model_config.hf_config
        super().__init__(
            config=config,
            hidden_size=config.hidden_size,
            num_heads=config.num_attention_heads,
            num_kv_heads=num_kv_heads,
            max_position_embeddings=config.max_position_embeddings,
            quant_config=vllm_config.quant_config,
            bias=config.qkv_bias,
            bias_o_proj=config.o_bias,
            cache_config=vllm_config.cache_config,
            prefix=prefix,
        )
        self.qk_norm = config.qk_norm
        if self.qk_norm:
            self.q_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps)
            self.k_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps)

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        """Map [tokens, hidden] to the same shape."""
        qkv, _ = self.qkv_proj(hidden_states)
        query, key, value = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        if self.qk_norm:
            query = self.q_norm(query.reshape(*query.shape[:-1], self.num_heads, self.head_dim)).flatten(-2)
            key = self.k_norm(key.reshape(*key.shape[:-1], self.num_kv_heads, self.head_dim)).flatten(-2)
        query, key = self.rotary_emb(positions, query, key)
        output: Tensor = self.o_proj(self.attn(query, key, value))[0]
        return output


class LinearPlace(nn.Module):
    """Attention or FFN replaced by one linear map, its output columns spread over the tensor-parallel ranks."""

    def __init__(self, vllm_config: VllmConfig, name: str, prefix: str) -> None:
        super().__init__()
        hidden_size = vllm_config.model_config.hf_config.hidden_size
        self.name = name
        linear = ColumnParallelLinear(
            hidden_size, hidden_size, bias=False, gather_output=True, quant_config=vllm_config.quant_config, prefix=f"{prefix}.{name}"
        )
        self.add_module(name, linear)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map [tokens, hidden] to the same shape."""
        output: Tensor = getattr(self, self.name)(hidden_states)[0]
        return output


class PuzzleDagLayer(nn.Module):
    """A decoder layer read off its per-layer configuration; a skipped place has neither module nor norm."""

    def __init__(self, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        layer = config.per_layer_config[extract_layer_index(prefix)]
        skip, linear = getattr(layer, "skip", None) or [], layer.replace_with_linear or []
        self.has_attention, self.has_ffn = "attention" not in skip, "mlp" not in skip
        self.attention_is_linear = "attention" in linear
        if self.has_attention:
            self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            self.self_attn = (
                LinearPlace(vllm_config, "linear_attn", f"{prefix}.self_attn")
                if self.attention_is_linear
                else GroupedQueryAttention(vllm_config, layer.num_key_value_heads, f"{prefix}.self_attn")
            )
        if self.has_ffn:
            self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            self.mlp = (
                LinearPlace(vllm_config, "linear_mlp", f"{prefix}.mlp")
                if "mlp" in linear
                else LlamaMLP(
                    hidden_size=config.hidden_size,
                    intermediate_size=layer.intermediate_size,
                    hidden_act=config.hidden_act,
                    quant_config=vllm_config.quant_config,
                    bias=config.mlp_bias,
                    prefix=f"{prefix}.mlp",
                )
            )

    def forward(self, positions: Tensor, hidden_states: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Map [tokens, hidden] and the residual stream to the next layer's."""
        if self.has_attention:
            hidden_states, residual = _add_and_norm(self.input_layernorm, hidden_states, residual)
            hidden_states = self.self_attn(hidden_states) if self.attention_is_linear else self.self_attn(positions, hidden_states)
        if self.has_ffn:
            hidden_states, residual = _add_and_norm(self.post_attention_layernorm, hidden_states, residual)
            hidden_states = self.mlp(hidden_states)
        return hidden_states, residual


@support_torch_compile(
    dynamic_arg_dims={"input_ids": {0: "b"}, "positions": {0: "b"}, "intermediate_tensors": {0: "b"}, "inputs_embeds": {0: "b"}}
)
class PuzzleDagModel(LlamaModel):  # type: ignore[misc]
    """Embedding, heterogeneous layers, final norm."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", layer_type: type[nn.Module] = PuzzleDagLayer) -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=layer_type)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None,
        inputs_embeds: Tensor | None = None,
    ) -> Any:
        """Return the normed last hidden state [tokens, hidden], or what the next pipeline rank needs."""
        residual: Tensor | None
        local: list[Tensor]
        if get_pp_group().is_first_rank:
            hidden_states = self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
            residual = None
        else:
            assert intermediate_tensors is not None
            hidden_states, residual = intermediate_tensors["hidden_states"], intermediate_tensors["residual"]
        # Hidden states that an EAGLE-3 drafter asked for, as vLLM's Llama collects them.
        remote, local = self.collect_remote_aux_hidden_states(intermediate_tensors), []
        if get_pp_group().is_first_rank:
            self._maybe_add_hidden_state(local, self.start_layer, hidden_states, residual)
        for index, layer in enumerate(islice(self.layers, self.start_layer, self.end_layer), start=self.start_layer):
            hidden_states, residual = layer(positions, hidden_states, residual)
            self._maybe_add_hidden_state(local, index + 1, hidden_states, residual)
        if not get_pp_group().is_last_rank:
            # A rank of no-ops only has no residual yet; the next rank adds both, so zeros are right.
            residual = torch.zeros_like(hidden_states) if residual is None else residual
            return IntermediateTensors({"hidden_states": hidden_states, "residual": residual, **self.pack_local_aux_hidden_states(local)})
        hidden_states, _ = _add_and_norm(self.norm, hidden_states, residual)
        return (hidden_states, remote + local) if remote + local else hidden_states


class PuzzleDagForCausalLM(LlamaForCausalLM):  # type: ignore[misc]
    """vLLM's Llama for causal language modelling around heterogeneous layers."""

    def _init_model(self, vllm_config: VllmConfig, prefix: str = "", layer_type: type[nn.Module] = PuzzleDagLayer) -> nn.Module:
        return PuzzleDagModel(vllm_config=vllm_config, prefix=prefix, layer_type=PuzzleDagLayer)
