"""lm-eval's own Hugging Face model, made faster where a question's choices share their context.

lm-eval runs the context once a choice. Here a question is one row: the context, then every choice, each of which
sees the context and itself (a tree-shaped attention mask). The log-likelihoods are the same.
"""

from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from torch.nn import functional

from puzzle_dag.model.modeling_puzzle_dag import PuzzleDagForCausalLM
from puzzle_dag.progress import Progress, silent

_Request = tuple[tuple[str, str] | None, list[int], list[int]]
_Answer = tuple[float, bool]


class SharedContextLM(HFLM):  # type: ignore[misc]
    """`HFLM` over one of our models that computes each context once."""

    def __init__(self, model: PuzzleDagForCausalLM, tokenizer: Any, *, batch_size: int, progress: Progress = silent) -> None:
        """Grade `model` as it is loaded (dtype, device); `batch_size` is questions a forward pass."""
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=model.config.max_position_embeddings)
        self.progress = progress

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[_Answer]:
        """Return (log-likelihood, is greedy) of each continuation; lm-eval's own code, without its progress bar."""
        answers: list[_Answer] = super().loglikelihood(requests, disable_tqdm=True)
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of whole documents; lm-eval's own code, without its progress bar."""
        values: list[float] = super().loglikelihood_rolling(requests, disable_tqdm=True)
        self.progress(len(requests), len(requests), "documents")
        return values

    def _loglikelihood_tokens(
        self, requests: Sequence[_Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[_Answer]:
        """Answer (log-likelihood, is greedy) to each (context, continuation), in order."""
        window = self.model.config.sliding_window or self.max_length
        groups: dict[tuple[int, ...], list[int]] = {}
        for index, (_, context, _) in enumerate(requests):
            groups.setdefault(tuple(context), []).append(index)
        num_tokens = {key: len(key) + sum(len(requests[i][2]) - 1 for i in members) for key, members in groups.items()}
        is_rolling = requests[0][0] is None
        if is_rolling or any(len(context) + len(continuation) > window for _, context, continuation in requests):
            # documents have no context to share, and what must be truncated is truncated lm-eval's way
            plain: list[_Answer] = super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)
            return plain
        order = sorted(groups, key=num_tokens.__getitem__, reverse=True)
        answers: list[_Answer | None] = [None] * len(requests)
        num_done = 0
        for start in range(0, len(order), int(self.batch_size)):
            keys = order[start : start + int(self.batch_size)]
            continuations = [[requests[i][2] for i in groups[key]] for key in keys]
            for key, values in zip(keys, score_choices(self.model, keys, continuations), strict=True):
                for index, value in zip(groups[key], values, strict=True):
                    answers[index] = value
                num_done += len(values)
            self.progress(num_done, len(requests), "choices")
        assert all(a is not None for a in answers)
        return [a for a in answers if a is not None]


def _pack(context: Sequence[int], continuations: Sequence[Sequence[int]]) -> tuple[list[int], list[int], list[int], list[tuple[int, int]]]:
    """Lay a question out as one row.

    Returns tokens, positions, branch of each token (-1 for the context), and for each predicted token the pair
    (index of the token that predicts it, the predicted token).
    """
    tokens, positions, branches = list(context), list(range(len(context))), [-1] * len(context)
    predicted = []
    for branch, continuation in enumerate(continuations):
        before = len(context) - 1
        for offset, token in enumerate(continuation):
            predicted.append((before, token))
            if offset < len(continuation) - 1:  # the last token predicts nothing, so it needs no place
                before = len(tokens)
                tokens.append(token)
                positions.append(len(context) + offset)
                branches.append(branch)
    return tokens, positions, branches, predicted


def _tree_mask(branches: Tensor) -> Tensor:
    """Return [rows, 1, length, length]: who may look at whom. `branches` is [rows, length], -2 for padding."""
    length = branches.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=branches.device).tril()
    of_context = (branches == -1)[:, None, :]
    same_branch = branches[:, :, None] == branches[:, None, :]
    return (causal & (of_context | same_branch))[:, None]


@torch.inference_mode()
def score_choices(
    model: PuzzleDagForCausalLM, contexts: Sequence[Sequence[int]], continuations: Sequence[Sequence[Sequence[int]]]
) -> list[list[_Answer]]:
    """Return (log-likelihood, is greedy) of every continuation of every context.

    Args:
        model: the model, in eval mode.
        contexts: token ids of each question, none empty.
        continuations: for each question the token ids of its choices, none empty.
    """
    packed = [_pack(c, choices) for c, choices in zip(contexts, continuations, strict=True)]
    length = max(len(p[0]) for p in packed)

    def pad(column: int, value: int) -> Tensor:
        return torch.tensor([[*p[column], *[value] * (length - len(p[0]))] for p in packed], device=model.device)

    mask = _tree_mask(pad(2, -2))
    hidden = model.model(input_ids=pad(0, 0), position_ids=pad(1, 0), attention_mask=mask, use_cache=False).last_hidden_state
    rows = torch.tensor([row for row, p in enumerate(packed) for _ in p[3]], device=model.device)
    places = torch.tensor([place for p in packed for place, _ in p[3]], device=model.device)
    wanted = torch.tensor([token for p in packed for _, token in p[3]], device=model.device)
    logp = functional.log_softmax(model.lm_head(hidden[rows, places]).float(), -1)
    gained = logp.gather(-1, wanted[:, None])[:, 0].tolist()
    greedy = (logp.argmax(-1) == wanted).tolist()
    answers: list[list[_Answer]] = []
    start = 0
    for choices in continuations:
        answers.append([])
        for choice in choices:
            end = start + len(choice)
            answers[-1].append((sum(gained[start:end]), all(greedy[start:end])))
            start = end
    return answers
