"""Which FFNs hardly read what those before them wrote, and so may stand side by side (FFN Fusion, arXiv 2503.18908, section 3)."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from puzzle_dag.architecture import Architecture
from puzzle_dag.children.fuse import find_runs
from puzzle_dag.model.modeling_puzzle_dag import PuzzleDagForCausalLM
from puzzle_dag.progress import Progress, silent


def _contributions(model: PuzzleDagForCausalLM, rows: Tensor, dropped: int | None) -> dict[int, Tensor]:
    """Return what each FFN adds to the residual stream, layer -> [rows, length, hidden], while one FFN adds nothing."""
    added: dict[int, Tensor] = {}

    def keep(layer: int, output: Tensor) -> Tensor:
        if layer == dropped:
            return torch.zeros_like(output)
        added[layer] = output
        return output

    handles = []
    for index, layer in enumerate(model.model.layers):
        if isinstance(layer.mlp, nn.Module):
            handles.append(layer.mlp.register_forward_hook(lambda _module, _inputs, output, index=index: keep(index, output)))
    try:
        model.model(input_ids=rows, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return added


@torch.inference_mode()
def measure_dependency(model: PuzzleDagForCausalLM, rows: Tensor, *, rows_per_batch: int = 1, progress: Progress = silent) -> Tensor:
    """Return M [layers, layers]: how much what FFN j adds depends on what FFN i added.

    M[i, j] is the cosine distance, mean over tokens, between what layer j's FFN adds to the residual stream and what it
    adds when layer i's FFN is dropped, everything between computed again. In layers without attention, those that
    can be fused, that is the paper's matrix of whole blocks, h^j(X) = f^j(X) - X. It is 0 where j is not after i or one
    of them has no FFN.

    Args:
        model: the model, in any dtype; distances are taken in float32.
        rows: token ids, int64 [rows, row_length].
        rows_per_batch: rows a forward pass; the FFN outputs of all layers are held at once.
        progress: told of the forward passes.

    Raises:
        ValueError: `rows` is empty.
    """
    if rows.ndim != 2 or rows.numel() == 0:
        raise ValueError(f"rows: shape {tuple(rows.shape)} holds no tokens; give at least one row")
    num_layers = len(model.model.layers)
    sums = torch.zeros(num_layers, num_layers, dtype=torch.float64)
    batches = rows.split(rows_per_batch)
    for number, batch in enumerate(batches):
        reference = _contributions(model, batch, None)
        for count, i in enumerate(reference):
            for j, output in _contributions(model, batch, i).items():
                if j > i:
                    similarity = torch.cosine_similarity(output.float(), reference[j].float(), dim=-1)
                    sums[i, j] += float((1 - similarity).sum(dtype=torch.float64))
            progress(number * len(reference) + count + 1, len(batches) * len(reference), "forward passes")
    return sums / rows.numel()


def largest_dependency(dependency: Tensor, layers: Iterable[int]) -> float:
    """Return the largest entry of the matrix [layers, layers] within some layers; the worst that fusing them ignores."""
    index = torch.tensor(list(layers))
    return float(dependency[index][:, index].max())


def propose_runs(architecture: Architecture, dependency: Tensor, max_dependency: float) -> tuple[range, ...]:
    """Return runs to fuse in which no FFN depends on another by more than `max_dependency`, each as long as it can be.

    Args:
        architecture: the model's blocks.
        dependency: its matrix [layers, layers], of `measure_dependency`.
        max_dependency: cosine distance, 0 to 2.

    Raises:
        ValueError: the matrix is that of a model of another depth.
    """
    if dependency.shape != (len(architecture), len(architecture)):
        raise ValueError(f"dependency: shape {tuple(dependency.shape)} is not that of {len(architecture)} layers")
    runs = []
    for longest in find_runs(architecture):
        run: list[int] = []
        for layer in (index for index in longest if architecture[index].ffn.kind == "swiglu"):
            if run and largest_dependency(dependency, (*run, layer)) > max_dependency:
                runs.append(run)
                run = []
            run.append(layer)
        runs.append(run)
    return tuple(range(run[0], run[-1] + 1) for run in runs if len(run) > 1)
