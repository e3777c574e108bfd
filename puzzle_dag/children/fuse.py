"""FFN Fusion (arXiv 2503.18908): FFNs that follow each other without attention between become one wide FFN.

Two steps, of which only the first changes what is computed. Side by side instead of one after the other, every FFN
of the run reads the run's input X: X + sum_j FFN_j(norm_j(X)). Each layer's norm scale then goes into its own gate and
up weights, which leaves the plain RMSNorm to all of them, and so one FFN with the gate and up rows stacked and the
down columns concatenated. The wide FFN stands in the layer of the run's first FFN, under a norm of ones; the other
layers become no-ops. A fused child is an ordinary checkpoint: an FFN that is wider than the parent's, and skips.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from puzzle_dag.architecture import FFN, Architecture, Block
from puzzle_dag.model.checkpoint import architecture_of, child_config, load_checkpoint, save_checkpoint
from puzzle_dag.model.fused_ffn import FFN_NORM, stack_ffns
from puzzle_dag.model.modeling_puzzle_dag import PuzzleDagForCausalLM

_NO_FFN = FFN("noop")


class UnfusableRunError(ValueError):
    """The FFNs of some layers can't stand side by side; the message names the layer and why."""


def _name(layers: range) -> str:
    return f"{layers.start}-{layers.stop - 1}"


def list_fused_layers(architecture: Architecture, layers: range) -> tuple[int, ...]:
    """Return those of `layers` whose FFNs become one, in order; FFNs that are no-ops are passed over.

    Attention before the run's first FFN is no obstacle: it stays where it is.

    Raises:
        UnfusableRunError: the layers don't exist, one has attention (or its linear replacement) after the first FFN, an
            FFN is a linear map, or fewer than two FFNs are left.
    """
    if not (0 <= layers.start < layers.stop <= len(architecture) and layers.step == 1):
        raise UnfusableRunError(f"layers {_name(layers)} don't exist; the model has 0 to {len(architecture) - 1}, the first one first")
    fused: list[int] = []
    for layer in layers:
        attention, ffn = architecture[layer].attention, architecture[layer].ffn
        if fused and attention.kind != "noop":
            raise UnfusableRunError(
                f"layers {_name(layers)}: layer {layer} has attention ({attention.name}) after the FFN of layer {fused[-1]}; "
                f"end the run at layer {layer - 1} or start it at layer {layer}"
            )
        if ffn.kind == "linear":
            raise UnfusableRunError(f"layers {_name(layers)}: the FFN of layer {layer} is a linear map, without a gate; leave it out")
        if ffn.kind == "swiglu":
            fused.append(layer)
    if len(fused) < 2:
        raise UnfusableRunError(f"layers {_name(layers)} hold {len(fused)} FFNs; a run needs two or more")
    return tuple(fused)


def find_runs(architecture: Architecture) -> tuple[range, ...]:
    """Return the longest runs of two or more FFNs that can be fused, from first FFN to last."""
    runs: list[list[int]] = [[]]
    for layer, block in enumerate(architecture):
        if block.attention.kind != "noop" or block.ffn.kind == "linear":
            runs.append([])
        if block.ffn.kind == "swiglu":
            runs[-1].append(layer)
    return tuple(range(run[0], run[-1] + 1) for run in runs if len(run) > 1)


def fuse_architecture(architecture: Architecture, runs: Sequence[range]) -> Architecture:
    """Return the architecture after fusing every run.

    Raises:
        UnfusableRunError: as `list_fused_layers`, or two runs overlap.
    """
    blocks, taken = list(architecture), set[int]()
    for layers in runs:
        if both := taken & set(layers):
            raise UnfusableRunError(f"layers {_name(layers)}: layer {min(both)} is in another run, too; name each layer once")
        taken |= set(layers)
        first, *others = list_fused_layers(architecture, layers)
        width = sum(architecture[layer].ffn.intermediate_size for layer in (first, *others))
        blocks[first] = Block(architecture[first].attention, FFN("swiglu", width))
        for layer in others:
            blocks[layer] = Block(architecture[layer].attention, _NO_FFN)
    return tuple(blocks)


def _is_of_ffn(name: str) -> bool:
    return name == FFN_NORM or name.startswith("mlp.")


@torch.no_grad()
def fuse_model(model: PuzzleDagForCausalLM, runs: Sequence[range]) -> PuzzleDagForCausalLM:
    """Return a new model in which the FFNs of every run are one, in the same dtype and on the same device, in eval mode.

    Raises:
        UnfusableRunError: as `fuse_architecture`.
    """
    architecture = architecture_of(model.config)
    config = child_config(model.config, fuse_architecture(architecture, runs))
    state = model.state_dict()
    for layers in runs:
        fused_layers = list_fused_layers(architecture, layers)
        parts: list[dict[str, Tensor]] = []
        for layer in fused_layers:
            prefix = f"model.layers.{layer}."
            own = {n.removeprefix(prefix): n for n in state if n.startswith(prefix) and _is_of_ffn(n.removeprefix(prefix))}
            parts.append({name: state.pop(full) for name, full in own.items()})
        state.update({f"model.layers.{fused_layers[0]}.{name}": tensor for name, tensor in stack_ffns(parts).items()})
    weight = model.lm_head.weight
    fused: PuzzleDagForCausalLM = PuzzleDagForCausalLM(config).to(dtype=weight.dtype, device=weight.device).eval()
    fused.load_state_dict(state, strict=True)
    return fused


def load_tokenizer(folder: Path) -> Any:
    """Return the tokenizer of a checkpoint; nothing remote is run."""
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def fuse_checkpoint(folder: Path, runs: Sequence[range], out: Path) -> tuple[PuzzleDagForCausalLM, PuzzleDagForCausalLM]:
    """Write the child in `folder` with the FFNs of every run fused to `out`; return it as it was and as it is now.

    Raises:
        ValueError: `folder` is no child's checkpoint, or `out` exists.
        CheckpointMismatchError: the checkpoint's tensors are not those of its configuration.
        UnfusableRunError: as `fuse_architecture`; nothing is written.
    """
    if out.exists():
        raise ValueError(f"{out} exists; name a folder that doesn't")
    model = load_checkpoint(folder)
    fused = fuse_model(model, runs)
    save_checkpoint(fused, load_tokenizer(folder), out)
    return model, fused
