"""Put a child together: the parent's embeddings, norms and head around one chosen block a layer."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from puzzle_dag.architecture import Architecture
from puzzle_dag.model.checkpoint import architecture_of, child_config, save_checkpoint
from puzzle_dag.model.fused_ffn import stack_ffns
from puzzle_dag.model.modeling_puzzle_dag import PuzzleDagForCausalLM
from puzzle_dag.model.parent import Parent
from puzzle_dag.pieces import LayerPieces, Place, piece_name
from puzzle_dag.store import digest_tensors, fingerprint

VERSION = 1
"""Version of how children are assembled; part of the asset's code version."""

_VOLATILE = ("transformers_version", "dtype", "_name_or_path", "architectures", "auto_map")


class PieceMismatchError(ValueError):
    """A piece whose tensors are not those that the architecture asks for at its place."""


def place_state(parent: Parent, pieces: LayerPieces, layer: int, place: Place, variant_name: str) -> Mapping[str, Tensor]:
    """Return the tensors of a variant at its place: the parent's own, a library piece, or the parent's FFNs of a fused run.

    Raises:
        PieceMissingError: the variant was never made.
    """
    own = (parent.block.attention if place == "attention" else parent.block.ffn).name
    if variant_name == own:
        return parent.layer_state(layer, place)
    fused = pieces.fused.get(piece_name(place, variant_name))
    return pieces.state(place, variant_name) if fused is None else stack_ffns([parent.layer_state(i, "ffn") for i in fused])


def build_child(parent: Parent, architecture: Architecture, pieces: Sequence[LayerPieces]) -> PuzzleDagForCausalLM:
    """Return the child of `architecture` in the parent's dtype and on its device, in eval mode.

    Args:
        parent: gives everything outside the layers, every block that is its own, and the FFNs of runs that are fused.
        architecture: one block a layer.
        pieces: one entry a layer, in order.

    Raises:
        ValueError: the architecture or `pieces` has another number of layers than the parent.
        PieceMissingError: a chosen variant was never made.
        PieceMismatchError: a piece has other tensors, or of other shapes, than its variant asks for.
    """
    layers = [p.layer for p in pieces]
    if layers != list(range(parent.num_layers)):
        raise ValueError(f"pieces: layers {layers} given, the parent has 0 to {parent.num_layers - 1}; give one a layer, in order")
    config = child_config(parent.config, architecture)
    dtype = parent.model.lm_head.weight.dtype
    child: PuzzleDagForCausalLM = PuzzleDagForCausalLM(config).to(dtype=dtype, device=parent.model.device).eval()
    state = {n: t for n, t in parent.model.state_dict().items() if not n.startswith("model.layers.")}
    for layer, block in enumerate(architecture):
        for place, variant in (("attention", block.attention), ("ffn", block.ffn)):
            for name, tensor in place_state(parent, pieces[layer], layer, place, variant.name).items():  # type: ignore[arg-type]
                state[f"model.layers.{layer}.{name}"] = tensor.to(dtype=dtype, device=parent.model.device)
    try:
        child.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise PieceMismatchError(f"pieces don't fit the architecture: {error}; build the library again") from error
    return child


def model_digest(model: PuzzleDagForCausalLM) -> str:
    """Return the digest of a model: its tensors and what its configuration says they compute.

    A tied head counts once, so the digest is the same before saving and after loading.
    """
    traits = {k: v for k, v in model.config.to_dict().items() if k not in _VOLATILE}
    traits["per_layer_config"] = [block.name for block in architecture_of(model.config)]
    return fingerprint({"tensors": digest_tensors(dict(model.named_parameters())), "config": traits})


def assemble_child(parent: Parent, architecture: Architecture, pieces: Sequence[LayerPieces], folder: Path) -> str:
    """Write the child of `architecture` as a checkpoint and return its digest.

    With nothing but parent blocks the child computes the parent's logits bit for bit. The folder appears whole or
    not at all. Arguments and errors are those of `build_child`.
    """
    child = build_child(parent, architecture, pieces)
    save_checkpoint(child, parent.tokenizer, folder)
    return model_digest(child)


def num_parameters(model: torch.nn.Module) -> int:
    """Return the number of parameters, a tied tensor counted once."""
    return sum(math.prod(p.shape) for p in model.parameters())
