"""The local lm-eval tasks: graded skills, and a cloze and perplexity on standard-library code nobody trained on.

Each task is a YAML file beside its JSON-lines data, so that `lm_eval --include_path FOLDER --tasks skill_copy`
reads them as well. Parent and children are graded on the same items, a pure function of the seed.
"""

import bisect
import json
import keyword
import random
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from puzzle_dag.config.profile import BUNDLED_TASK_PREFIXES, ask_python_library
from puzzle_dag.corpus.skills import Item, build_skills, choose
from puzzle_dag.corpus.tokens import read_stdlib_for
from puzzle_dag.corpus.world import build_world
from puzzle_dag.store import fingerprint, write_atomically

VERSION = 3
"""Version of the items; part of the asset's code version."""

CLOZE = "stdlib_cloze"
PERPLEXITY = "stdlib_perplexity"
SKILL_PREFIX = "skill_"

_MAX_DOCUMENTS = 64
_DOCUMENTS_PER_FILE = 4
_DOCUMENT_CHARACTERS = 700
_MIN_CLOZE_LINES = 4
_MAX_CLOZE_CHARACTERS = 320
# What follows is punctuation or an operator: code rather than prose. After punctuation a leading underscore would be one token with it.
_IDENTIFIER = re.compile(r"(?:(?<= )[A-Za-z_]|(?<=[.(\[])[A-Za-z])[A-Za-z0-9_]{2,}(?=[(.\[:,)=\]}]| [=+*/%<>!-])")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{2,}")


class UnknownTaskError(ValueError):
    """A local task that there is no generator for."""


@dataclass(frozen=True, slots=True)
class TaskFiles:
    """A folder of local tasks."""

    folder: Path
    """Folder for lm-eval's `include_path`."""
    names: tuple[str, ...]
    """The tasks in it."""
    digest: str
    """Digest of all items and task definitions, free of paths."""


def is_local(name: str) -> bool:
    """Say whether a task is one of ours; every other name is looked up among lm-eval's own."""
    return name.startswith(BUNDLED_TASK_PREFIXES)


def item_sources(names: Collection[str]) -> dict[str, str]:
    """Return what the items of local tasks are drawn from, beside this module's VERSION, their settings and seeds.

    That is the digest of the library's files for grading, where one of the tasks is drawn from them: another Python has
    another library, and then the same settings give other items. It takes a third of a second; drawing the items takes many.
    """
    if not ask_python_library(names):
        return {}
    return {"library": fingerprint([[name, fingerprint(text)] for name, text in read_stdlib_for("grade")])}


def skill_items(name: str, num_items: int, world_seed: int, seed: int) -> list[Item]:
    """Return the questions of a `skill_` task. Raises UnknownTaskError where there is no such skill."""
    skills = {s.name: s for s in build_skills(build_world(world_seed))}
    skill = skills.get(name.removeprefix(SKILL_PREFIX))
    if skill is None:
        there = ", ".join([*(SKILL_PREFIX + s for s in skills), CLOZE, PERPLEXITY])
        raise UnknownTaskError(f"accuracy.tasks: {name!r} is unknown; the local tasks are {there}")
    rng = random.Random(f"lm-eval/{name}/{seed}")
    return [skill.item(rng) for _ in range(num_items)]


def _cloze_questions(text: str, rng: random.Random) -> Iterator[Item]:
    """Yield questions on one file: which identifier comes next, among four that the lines before hold."""
    starts = [0, *(m.end() for m in re.finditer("\n", text))]
    places = list(_IDENTIFIER.finditer(text))
    rng.shuffle(places)
    for place in places:
        line = bisect.bisect_right(starts, place.start()) - 1
        right = place.group()
        first = bisect.bisect_left(starts, place.start() - 1 - _MAX_CLOZE_CHARACTERS)
        if line - first < _MIN_CLOZE_LINES or keyword.iskeyword(right) or "#" in text[starts[line] : place.start()]:
            continue
        separator = " " if text[place.start() - 1] == " " else ""
        context = text[starts[first] : place.start() - len(separator)]
        seen = [w for w in dict.fromkeys(_NAME.findall(context)) if not keyword.iskeyword(w)]
        others = [w for w in seen if w != right and (separator or w[0] != "_")]
        # The right answer must have been seen, like the wrong ones: otherwise novelty alone gives it away. They are
        # of like length, because shorter answers are likelier whatever the model.
        if right in seen and len(others) >= 3:
            others.sort(key=lambda w: (abs(len(w) - len(right)), rng.random()))
            yield choose(rng, context, right, others[:3], separator)


def _cloze_items(num_items: int, seed: int) -> list[Item]:
    """Draw questions from all files in turn, so that none dominates."""
    rng = random.Random(f"lm-eval/{CLOZE}/{seed}")
    items: dict[tuple[str, str], Item] = {}  # some files repeat themselves
    files = [_cloze_questions(text, rng) for _, text in read_stdlib_for("grade")]
    while len(items) < num_items and files:
        drawn = [next(questions, None) for questions in files]
        files = [f for f, item in zip(files, drawn, strict=True) if item is not None]
        items |= {(item.context, item.choices[item.answer]): item for item in drawn if item is not None}
    if len(items) < num_items:
        raise ValueError(f"accuracy.num_items: {num_items} asked, the held-out library gives {len(items)} cloze items; ask for fewer")
    chosen = list(items.values())
    rng.shuffle(chosen)
    return chosen[:num_items]


def _perplexity_documents(seed: int) -> list[str]:
    rng = random.Random(f"lm-eval/{PERPLEXITY}/{seed}")
    pieces: list[str] = []
    for _, text in read_stdlib_for("grade"):
        starts = [m.end() for m in re.finditer("\n\n", text) if m.end() + _DOCUMENT_CHARACTERS <= len(text)]
        pieces.extend(text[s : s + _DOCUMENT_CHARACTERS] for s in sorted(rng.sample(starts, min(_DOCUMENTS_PER_FILE, len(starts)))))
    rng.shuffle(pieces)
    return pieces[:_MAX_DOCUMENTS]


def _rows(name: str, num_items: int, world_seed: int, seed: int) -> list[dict[str, Any]]:
    if name == PERPLEXITY:
        return [{"text": text} for text in _perplexity_documents(seed)]
    items = _cloze_items(num_items, seed) if name == CLOZE else skill_items(name, num_items, world_seed, seed)
    return [{"context": i.context, "choices": list(i.choices), "answer": i.answer} for i in items]


def _definition(name: str) -> dict[str, Any]:
    """Return the task's definition without its data."""
    common = {"task": name, "dataset_path": "json", "test_split": "test", "metadata": {"version": VERSION}}
    if name == PERPLEXITY:
        metric = {"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False}
        return common | {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "text", "metric_list": [metric]}
    return common | {
        "output_type": "multiple_choice",
        "doc_to_text": "context",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "target_delimiter": "",
        "num_fewshot": 0,
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }


def draw_tasks(
    names: Sequence[str], *, num_items: int, world_seed: int, task_items: Mapping[str, int] | None = None, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """Return the items ("rows") and the "definition" of each local one of `names`.

    Args:
        names: task names as in a profile.
        num_items: items a multiple-choice task.
        task_items: items of single tasks, in place of `num_items`.
        world_seed: seed of the invented world that the skills ask about; the parent's.
        seed: seed of the items.

    Raises:
        UnknownTaskError: a `skill_` task that there is no skill for.
        ValueError: the held-out library has fewer cloze items than asked for.
    """
    return {
        name: {"rows": _rows(name, (task_items or {}).get(name, num_items), world_seed, seed), "definition": _definition(name)}
        for name in names
        if is_local(name)
    }


def write_tasks(
    names: Sequence[str],
    folder: Path,
    *,
    num_items: int,
    world_seed: int,
    task_items: Mapping[str, int] | None = None,
    seed: int = 0,
) -> TaskFiles:
    """Write the local ones of `names` into `folder`, each file atomically; hub tasks are left to lm-eval.

    The other arguments and the errors are those of `draw_tasks`.
    """
    content = draw_tasks(names, num_items=num_items, world_seed=world_seed, task_items=task_items, seed=seed)
    for name, task in content.items():
        rows, definition = task["rows"], task["definition"]
        data = (folder / f"{name}.jsonl").resolve()
        write_atomically(data, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        located = definition | {"dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str((folder / "cache").resolve())}}
        write_atomically(folder / f"{name}.yaml", yaml.safe_dump(located, sort_keys=False))
    return TaskFiles(folder, tuple(content), fingerprint(content))
