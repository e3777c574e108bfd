"""Int8 W8A8: a checkpoint whose linear maps are int8, in the compressed-tensors format that vLLM reads.

Weights are rounded to the nearest of 255 symmetric steps, one scale an output channel; activations get a scale a token while
serving. Embeddings, norms and the head stay as they are. No calibration is needed, and none is done.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from puzzle_dag.store import write_atomically, write_tensor_file

INT8 = "w8a8_int8"
"""Name of this quantisation in a target; vLLM has none of its own for it, as it reads it off the checkpoint."""

_LARGEST = 127
_INDEX = "model.safetensors.index.json"
_LAYERS = "model.layers."


class QuantizationError(ValueError):
    """A checkpoint that can't be quantised."""


def int8_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return a model configuration that says its linear maps are int8 (compressed-tensors, "int-quantized")."""
    common = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**common, "strategy": "channel", "dynamic": False},
        "input_activations": {**common, "strategy": "token", "dynamic": True},
    }
    scheme = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }
    return {**config, "quantization_config": scheme}


def quantization_argument(quantization: str | None) -> str | None:
    """Return what vLLM's `quantization` argument gets for a target's: nothing for int8 W8A8, which the checkpoint itself says."""
    return None if quantization == INT8 else quantization


def prepare_checkpoint(folder: Path, quantization: str | None, out: Path) -> Path:
    """Return the folder that vLLM loads a checkpoint from: for int8 W8A8 the int8 form, written into `out`; else `folder` itself.

    Raises:
        QuantizationError: as `write_int8_checkpoint`.
    """
    return write_int8_checkpoint(folder, out) if quantization == INT8 else folder


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return a matrix [out, in] as int8 and its scales [out, 1] (float32): the largest magnitude of a row becomes 127."""
    numbers = weight.float()
    scale = numbers.abs().amax(dim=1, keepdim=True) / _LARGEST
    scale[scale == 0] = 1.0
    return (numbers / scale).round().to(torch.int8), scale


def _quantize_file(source: Path, path: Path) -> list[str]:
    """Write one file of a checkpoint with its linear maps in int8. Return the names of its tensors."""
    tensors: dict[str, Tensor] = {}
    with safe_open(source, "pt") as f:
        for name in f.keys():  # noqa: SIM118 (not a mapping)
            tensor = f.get_tensor(name)
            if name.startswith(_LAYERS) and name.endswith(".weight") and tensor.dim() == 2:
                tensors[name], tensors[f"{name}_scale"] = quantize_weight(tensor)
            else:
                tensors[name] = tensor
    write_tensor_file(path, tensors, {"format": "pt"})
    return list(tensors)


def write_int8_checkpoint(folder: Path, out: Path) -> Path:
    """Write a checkpoint's int8 form into `out`, its configuration last, so that a crash leaves nothing that loads. Return `out`.

    Args:
        folder: a parent's or child's checkpoint, in float32, float16 or bfloat16.
        out: folder of the result; made where it is missing, and it holds no checkpoint yet.

    Raises:
        QuantizationError: `folder` is no checkpoint or is quantised already, or `out` holds one.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files or not (folder / "config.json").is_file():
        raise QuantizationError(f"{folder} is no checkpoint (config.json and *.safetensors)")
    config = json.loads((folder / "config.json").read_text())
    if "quantization_config" in config:
        raise QuantizationError(f"{folder}: config.json has a `quantization_config`; give the checkpoint that it was made from")
    if (out / "config.json").exists():
        raise QuantizationError(f"{out} holds a config.json; give an empty folder")
    out.mkdir(parents=True, exist_ok=True)
    names = {name: source.name for source in files for name in _quantize_file(source, out / source.name)}
    for path in folder.iterdir():
        if path.is_file() and path.suffix != ".safetensors" and path.name not in ("config.json", _INDEX):
            shutil.copy(path, out / path.name)
    if (folder / _INDEX).exists():
        write_atomically(out / _INDEX, json.dumps({"metadata": {}, "weight_map": names}, indent=1))
    write_atomically(out / "config.json", json.dumps(int8_config(config), indent=2))
    return out
