import hashlib
import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from puzzle_dag.config import BundledCorpus, TextCorpus
from puzzle_dag.corpus.mixture import mix_tokens
from puzzle_dag.corpus.skills import build_skills
from puzzle_dag.corpus.stdlib import read_stdlib, split_of
from puzzle_dag.corpus.tokens import CorpusTooShortError, Purpose, build_tokens, purpose_of, read_stdlib_for
from puzzle_dag.corpus.world import build_world

PURPOSES: tuple[Purpose, ...] = get_args(Purpose)
FOUR: tuple[Purpose, ...] = ("train", "score", "uptrain", "heldout")


@pytest.fixture(autouse=True, scope="module")
def small_library(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A library of 600 small modules in place of Python's own, which takes seconds to read."""
    folder, rng = tmp_path_factory.mktemp("library"), random.Random(0)
    for i in range(600):
        lines = [f"def f{i}_{j}(x):\n    return x + {rng.randint(0, 10**9)}\n\n" for j in range(60)]
        (folder / f"m{i}.py").write_text("".join(lines))
    with pytest.MonkeyPatch.context() as patch:
        for module in ("mixture", "tokens"):
            patch.setattr(f"puzzle_dag.corpus.{module}.read_stdlib", lambda split: read_stdlib(split, folder))
        yield


def bundled(
    tokenizer: PreTrainedTokenizerFast, purpose: Purpose, num_tokens: int = 16_384, *, share: float = 0.72, seed: int = 0
) -> Tensor:
    corpus = BundledCorpus(kind="bundled", skill_share=share)
    return build_tokens(corpus, tokenizer, num_tokens=num_tokens, row_length=128, purpose=purpose, seed=seed, root=Path())


def documents(tokenizer: PreTrainedTokenizerFast, rows: Tensor) -> list[str]:
    """Whole documents only: the last of a row may be cut off."""
    return [d for row in tokenizer.batch_decode(rows) for d in row.split("<|endoftext|>")[:-1]]


def test_rows_are_deterministic_and_depend_on_seed_and_purpose(micro_tokenizer: PreTrainedTokenizerFast) -> None:
    first = bundled(micro_tokenizer, "train")
    assert first.shape == (128, 128) and first.dtype == torch.int64
    assert int(first.min()) >= 0 and int(first.max()) < len(micro_tokenizer)
    assert torch.equal(first, bundled(micro_tokenizer, "train"))
    assert not torch.equal(first, bundled(micro_tokenizer, "train", seed=1))
    assert not torch.equal(first, bundled(micro_tokenizer, "score"))


def test_a_larger_budget_begins_with_the_smaller_ones_rows(micro_tokenizer: PreTrainedTokenizerFast) -> None:
    small, large = bundled(micro_tokenizer, "uptrain", 4096), bundled(micro_tokenizer, "uptrain", 12_288)
    assert torch.equal(small, large[: len(small)])


def test_no_purpose_shares_code_with_another() -> None:
    files = {p: {name for name, _ in read_stdlib_for(p)} for p in PURPOSES}
    assert all(files.values())
    assert all(files[a].isdisjoint(files[b]) for a, b in itertools.combinations(PURPOSES, 2))
    assert len(set().union(*files.values())) == 600
    heldout = {name for name in set().union(*files.values()) if split_of(name) == "heldout"}
    assert files["score"] | files["heldout"] | files["grade"] == heldout, "what the parent was trained on measures nothing"


def test_long_drawn_lines_are_not_shared_between_purposes(micro_tokenizer: PreTrainedTokenizerFast) -> None:
    """Lines with many possible values; short ones ("sum: 3 + 4 = 7; ...") can't help but meet."""
    names = ("recall:", "facts:", "pattern:")
    drawn = {p: documents(micro_tokenizer, bundled(micro_tokenizer, p, share=1.0)) for p in FOUR}
    long_lines = {p: {line for line in lines if line.startswith(names)} for p, lines in drawn.items()}
    assert all(len(lines) > 40 for lines in long_lines.values())
    assert all(long_lines[a].isdisjoint(long_lines[b]) for a, b in itertools.combinations(FOUR, 2))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.72, 1.0])
def test_share_of_skill_tokens_is_as_asked(share: float, micro_tokenizer: PreTrainedTokenizerFast) -> None:
    names = tuple(f"{s.name}: " for s in build_skills(build_world(7)))
    rows = bundled(micro_tokenizer, "train", 32_768, share=share)
    num_skill = num_all = 0
    for row in micro_tokenizer.batch_decode(rows):
        for document in row.split("<|endoftext|>"):
            length = len(micro_tokenizer(document)["input_ids"]) + 1
            num_all += length
            num_skill += length * document.startswith(names)
    assert num_skill / num_all == pytest.approx(share, abs=0.02)


def test_every_row_starts_with_a_document(micro_tokenizer: PreTrainedTokenizerFast) -> None:
    names = tuple(f"{s.name}: " for s in build_skills(build_world(7)))
    assert all(row.startswith(names) for row in micro_tokenizer.batch_decode(bundled(micro_tokenizer, "score", 4096, share=1.0)))


def test_a_budget_beyond_the_corpus_says_what_there_is(micro_tokenizer: PreTrainedTokenizerFast) -> None:
    message = r"'heldout' is 20000000 tokens, the corpus gives (\d+); lower .* raise corpus.skill_share"
    with pytest.raises(CorpusTooShortError, match=message) as error:
        bundled(micro_tokenizer, "heldout", 20_000_000, share=0.0)
    available = int(str(error.value).split("gives ")[1].split(";")[0])
    assert available > 5_000
    assert bundled(micro_tokenizer, "heldout", available, share=0.0).numel() == available


def test_no_tokens_and_less_than_a_row(micro_tokenizer: PreTrainedTokenizerFast) -> None:
    assert bundled(micro_tokenizer, "uptrain", 0).shape == (0, 128)
    assert bundled(micro_tokenizer, "uptrain", 300).shape == (2, 128)
    for budget in (-5, 100):
        with pytest.raises(ValueError, match=f"budget of {budget} is less than one row"):
            bundled(micro_tokenizer, "uptrain", budget)


@pytest.fixture(scope="module")
def text_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, rng = tmp_path_factory.mktemp("text"), random.Random(0)
    (root / "texts").mkdir()
    for i in range(60):
        (root / f"texts/t{i:02d}.txt").write_text(f"file {i}: " + " ".join(str(rng.randint(0, 999)) for _ in range(200)), encoding="utf-8")
    return root


def test_text_files_go_to_one_purpose_each(text_root: Path, micro_tokenizer: PreTrainedTokenizerFast) -> None:
    corpus = TextCorpus(kind="text", files="texts/*.txt")
    seen: dict[str, set[str]] = {}
    for purpose in FOUR:
        rows = build_tokens(corpus, micro_tokenizer, num_tokens=512, row_length=64, purpose=purpose, seed=0, root=text_root)
        assert rows.shape == (8, 64)
        text = "".join(micro_tokenizer.batch_decode(rows))
        seen[purpose] = {i for i in map(str, range(60)) if f"file {i}:" in text}
        assert seen[purpose]
    assert all(seen[a].isdisjoint(seen[b]) for a, b in itertools.combinations(FOUR, 2))


def test_short_text_and_no_text_are_errors(text_root: Path, micro_tokenizer: PreTrainedTokenizerFast) -> None:
    def build(files: str, num_tokens: int) -> Tensor:
        corpus = TextCorpus(kind="text", files=files)
        return build_tokens(corpus, micro_tokenizer, num_tokens=num_tokens, row_length=64, purpose="score", seed=0, root=text_root)

    with pytest.raises(CorpusTooShortError, match=r"'score' is 10000000 tokens, the corpus gives \d+; lower the budget, or add text"):
        build("texts/*.txt", 10_000_000)
    with pytest.raises(CorpusTooShortError, match=r"'books/\*' matches no file"):
        build("books/*", 128)


def test_rows_begin_with_the_start_token_where_the_tokenizer_adds_one(text_root: Path, micro_tokenizer: PreTrainedTokenizerFast) -> None:
    class StartingTokenizer:
        bos_token_id, eos_token_id = 0, 0

        def __call__(self, text: str, add_special_tokens: bool = True, **_: object) -> dict[str, list[int]]:
            ids = micro_tokenizer(text, add_special_tokens=False)["input_ids"]
            return {"input_ids": [0, *ids] if add_special_tokens else ids}

    corpus = TextCorpus(kind="text", files="texts/*.txt")
    rows = build_tokens(corpus, StartingTokenizer(), num_tokens=1024, row_length=64, purpose="train", seed=0, root=text_root)
    assert (rows[:, 0] == 0).all()
    assert (rows[1, 1:] != 0).sum() > 50


def test_data_sets_are_split_by_their_own_splits(tmp_path: Path, micro_tokenizer: PreTrainedTokenizerFast) -> None:
    """A local folder stands for a hub id: `datasets` reads both alike."""
    folder = tmp_path / "data"
    folder.mkdir()
    for split in ("train", "test"):
        lines = [json.dumps({"body": f"{split} document {i} " + "word " * 30}) for i in range(40)]
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
    corpus = TextCorpus(kind="text", hub=str(folder), text_field="body")
    texts = {}
    for purpose in FOUR:
        rows = build_tokens(corpus, micro_tokenizer, num_tokens=128, row_length=32, purpose=purpose, seed=0, root=tmp_path)
        texts[purpose] = "".join(micro_tokenizer.batch_decode(rows))
    assert all("train document" in texts[p] and "test document" not in texts[p] for p in ("train", "uptrain"))
    assert all("test document" in texts[p] and "train document" not in texts[p] for p in ("score", "heldout"))
    wrong = TextCorpus(kind="text", hub=str(folder))
    with pytest.raises(ValueError, match=r"'text' is no column .* \['body'\]"):
        build_tokens(wrong, micro_tokenizer, num_tokens=128, row_length=32, purpose="train", seed=0, root=tmp_path)


def test_purposes_get_about_their_share_of_names() -> None:
    shares: tuple[tuple[Purpose, int], ...] = (("train", 42), ("uptrain", 42), ("score", 10), ("heldout", 6))
    drawn = [purpose_of(f"file{i}", shares) for i in range(4000)]
    for purpose, share in shares:
        assert drawn.count(purpose) / 4000 == pytest.approx(share / 100, abs=0.025)


class ByteTokenizer:
    """One token a byte: what comes out depends on no tokenizer's version."""

    bos_token_id, eos_token_id = None, 0

    def __call__(self, text: str | list[str], **_: object) -> dict[str, list[int] | list[list[int]]]:
        return {"input_ids": list(text.encode()) if isinstance(text, str) else [list(t.encode()) for t in text]}


def test_the_parents_stream_has_not_changed_and_is_none_of_ours(micro_tokenizer: PreTrainedTokenizerFast) -> None:
    """The bundled parent was trained on this stream; its recipe must keep meaning it."""
    skills = build_skills(build_world(7))
    arguments = {"num_tokens": 4096, "row_length": 128, "skill_share": 1.0, "split": "train", "seed": 0}
    pinned = mix_tokens(ByteTokenizer(), skills, **arguments)  # type: ignore[arg-type]
    assert hashlib.sha256(pinned.astype("<i4").tobytes()).hexdigest()[:16] == "49cc01640531e518"
    parents = set(documents(micro_tokenizer, torch.from_numpy(mix_tokens(micro_tokenizer, skills, **arguments))))  # type: ignore[arg-type]
    ours = {d for d in documents(micro_tokenizer, bundled(micro_tokenizer, "train", share=1.0)) if d.startswith("recall:")}
    assert ours and ours.isdisjoint(parents)
