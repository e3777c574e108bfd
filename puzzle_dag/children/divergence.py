"""How far a child is from its parent on text that neither was fitted to: KL divergence, loss, agreement."""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from puzzle_dag.progress import Progress, silent

VERSION = 1
"""Version of what is measured; part of the asset's code version."""


class _Output(Protocol):
    logits: Tensor


class LanguageModel(Protocol):
    """Anything that maps token ids to logits, as transformers' causal models do."""

    def __call__(self, input_ids: Tensor) -> _Output:
        """Return an object whose `logits` are [rows, row_length, vocab]."""
        ...


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over rows with its standard error; rows, not tokens, are independent of each other."""

    mean: float
    """Mean over the rows."""
    stderr: float
    """Standard deviation over the rows, divided by the root of their number."""


@dataclass(frozen=True, slots=True)
class Divergence:
    """How a child differs from its parent on the same tokens."""

    kl: Estimate
    """KL(parent || child), nats a token."""
    lm_loss: Estimate
    """The child's next-token cross-entropy, nats a token."""
    parent_lm_loss: Estimate
    """The parent's."""
    top1_agreement: Estimate
    """Share of positions at which both prefer the same token."""
    num_tokens: int
    """Tokens compared."""


def estimate(values: Tensor) -> Estimate:
    """Return mean and standard error of one value a row, [rows]; the error of a single row is not a number."""
    spread = float(values.double().std()) if len(values) > 1 else math.nan
    return Estimate(float(values.double().mean()), spread / math.sqrt(len(values)))


@torch.inference_mode()
def measure_divergence(
    parent: LanguageModel, child: LanguageModel, rows: Tensor, *, rows_per_batch: int = 8, progress: Progress = silent
) -> Divergence:
    """Compare a child with its parent, both in the dtype they are loaded in; softmaxes in float32.

    Args:
        parent: the parent's model.
        child: the child's model, of the same vocabulary.
        rows: held-out token ids, int64 [rows, row_length].
        rows_per_batch: rows a forward pass.
        progress: told of the tokens compared.

    Raises:
        ValueError: `rows` is empty or rows are too short to predict a token.
    """
    if rows.ndim != 2 or rows.shape[0] == 0 or rows.shape[1] < 2:
        raise ValueError(f"rows: shape {tuple(rows.shape)} can't be compared; give at least one row of two tokens")
    columns: dict[str, list[Tensor]] = {"kl": [], "child": [], "parent": [], "top1": []}
    for start in range(0, len(rows), rows_per_batch):
        batch = rows[start : start + rows_per_batch]
        logp = functional.log_softmax(parent(input_ids=batch).logits.float(), -1)
        logq = functional.log_softmax(child(input_ids=batch).logits.float(), -1)
        following = batch[:, 1:, None]
        columns["parent"].append(-logp[:, :-1].gather(-1, following).mean((1, 2)))
        columns["child"].append(-logq[:, :-1].gather(-1, following).mean((1, 2)))
        columns["top1"].append((logp.argmax(-1) == logq.argmax(-1)).float().mean(1))
        columns["kl"].append((logp.exp() * (logp - logq)).sum(-1).mean(1))
        progress(min(start + rows_per_batch, len(rows)) * rows.shape[1], rows.numel(), "tokens")
    values = {name: estimate(torch.cat(parts)) for name, parts in columns.items()}
    return Divergence(values["kl"], values["child"], values["parent"], values["top1"], rows.numel())
