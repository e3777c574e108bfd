"""Streams of tokens: skill lines and library files, in stated shares, packed into rows that start at a document."""

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from puzzle_dag.corpus.skills import Skill
from puzzle_dag.corpus.stdlib import Split, read_stdlib

Encode = Callable[[list[str]], list[list[int]]]
Tokens = npt.NDArray[np.int32]

_LINES_PER_DRAW = 256


def skill_lines(skills: tuple[Skill, ...], rng: random.Random) -> Iterator[list[str]]:
    """Yield batches of skill lines without end, drawn by weight."""
    weights = [s.weight for s in skills]
    while True:
        yield [s.line(rng) for s in rng.choices(skills, weights, k=_LINES_PER_DRAW)]


def _draw_skill_tokens(skills: tuple[Skill, ...], encode: Encode, end: int, num_tokens: int, rng: random.Random) -> list[list[int]]:
    documents, total = [], 0
    for lines in skill_lines(skills, rng):
        for ids in encode(lines):
            documents.append([*ids, end])
            total += len(ids) + 1
        if total >= num_tokens:
            return documents
    raise AssertionError("skill_lines never ends")


def _draw_stdlib_tokens(encode: Encode, end: int, num_tokens: int, piece: int, split: Split, rng: random.Random) -> list[list[int]]:
    """Cut every library file into pieces of `piece` tokens and draw epochs of them until there are enough."""
    texts = [text for _, text in read_stdlib(split)]
    pieces = [[*ids[i : i + piece], end] for ids in encode(texts) for i in range(0, len(ids), piece)]
    documents: list[list[int]] = []
    total = 0
    while total < num_tokens:
        rng.shuffle(pieces)
        for p in pieces:
            documents.append(p)
            total += len(p)
            if total >= num_tokens:
                break
    return documents


def pack_rows(documents: list[list[int]], row_length: int) -> Tokens:
    """Pack documents into rows of `row_length` tokens; what does not fit into a row is cut off, never split over two.

    Each row therefore starts at the start of a document, as a prompt does. Returns int32 [rows, row_length].
    """
    rows, row = [], []
    for document in documents:
        row.extend(document)
        if len(row) >= row_length:
            rows.append(row[:row_length])
            row = []
    return np.asarray(rows, dtype=np.int32).reshape(-1, row_length)


def mix_tokens(
    tokenizer: Any, skills: tuple[Skill, ...], *, num_tokens: int, row_length: int, skill_share: float, split: Split, seed: int
) -> Tokens:
    """Return int32 [num_tokens // row_length, row_length] of mixed documents, deterministic in its arguments.

    Args:
        tokenizer: a fast transformers tokenizer.
        skills: the graded skills; drawn by weight.
        num_tokens: tokens to return, rounded down to whole rows.
        row_length: tokens a row.
        skill_share: share of tokens that comes from the skills; the rest is standard-library code.
        split: which library files; skill lines are drawn from disjoint random streams a split.
        seed: every stage takes its own, so that no stage sees another's lines.
    """
    rng = random.Random(f"{split}/{seed}")

    def encode(texts: list[str]) -> list[list[int]]:
        ids: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
        return ids

    end = tokenizer.eos_token_id
    surplus = int(1.25 * num_tokens) + 4 * row_length  # packing cuts off the tail of each row's last document
    documents = _draw_skill_tokens(skills, encode, end, int(skill_share * surplus), rng)
    if skill_share < 1:
        documents += _draw_stdlib_tokens(encode, end, int((1 - skill_share) * surplus), row_length // 2, split, rng)
    rng.shuffle(documents)
    rows = pack_rows(documents, row_length)[: num_tokens // row_length]
    if len(rows) < num_tokens // row_length:
        raise ValueError(f"corpus too short: num_tokens={num_tokens} asked, {rows.size} packed; lower the budget or add text")
    return rows
