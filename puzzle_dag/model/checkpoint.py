"""Checkpoints of children: an ordinary Hugging Face folder that says of each layer what it is.

The folder carries our configuration and modeling files (`auto_map`), so it loads without this package; with it,
nothing remote is run. `per_layer_config` is the only stored truth about layers.
"""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from puzzle_dag.architecture import FFN, Architecture, Attention, Block
from puzzle_dag.model import configuration_puzzle_dag, modeling_puzzle_dag
from puzzle_dag.model.configuration_puzzle_dag import PuzzleDagConfig
from puzzle_dag.model.modeling_puzzle_dag import PuzzleDagForCausalLM
from puzzle_dag.store import write_atomically

_AUTO_MAP = {
    "AutoConfig": "configuration_puzzle_dag.PuzzleDagConfig",
    "AutoModelForCausalLM": "modeling_puzzle_dag.PuzzleDagForCausalLM",
}


class CheckpointMismatchError(ValueError):
    """The tensors of a checkpoint are not those that its configuration asks for."""


def _layer_overrides(block: Block) -> dict[str, Any]:
    places = {"attention": block.attention.kind, "mlp": block.ffn.kind}
    overrides: dict[str, Any] = {}
    if skip := [place for place, kind in places.items() if kind == "noop"]:
        overrides["skip"] = skip
    if linear := [place for place, kind in places.items() if kind == "linear"]:
        overrides["replace_with_linear"] = linear
    if block.attention.kind == "gqa":
        overrides["num_key_value_heads"] = block.attention.kv_heads
    if block.ffn.kind == "swiglu":
        overrides["intermediate_size"] = block.ffn.intermediate_size
    return overrides


def child_config(parent_config: PuzzleDagConfig, architecture: Architecture) -> PuzzleDagConfig:
    """Return the configuration of the child of `architecture`, everything else as the parent's.

    Raises:
        ValueError: the architecture has another number of layers, or KV heads that don't divide the query heads.
    """
    if len(architecture) != parent_config.num_hidden_layers:
        num_layers = parent_config.num_hidden_layers
        raise ValueError(f"architecture has {len(architecture)} layers, the parent {num_layers}; give one block a layer")
    fields = parent_config.to_dict()
    fields.pop("model_type")
    fields["per_layer_config"] = {index: _layer_overrides(block) for index, block in enumerate(architecture)}
    return PuzzleDagConfig(**fields)


def architecture_of(config: PuzzleDagConfig) -> Architecture:
    """Return the block of every layer, read off `per_layer_config`; the inverse of `child_config`."""
    blocks = []
    for layer in config.per_layer_config:
        skip, linear = getattr(layer, "skip", None) or [], layer.replace_with_linear or []
        attention, ffn = Attention("gqa", layer.num_key_value_heads), FFN("swiglu", layer.intermediate_size)
        if "attention" in (*skip, *linear):
            attention = Attention("noop" if "attention" in skip else "linear")
        if "mlp" in (*skip, *linear):
            ffn = FFN("noop" if "mlp" in skip else "linear")
        blocks.append(Block(attention, ffn))
    return tuple(blocks)


def load_strictly(
    folder: Path, config: PuzzleDagConfig, *, dtype: str | None = None, device: str | torch.device = "cpu"
) -> PuzzleDagForCausalLM:
    """Load the safetensors of `folder` (sharded or not) into the model of `config`, in eval mode.

    Raises:
        CheckpointMismatchError: a tensor is missing, unexpected or of another shape; transformers would only warn.
    """
    try:
        model, info = PuzzleDagForCausalLM.from_pretrained(
            folder, config=config, dtype=dtype or "auto", use_safetensors=True, output_loading_info=True
        )
    except RuntimeError as error:
        raise CheckpointMismatchError(f"{folder}: {error}") from error
    # Llama checkpoints of 2023 carry the rotary frequencies, which follow from the configuration.
    unexpected = sorted(n for n in info["unexpected_keys"] if not n.endswith("rotary_emb.inv_freq"))
    for what, names in (("lacks", sorted(info["missing_keys"])), ("has unexpected", unexpected)):
        if names:
            raise CheckpointMismatchError(f"{folder}: the checkpoint {what} {', '.join(names[:4])} ({len(names)} tensors); is it complete?")
    loaded: PuzzleDagForCausalLM = model.to(device).eval()
    return loaded


def load_checkpoint(folder: Path, *, dtype: str | None = None, device: str | torch.device = "cpu") -> PuzzleDagForCausalLM:
    """Load a child (or an all-parent model) that `save_checkpoint` wrote, in eval mode.

    Args:
        folder: the checkpoint's folder.
        dtype: name of a torch dtype; by default the checkpoint's own.
        device: where the model goes.

    Raises:
        ValueError: the folder is no puzzle_dag checkpoint.
        CheckpointMismatchError: tensors are missing or are not those of the configuration.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} is no checkpoint: it holds no config.json")
    model_type = json.loads(path.read_text()).get("model_type")
    if model_type != PuzzleDagConfig.model_type:
        raise ValueError(f"{folder} is of model_type {model_type!r}, not {PuzzleDagConfig.model_type!r}; load a parent with load_parent")
    return load_strictly(folder, PuzzleDagConfig.from_pretrained(folder), dtype=dtype, device=device)


def _write_checkpoint(model: PuzzleDagForCausalLM, tokenizer: Any, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for module in (configuration_puzzle_dag, modeling_puzzle_dag):
        source = Path(str(module.__file__))
        shutil.copyfile(source, folder / source.name)
    path = folder / "config.json"
    written = json.loads(path.read_text())
    written.update({"architectures": [PuzzleDagForCausalLM.__name__], "auto_map": _AUTO_MAP})
    write_atomically(path, json.dumps(written, indent=2, sort_keys=True) + "\n")


def save_checkpoint(model: PuzzleDagForCausalLM, tokenizer: Any, folder: Path) -> None:
    """Write a complete checkpoint: safetensors, config.json, tokenizer and the code to load it without this package.

    It is written beside `folder` and renamed, so `folder` is absent, old or complete, never half written.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        _write_checkpoint(model, tokenizer, temporary)
        temporary.chmod(0o755)
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def register_auto_classes() -> None:
    """Make AutoConfig and AutoModelForCausalLM know our classes, so that no remote code is run; idempotent."""
    AutoConfig.register(PuzzleDagConfig.model_type, PuzzleDagConfig, exist_ok=True)
    AutoModelForCausalLM.register(PuzzleDagConfig, PuzzleDagForCausalLM, exist_ok=True)
