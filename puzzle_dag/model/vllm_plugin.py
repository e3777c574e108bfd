"""The entry point `vllm.general_plugins`: stock vLLM serves our checkpoints once this package is installed.

vLLM calls `register` in every process it starts (front end, engine core, workers), before it reads a configuration.
"""

from typing import Any

from transformers import AutoConfig

from puzzle_dag.model.configuration_deci import DeciLMConfig
from puzzle_dag.model.configuration_puzzle_dag import PuzzleDagConfig

ARCHITECTURE = "PuzzleDagForCausalLM"


def register() -> None:
    """Tell transformers and vLLM about our configuration and model; idempotent, and no CUDA is touched."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

    class PuzzleDagSettings(VerifyAndUpdateConfig):  # type: ignore[misc]
        """What vLLM must set otherwise for a model without any attention."""

        @staticmethod
        def verify_and_update_config(vllm_config: Any) -> None:
            """Switch prefix caching off where there is no KV cache whose blocks it could share."""
            layers = vllm_config.model_config.hf_config.per_layer_config
            keeps_cache = any(
                "attention" not in (*(getattr(layer, "skip", None) or []), *(layer.replace_with_linear or [])) for layer in layers
            )
            if not keeps_cache:
                vllm_config.cache_config.enable_prefix_caching = False

    AutoConfig.register(PuzzleDagConfig.model_type, PuzzleDagConfig, exist_ok=True)
    # vLLM has the model of exported children, but not their configuration.
    AutoConfig.register(DeciLMConfig.model_type, DeciLMConfig, exist_ok=True)
    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, "puzzle_dag.model.vllm_model:PuzzleDagForCausalLM")
    MODELS_CONFIG_MAP[ARCHITECTURE] = PuzzleDagSettings
