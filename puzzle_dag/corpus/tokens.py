"""Rows of tokens for each purpose, none of which shares text with another's, from the bundled corpus or your own text.

A text file belongs to one purpose, by a hash of its name, so growing one budget never takes from another, and a
larger budget begins with the rows of the smaller one.
"""

import hashlib
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from puzzle_dag.config import BundledCorpus, TextCorpus
from puzzle_dag.corpus.mixture import skill_lines
from puzzle_dag.corpus.skills import build_skills
from puzzle_dag.corpus.stdlib import read_stdlib
from puzzle_dag.corpus.world import build_world

VERSION = 2
"""Version of the streams; part of the asset's code version."""

Purpose = Literal["train", "score", "uptrain", "heldout", "grade"]
"""What text is for: training variants, scoring blocks, healing children, measuring divergence, lm-eval's items."""

Shares = tuple[tuple[Purpose, int], ...]

# Per cent of a split's files. The parent was trained on the library's train split; nothing was on its held-out split.
_TRAIN_SHARES: Shares = (("train", 40), ("uptrain", 60))
_HELDOUT_SHARES: Shares = (("score", 20), ("heldout", 12), ("grade", 68))
# A data set's held-out split: lm-eval brings its own items.
_HUB_HELDOUT_SHARES: Shares = (("score", 60), ("heldout", 40))
_TEXT_SHARES: Shares = (("train", 42), ("uptrain", 42), ("score", 10), ("heldout", 6))

_CHARACTERS_PER_TOKEN = 2


class CorpusTooShortError(ValueError):
    """There is less text for a purpose than its token budget asks for."""


def purpose_of(name: str, shares: Shares) -> Purpose:
    """Return the purpose of a file (or document) from a hash of its name; `shares` are per cent and sum to 100."""
    bucket = int.from_bytes(hashlib.sha256(f"purpose/{name}".encode()).digest()[:4], "big") % 100
    for purpose, share in shares:
        bucket -= share
        if bucket < 0:
            return purpose
    raise AssertionError(f"shares sum to less than 100: {shares}")


def read_stdlib_for(purpose: Purpose) -> Iterator[tuple[str, str]]:
    """Yield `(relative path, text)` of the standard library's files for a purpose, in sorted order."""
    split: Literal["train", "heldout"] = "train" if purpose in ("train", "uptrain") else "heldout"
    shares = _TRAIN_SHARES if split == "train" else _HELDOUT_SHARES
    return ((name, text) for name, text in read_stdlib(split) if purpose_of(name, shares) == purpose)


def _read_files(pattern: str, root: Path, purpose: Purpose, rng: random.Random) -> Iterator[str]:
    paths = sorted(p for p in root.glob(pattern) if p.is_file())
    if not paths:
        raise CorpusTooShortError(f"corpus.files: {pattern!r} matches no file below {root}; correct the pattern")
    mine = [p for p in paths if purpose_of(p.relative_to(root).as_posix(), _TEXT_SHARES) == purpose]
    rng.shuffle(mine)
    for path in mine:
        yield path.read_text(encoding="utf-8")


def _read_hub(corpus: TextCorpus, purpose: Purpose) -> Iterator[str]:
    """Yield a data set's texts in its own order: held-out purposes from its validation or test split where it has one."""
    import datasets  # takes seconds to import, and most runs need no data set

    assert corpus.hub is not None
    splits = datasets.get_dataset_split_names(corpus.hub, corpus.subset)
    heldout = next((s for s in ("validation", "test") if s in splits), None)
    split, shares = "train", _TEXT_SHARES
    if heldout is not None and "train" in splits:
        training = purpose in ("train", "uptrain")
        split, shares = ("train", _TRAIN_SHARES) if training else (heldout, _HUB_HELDOUT_SHARES)
    for index, document in enumerate(datasets.load_dataset(corpus.hub, corpus.subset, split=split, streaming=True)):
        if corpus.text_field not in document:
            raise ValueError(f"corpus.text_field: {corpus.text_field!r} is no column of {corpus.hub}; there are {sorted(document)}")
        if purpose_of(str(index), shares) == purpose:
            yield document[corpus.text_field]


def _encode_pieces(texts: Iterator[str], tokenizer: Any, piece: int) -> Iterator[list[int]]:
    """Yield pieces of at most `piece` tokens of each text, each closed by the end token."""
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        for start in range(0, len(ids), piece):
            yield [*ids[start : start + piece], tokenizer.eos_token_id]


def _shuffled_code(purpose: Purpose, num_characters: int, rng: random.Random) -> list[str]:
    """Return a purpose's library code in random order, cut at line ends into passages of some `num_characters`."""
    passages = []
    for _, text in read_stdlib_for(purpose):
        lines: list[str] = []
        length = 0
        for line in text.splitlines(keepends=True):
            lines.append(line)
            length += len(line)
            if length >= num_characters:
                passages.append("".join(lines))
                lines, length = [], 0
        passages.append("".join(lines))
    rng.shuffle(passages)
    return [p for p in passages if p]


def _skill_documents(world_seed: int, tokenizer: Any, rng: random.Random) -> Iterator[list[int]]:
    for lines in skill_lines(build_skills(build_world(world_seed)), rng):
        for ids in tokenizer(lines, add_special_tokens=False)["input_ids"]:
            yield [*ids, tokenizer.eos_token_id]


def _fill_rows(
    sources: list[tuple[float, Iterator[list[int]]]], prefix: list[int], num_rows: int, row_length: int, rng: random.Random
) -> list[list[int]]:
    """Pack documents of several sources, in the stated shares of tokens, into rows; stop early where one runs dry.

    A document that doesn't fit is cut off at the row's end: every row starts at the start of a document, as a prompt does.
    """
    rows: list[list[int]] = []
    row, num_kept = list(prefix), [0] * len(sources)
    while len(rows) < num_rows:
        total = sum(num_kept) + 1
        # the source that is furthest behind its share; the noise breaks up the regular order and averages out
        behind = {
            i: share * total - kept + rng.random() * row_length
            for i, ((share, _), kept) in enumerate(zip(sources, num_kept, strict=True))
            if share > 0
        }
        chosen = max(behind, key=behind.__getitem__)
        document = next(sources[chosen][1], None)
        if document is None:
            break
        taken = document[: row_length - len(row)]
        num_kept[chosen] += len(taken)
        row += taken
        if len(row) == row_length:
            rows.append(row)
            row = list(prefix)
    return rows


def build_tokens(
    corpus: BundledCorpus | TextCorpus,
    tokenizer: Any,
    *,
    num_tokens: int,
    row_length: int,
    purpose: Purpose,
    seed: int,
    root: Path,
) -> Tensor:
    """Return token ids for one purpose, int64 [num_tokens // row_length, row_length], deterministic in its arguments.

    The bundled corpus draws its skill lines from a random stream a purpose, and its library code from files a purpose.

    Args:
        corpus: the profile's corpus.
        tokenizer: the parent's fast tokenizer; rows start with its start token where it adds one to every text.
        num_tokens: the budget, rounded down to whole rows; 0 gives no rows.
        row_length: tokens a row.
        purpose: what the tokens are for.
        seed: seed of the random stream.
        root: the project's root, which file patterns are relative to.

    Raises:
        CorpusTooShortError: there is too little text; the message says how much there is. Nothing is repeated silently.
        ValueError: the budget is negative or less than a row, or the data set lacks the text column.
    """
    if num_tokens < 0 or 0 < num_tokens < row_length:
        raise ValueError(f"tokens: a budget of {num_tokens} is less than one row; give 0, or at least row_length={row_length}")
    rng = random.Random(f"{purpose}/{seed}")
    prefix: list[int] = tokenizer("")["input_ids"] if tokenizer.bos_token_id is not None else []
    prefix = [i for i in prefix if i == tokenizer.bos_token_id]
    if isinstance(corpus, BundledCorpus):
        # passages of about half a row; encoded only as far as they are needed
        passages = _shuffled_code(purpose, _CHARACTERS_PER_TOKEN * row_length // 2, random.Random(f"code/{purpose}/{seed}"))
        code = _encode_pieces(iter(passages), tokenizer, row_length // 2)
        skills = _skill_documents(corpus.world_seed, tokenizer, random.Random(f"skills/{purpose}/{seed}"))
        sources = [(corpus.skill_share, skills), (1 - corpus.skill_share, code)]
        fix = "raise corpus.skill_share (skill lines never run out)"
    else:
        texts = _read_hub(corpus, purpose) if corpus.files is None else _read_files(corpus.files, root, purpose, rng)
        sources = [(1.0, _encode_pieces(texts, tokenizer, row_length - len(prefix)))]
        fix = "add text (in several files: each goes to one purpose by its name)"
    num_rows = num_tokens // row_length
    rows = _fill_rows(sources, prefix, num_rows, row_length, rng)
    if len(rows) < num_rows:
        raise CorpusTooShortError(
            f"tokens: the budget for {purpose!r} is {num_tokens} tokens, the corpus gives {len(rows) * row_length}; "
            f"lower the budget, or {fix}"
        )
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, row_length)
