"""The parent: any Llama-, Mistral-, Qwen2- or Qwen3-shaped checkpoint, loaded into our own model.

The tensors of the safetensors files go straight into PuzzleDagForCausalLM (same names), so that with all parent
blocks it computes the parent's logits bit for bit, and children differ from it only where a block was replaced.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

from puzzle_dag.architecture import FFN, Attention, Block
from puzzle_dag.config import ParentSource, read_shape
from puzzle_dag.model.checkpoint import load_strictly
from puzzle_dag.model.configuration_puzzle_dag import PuzzleDagConfig
from puzzle_dag.model.families import FAMILIES, UnsupportedFamilyError, to_puzzle_dag_config
from puzzle_dag.model.modeling_puzzle_dag import PuzzleDagForCausalLM
from puzzle_dag.store import digest_tensors, fingerprint

_PLACE_PREFIXES = {"attention": ("input_layernorm.", "self_attn."), "ffn": ("post_attention_layernorm.", "mlp.")}
_CHECKPOINT_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py"]


_SHAPE_FREE = ("transformers_version", "dtype", "torch_dtype", "_name_or_path", "architectures", "use_cache", "initializer_range")


class ParentShapeError(ValueError):
    """A checkpoint that isn't of the shape that its profile names."""


class ParentNotFoundError(ValueError):
    """The parent's folder or hub repository is missing or is no checkpoint."""


@dataclass(frozen=True, slots=True)
class Parent:
    """A loaded parent. `digest` identifies its tensors as stored and its configuration, whatever dtype it computes in."""

    model: PuzzleDagForCausalLM
    tokenizer: Any
    block: Block
    digest: str
    folder: Path
    layer_digests: tuple[str, ...]

    @property
    def config(self) -> PuzzleDagConfig:
        """The parent's configuration, with its own block in every layer."""
        config: PuzzleDagConfig = self.model.config
        return config

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        num_layers: int = self.config.num_hidden_layers
        return num_layers

    @property
    def kv_heads(self) -> int:
        """KV heads a layer."""
        return self.block.attention.kv_heads

    @property
    def intermediate_size(self) -> int:
        """FFN channels a layer."""
        return self.block.ffn.intermediate_size

    def layer_state(self, layer: int, place: Literal["attention", "ffn"]) -> dict[str, Tensor]:
        """Return the tensors of one place of a layer, norm included, by layer-relative name (not copied)."""
        state = self.model.model.layers[layer].state_dict()
        return {name: tensor for name, tensor in state.items() if name.startswith(_PLACE_PREFIXES[place])}

    def layer_digest(self, layer: int) -> str:
        """Return the digest of a layer's tensors as stored, and of the configuration that says what they compute."""
        return self.layer_digests[layer]


def _checkpoint_location(source: ParentSource, root: Path) -> Path | str:
    if source.path is None:
        assert source.hub is not None
        return source.hub
    folder = root / source.path
    if not (folder / "config.json").is_file():
        state = "holds no config.json" if folder.is_dir() else "does not exist"
        raise ParentNotFoundError(f"parent.path: {folder} {state}; give the folder of a Hugging Face checkpoint")
    return folder


def read_parent_shape(source: ParentSource, root: Path) -> PuzzleDagConfig:
    """Return the parent's configuration without reading its weights: off the shape file where the profile names one.

    Args:
        source: where the parent comes from; a local path is relative to `root`.
        root: the project's root.

    Raises:
        ConfigError: the shape file can't be used.
        ParentNotFoundError: the folder is missing or holds no config.json, or the hub does not have it.
        UnsupportedFamilyError: the checkpoint is of another family; the message lists the supported ones.
    """
    if source.shape is not None:
        return _read_shape_file(root, source.shape)
    location = _checkpoint_location(source, root)
    try:
        config = AutoConfig.from_pretrained(location, revision=source.revision, trust_remote_code=source.trust_remote_code)
    except OSError as error:
        raise ParentNotFoundError(f"parent: the configuration of {location} can't be read: {error}") from error
    except ValueError as error:
        supported = ", ".join(FAMILIES)
        raise UnsupportedFamilyError(f"parent: the family of {location} is not known; use a parent of: {supported} ({error})") from error
    return to_puzzle_dag_config(config)


def _read_shape_file(root: Path, name: str) -> PuzzleDagConfig:
    shape = read_shape(root / "conf", name)
    fields = dict(shape.config)
    family = fields.pop("model_type", None)
    if family not in FAMILIES:
        raise UnsupportedFamilyError(f"shape {name}: field `config.model_type` is {family!r}; use one of {', '.join(FAMILIES)}")
    return to_puzzle_dag_config(AutoConfig.for_model(family, **fields))


def _check_shape(name: str, shape: PuzzleDagConfig, config: PuzzleDagConfig) -> None:
    """Check that a checkpoint is what the shape file says. Raises ParentShapeError, naming the first field that differs."""
    said, found = shape.to_dict(), config.to_dict()
    for field in sorted(said):
        if field not in _SHAPE_FREE and not field.endswith("token_id") and said[field] != found.get(field):
            raise ParentShapeError(
                f"parent.shape: conf/shapes/{name}.yaml says {field} is {said[field]!r}, but the checkpoint's is {found.get(field)!r}; "
                "correct the file, or take `shape` out of the profile"
            )


def _fetch(source: ParentSource, location: Path | str) -> Path:
    """Return the local folder of the checkpoint, downloaded where it is on the hub, with safetensors in it."""
    folder = Path(location)
    if isinstance(location, str):
        try:
            folder = Path(snapshot_download(location, revision=source.revision, allow_patterns=_CHECKPOINT_FILES))
        except OSError as error:
            raise ParentNotFoundError(f"parent.hub: {location} can't be downloaded: {error}") from error
    if not any(folder.glob("*.safetensors")):
        raise ParentNotFoundError(f"parent: {folder} holds no *.safetensors; convert the checkpoint to safetensors first")
    return folder


def read_tokenizer(source: ParentSource, root: Path) -> Any:
    """Return the parent's tokenizer alone. Raises ParentNotFoundError."""
    location = _checkpoint_location(source, root)
    try:
        return AutoTokenizer.from_pretrained(location, revision=source.revision, trust_remote_code=source.trust_remote_code)
    except OSError as error:
        raise ParentNotFoundError(f"parent: the tokenizer of {location} can't be read: {error}") from error


def _digest_folder(folder: Path, config: PuzzleDagConfig) -> tuple[str, tuple[str, ...]]:
    """Return the digest of all tensors in the folder and those of each layer, one layer in memory at a time."""
    traits = {k: v for k, v in config.to_dict().items() if k not in ("transformers_version", "dtype", "_name_or_path", "architectures")}
    groups: dict[str, list[tuple[Path, str]]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as f:
            for name in f.keys():  # noqa: SIM118 (not a mapping)
                parts = name.split(".")
                group = parts[2] if name.startswith("model.layers.") else ""
                groups.setdefault(group, []).append((path, name))
    digests = {}
    for group, members in groups.items():
        tensors = {}
        for path in sorted({path for path, _ in members}):
            with safe_open(path, "pt") as f:
                tensors.update({name.removeprefix(f"model.layers.{group}."): f.get_tensor(name) for p, name in members if p == path})
        digests[group] = fingerprint({"tensors": digest_tensors(tensors), "config": traits})
    return fingerprint(digests), tuple(digests[str(layer)] for layer in range(config.num_hidden_layers))


def load_parent(source: ParentSource, root: Path, *, dtype: str | None = None, device: str | torch.device = "cpu") -> Parent:
    """Load the parent into our own model, in eval mode.

    Args:
        source: where the parent comes from; a local path is relative to `root`.
        root: the project's root.
        dtype: name of a torch dtype to compute in; by default the checkpoint's own.
        device: where the model goes.

    Raises:
        ParentNotFoundError: the folder is missing or is no safetensors checkpoint, or the hub does not have it.
        UnsupportedFamilyError: the checkpoint is of another family; raised before weights are read or fetched.
        ParentShapeError: the profile names a shape, and the checkpoint is of another.
        CheckpointMismatchError: the checkpoint lacks tensors that its configuration asks for, or has others.
    """
    config = read_parent_shape(source.model_copy(update={"shape": None}), root)
    if source.shape is not None:
        _check_shape(source.shape, _read_shape_file(root, source.shape), config)
    folder = _fetch(source, _checkpoint_location(source, root))
    model = load_strictly(folder, config, dtype=dtype, device=device)
    digest, layer_digests = _digest_folder(folder, config)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=source.trust_remote_code)
    block = Block(Attention("gqa", config.num_key_value_heads), FFN("swiglu", config.intermediate_size))
    return Parent(model, tokenizer, block, digest, folder, layer_digests)
