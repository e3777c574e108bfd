"""Layers of a loaded parent replaced by others, for as long as it takes to look at what that does."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from puzzle_dag.architecture import Block
from puzzle_dag.model.checkpoint import child_config
from puzzle_dag.model.modeling_puzzle_dag import PuzzleDagForCausalLM, PuzzleDagLayer

if TYPE_CHECKING:
    from puzzle_dag.model.parent import Parent


def make_layer(parent: "Parent", model: PuzzleDagForCausalLM, layer: int, block: Block, state: Mapping[str, Tensor]) -> PuzzleDagLayer:
    """Return a layer of the parent's shape with another block and its tensors, on the device and in the dtype of `model`."""
    architecture = [parent.block] * parent.num_layers
    architecture[layer] = block
    config = child_config(model.config, tuple(architecture))
    config._attn_implementation = model.config._attn_implementation
    with torch.device("meta"):
        made = PuzzleDagLayer(config, layer)
    weight = model.lm_head.weight
    made.load_state_dict({n: t.to(weight.device, weight.dtype) for n, t in state.items()}, strict=True, assign=True)
    return made.eval()


@contextmanager
def replaced_layers(model: PuzzleDagForCausalLM, layers: Mapping[int, nn.Module]) -> Iterator[None]:
    """Put other modules in the place of some layers while the context lasts."""
    own = {index: model.model.layers[index] for index in layers}
    try:
        for index, module in layers.items():
            model.model.layers[index] = module
        yield
    finally:
        for index, module in own.items():
            model.model.layers[index] = module
