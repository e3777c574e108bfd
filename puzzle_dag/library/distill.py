"""Decoupled block-wise local distillation: all variants of a layer are trained in one pass over the activations.

Each variant replaces one place of the parent's block while the other place stays the parent's, frozen: (|A| + |F|)
runs a layer (Puzzle, section 3). The loss is MSE(o_parent, o_child) / MSE(o_parent, 0), block output against block
output, residual included, on the parent's hidden states. A batch is read once and the parent's part of it computed
once; then every variant takes its own AdamW step, so that what becomes of one doesn't depend on the others.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from puzzle_dag.config import LibrarySettings
from puzzle_dag.library.activations import ActivationCache
from puzzle_dag.library.block import ParentLayer, Variant
from puzzle_dag.library.initialise import State, held_out_rows
from puzzle_dag.library.student import Student, learning_rate_factor
from puzzle_dag.progress import Progress, silent

_CURVE_POINTS = 50
_ROWS_PER_EVALUATION = 8
_TOKENS_PER_CHUNK = 1024  # what a variant's intermediate tensors stay in a core's cache with


@dataclass(frozen=True, slots=True)
class Losses:
    """Normalised losses of a variant on the held-out rows."""

    block: float
    """MSE(o_parent, o_child) / MSE(o_parent, 0): the paper's."""
    branch: float
    """The same error over what the block adds to its input: 1 is a block that does nothing at all."""


@dataclass(slots=True)
class Distilled:
    """What became of one variant."""

    state: State
    """Tensors by layer-relative name, in the parent's type; those of the better of start and end. Empty for a no-op."""
    initial: Losses
    """As initialised."""
    trained: Losses
    """After training; as initialised where nothing was trained."""
    kept: Literal["trained", "initialised"]
    """Which of the two `state` is: training is undone where the held-out loss did not fall."""
    curve: list[tuple[int, float]] = field(default_factory=list)
    """(tokens, training loss) at up to 50 points."""
    num_tokens: int = 0
    """Tokens it was trained on, epochs counted."""
    seconds: float = 0.0
    """Time spent on this variant alone; what is shared is spread evenly."""


def row_order(num_rows: int, num_needed: int, seed: int) -> Tensor:
    """Return int64 [num_needed] row indices: epochs of all rows, each shuffled anew; a pure function of its arguments."""
    generator = torch.Generator().manual_seed(seed)
    epochs = [torch.randperm(num_rows, generator=generator) for _ in range(-(-num_needed // num_rows))]
    return torch.cat(epochs)[:num_needed]


@torch.no_grad()
def held_out_losses(layer: ParentLayer, modules: Mapping[Variant, nn.Module | None], cache: ActivationCache) -> dict[Variant, Losses]:
    """Return each variant's losses on the held-out rows; None stands for a no-op."""
    error = {variant: torch.zeros((), dtype=torch.float64) for variant in modules}
    block = branch = torch.zeros((), dtype=torch.float64)
    num_rows = cache.num_rows("train")
    for start in range(num_rows - held_out_rows(cache), num_rows, _ROWS_PER_EVALUATION):
        states = layer.run(cache.hidden("train", layer.layer, start=start, stop=min(start + _ROWS_PER_EVALUATION, num_rows)))
        block, branch = block + states.output_squares().double().cpu(), branch + states.branch_squares().double().cpu()
        for variant, module in modules.items():
            error[variant] += layer.error(states, variant, module).double().cpu()
    return {variant: Losses((e / block).item(), (e / branch).item()) for variant, e in error.items()}


def _thin(losses: list[float], tokens_per_step: int) -> list[tuple[int, float]]:
    """Return up to 50 points (tokens, mean loss since the last point)."""
    stride = max(1, -(-len(losses) // _CURVE_POINTS))
    points = []
    for start in range(0, len(losses), stride):
        window = losses[start : start + stride]
        points.append(((start + len(window)) * tokens_per_step, sum(window) / len(window)))
    return points


def _train(layer: ParentLayer, students: list[Student], cache: ActivationCache, settings: LibrarySettings, progress: Progress) -> int:
    """Train all students in one pass; returns the tokens that each saw."""
    row_length = cache.tokens("train").shape[1]
    tokens_per_step = settings.rows_per_step * row_length
    num_steps = -(-settings.num_tokens // tokens_per_step)
    order = row_order(cache.num_rows("train") - held_out_rows(cache), num_steps * settings.rows_per_step, settings.seed)
    rows_per_chunk = max(1, _TOKENS_PER_CHUNK // row_length)
    for step, rows in enumerate(order.split(settings.rows_per_step)):
        batch = [layer.run(chunk) for chunk in cache.gather("train", layer.layer, rows).split(rows_per_chunk)]
        total = torch.stack([states.output_squares() for states in batch]).sum()
        for student in students:
            started = time.perf_counter()
            student.accumulate(batch, total)
            student.update(learning_rate_factor(step, num_steps))
            student.seconds += time.perf_counter() - started
        progress((step + 1) * tokens_per_step, num_steps * tokens_per_step, "tokens")
    return num_steps * tokens_per_step


def distill_pieces(
    layer: ParentLayer,
    initial: Mapping[Variant, State],
    cache: ActivationCache,
    settings: LibrarySettings,
    *,
    store_dtype: torch.dtype,
    progress: Progress = silent,
) -> dict[Variant, Distilled]:
    """Train variants of one layer together, each as if it were alone.

    Args:
        layer: the parent's frozen layer, in the compute type.
        initial: variant -> where it starts, float32, by layer-relative name; empty for a no-op, which is only judged.
        cache: the activations; the last tenth of the train rows is held out to judge by.
        settings: tokens, batch, learning rate and seed; 0 tokens leave the variants as initialised.
        store_dtype: type of the returned tensors; losses are those of the tensors as rounded to it.
        progress: told the tokens done.

    Raises:
        ValueError: the activations have one row only.
    """
    started = time.perf_counter()
    rounded = {v: {name: t.to(store_dtype) for name, t in state.items()} for v, state in initial.items()}
    before = held_out_losses(layer, {v: layer.build(v, s) if s else None for v, s in rounded.items()}, cache)
    results = {v: Distilled(rounded[v], before[v], before[v], "initialised") for v in initial}
    students = [Student(layer, variant, state, settings.learning_rate) for variant, state in initial.items() if state]
    if settings.num_tokens and students:
        num_tokens = _train(layer, students, cache, settings, progress)
        trained = {s.variant: {name: t.to(store_dtype) for name, t in s.state().items()} for s in students}
        after = held_out_losses(layer, {v: layer.build(v, state) for v, state in trained.items()}, cache)
        for student in students:
            result = results[student.variant]
            result.trained, result.num_tokens, result.seconds = after[student.variant], num_tokens, student.seconds
            result.curve = _thin([loss.item() for loss in student.losses], num_tokens // len(student.losses))
            if result.trained.block < result.initial.block:
                result.state, result.kept = trained[student.variant], "trained"
    shared_s = time.perf_counter() - started - sum(s.seconds for s in students)
    for result in results.values():
        result.seconds += shared_s / len(results)
    return results
