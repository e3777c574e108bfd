"""Divergence of a child's next-token distributions from the parent's, summed over tokens in few passes.

Logits come in the compute dtype and are turned into float32 log-probabilities chunk by chunk, small enough for a
core's cache; a vocabulary-wide tensor is read once for each of its uses and never kept for a whole batch, except
for the parent's probabilities, which all pairs of a row batch are compared with.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

_CHUNK_ELEMENTS = 1 << 20


def _log_probabilities(head: nn.Linear, normed: Tensor) -> Tensor:
    """Return float32 log-probabilities [tokens, vocab] of normed final states [tokens, hidden]."""
    logits: Tensor = head(normed)
    return torch.log_softmax(logits, dim=-1, dtype=torch.float32)


@dataclass(frozen=True, slots=True)
class _ReferenceChunk:
    probabilities: Tensor
    negative_entropy: Tensor
    top1: Tensor


class Reference:
    """The parent's distributions on a row batch."""

    def __init__(self, head: nn.Linear, normed: Tensor, tokens: Tensor) -> None:
        """Take the parent's normed final states [rows, length, hidden] and the token ids [rows, length]."""
        self.chunk_tokens = max(1, _CHUNK_ELEMENTS // head.out_features)
        # The last token of a row has no next one: the position predicts nothing.
        targets = torch.roll(tokens, -1, dims=1)
        predicts = torch.ones_like(tokens, dtype=torch.bool)
        predicts[:, -1] = False
        self.targets = targets.flatten().split(self.chunk_tokens)
        self.predicts = predicts.flatten().split(self.chunk_tokens)
        self.chunks = [self._chunk(head, states) for states in self.split(normed)]

    def split(self, normed: Tensor) -> tuple[Tensor, ...]:
        """Split states [rows, length, hidden] into chunks of tokens."""
        chunks: tuple[Tensor, ...] = normed.flatten(0, 1).split(self.chunk_tokens)
        return chunks

    @staticmethod
    def _chunk(head: nn.Linear, states: Tensor) -> _ReferenceChunk:
        log_p = _log_probabilities(head, states)
        p = log_p.exp()
        return _ReferenceChunk(p, torch.linalg.vecdot(p, log_p), log_p.argmax(-1))


@dataclass(slots=True)
class ScoreSums:
    """Sums over tokens of KL(parent || child), next-token loss and top-1 agreement."""

    kl: float = 0.0
    lm_loss: float = 0.0
    num_agreeing: int = 0
    num_tokens: int = 0
    num_predictions: int = 0

    def add(self, reference: Reference, head: nn.Linear, normed: Tensor) -> None:
        """Add a child's normed final states [rows, length, hidden], of the same rows as the reference."""
        chunks = zip(reference.chunks, reference.split(normed), reference.targets, reference.predicts, strict=True)
        for parent, states, targets, predicts in chunks:
            log_q = _log_probabilities(head, states)
            # The cross term is taken by the very operation that gave the parent's, so that equal logits give exactly 0.
            kl = parent.negative_entropy - torch.linalg.vecdot(parent.probabilities, log_q)
            losses = -log_q.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
            self.kl += float(kl.sum(dtype=torch.float64))
            self.lm_loss += float((losses * predicts).sum(dtype=torch.float64))
            # The child agrees where nothing is likelier than the parent's choice: a maximum is found ten times as fast as its place.
            self.num_agreeing += int((log_q.gather(-1, parent.top1.unsqueeze(-1)).squeeze(-1) == log_q.amax(-1)).sum())
            self.num_tokens += len(states)
            self.num_predictions += int(predicts.sum())

    def means(self) -> tuple[float, float, float]:
        """Return KL and LM loss in nats a token, and the share of tokens whose top-1 agrees."""
        # Rounding can leave a vanishing KL a hair below 0; NaN must stay NaN.
        kl = self.kl / self.num_tokens
        return 0.0 if kl < 0 else kl, self.lm_loss / max(1, self.num_predictions), self.num_agreeing / self.num_tokens
