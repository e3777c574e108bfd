"""Skills whose answers can be graded: text to learn them from, and four-choice questions to grade them with.

Every skill is one line of text, "name: question answer". A `Skill` draws such lines (training) and `Item`s
(grading) from a random generator; both have the same form, so that a question is always a prefix of a line the
model could have been trained on. In-context skills (copy, reverse, recall, pattern, sort) need attention;
knowledge skills (facts, translate, product, sum) live mostly in the FFNs.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

from puzzle_dag.corpus.world import ATTRIBUTES, World

NUM_CHOICES = 4
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True, slots=True)
class Item:
    """One graded question: `choices[answer]` continues `context`; every choice starts with a space."""

    context: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True, slots=True)
class Skill:
    """A skill: `line(rng)` draws a line to learn from, `item(rng)` a question; `weight` is its share of the lines (not of the tokens)."""

    name: str
    weight: float
    line: Callable[[random.Random], str]
    item: Callable[[random.Random], Item]


def choose(rng: random.Random, context: str, right: str, wrong: list[str], separator: str = " ") -> Item:
    """Shuffle one right and `NUM_CHOICES - 1` distinct wrong continuations into an `Item`, each after `separator`."""
    distinct = list(dict.fromkeys(w for w in wrong if w != right))[: NUM_CHOICES - 1]
    if len(distinct) < NUM_CHOICES - 1:
        raise ValueError(f"need {NUM_CHOICES - 1} distinct wrong answers to {context!r}, got {distinct}")
    choices = [right, *distinct]
    rng.shuffle(choices)
    return Item(context, tuple(separator + c for c in choices), choices.index(right))


def _misorderings(rng: random.Random, words: list[str], spare: list[str]) -> list[str]:
    """Near misses of a sequence: two words swapped, or one replaced by a word that belongs elsewhere."""
    wrong = []
    for _ in range(12):
        near = list(words)
        i, j = rng.sample(range(len(near)), 2)
        if rng.random() < 0.5:
            near[i], near[j] = near[j], near[i]
        else:
            near[i] = rng.choice(spare)
        wrong.append(" ".join(near))
    return wrong


def _sequence_skill(
    name: str, weight: float, draw: Callable[[random.Random], list[str]], target: Callable[[list[str]], list[str]], spare: list[str]
) -> Skill:
    """A skill that maps a drawn sequence to another one: "name: x y z = target"."""

    def line(rng: random.Random) -> str:
        words = draw(rng)
        return f"{name}: {' '.join(words)} = {' '.join(target(words))}"

    def item(rng: random.Random) -> Item:
        words = draw(rng)
        right = target(words)
        return choose(rng, f"{name}: {' '.join(words)} =", " ".join(right), _misorderings(rng, right, spare))

    return Skill(name, weight, line, item)


def _lookup_skill(
    name: str,
    weight: float,
    num_pairs: tuple[int, int],
    draw: Callable[[random.Random], tuple[str, str]],
    wrong: Callable[[random.Random, str], list[str]],
) -> Skill:
    """A skill of independent question-answer pairs on a line: "name: q a; q a; q a"."""

    def line(rng: random.Random) -> str:
        pairs = [draw(rng) for _ in range(rng.randint(*num_pairs))]
        return f"{name}: " + "; ".join(f"{q} {a}" for q, a in pairs)

    def item(rng: random.Random) -> Item:
        *shown, (question, answer) = [draw(rng) for _ in range(rng.randint(2, 3))]
        context = f"{name}: " + "".join(f"{q} {a}; " for q, a in shown) + question
        return choose(rng, context, answer, wrong(rng, answer))

    return Skill(name, weight, line, item)


def _recall_skill(world: World, weight: float) -> Skill:
    """In-context key-value recall: "recall: fox red, dog blue; dog blue; fox red"."""

    def draw(rng: random.Random) -> tuple[list[str], dict[str, str]]:
        num_pairs = rng.randint(4, 7)
        words = rng.sample(world.nouns, 2 * num_pairs)
        return words[:num_pairs], dict(zip(words[:num_pairs], words[num_pairs:], strict=True))

    def line(rng: random.Random) -> str:
        keys, table = draw(rng)
        asked = rng.sample(keys, len(keys))
        return "recall: " + ", ".join(f"{k} {table[k]}" for k in keys) + "; " + "; ".join(f"{k} {table[k]}" for k in asked)

    def item(rng: random.Random) -> Item:
        keys, table = draw(rng)
        asked = rng.choice(keys)
        context = "recall: " + ", ".join(f"{k} {table[k]}" for k in keys) + f"; {asked}"
        return choose(rng, context, table[asked], rng.sample([table[k] for k in keys if k != asked], NUM_CHOICES - 1))

    return Skill("recall", weight, line, item)


def _pattern_skill(world: World, weight: float) -> Skill:
    """Induction: go on with a sequence that repeats with period 3 to 5."""

    def draw(rng: random.Random) -> list[str]:
        return rng.sample(world.nouns, rng.randint(3, 5))

    def line(rng: random.Random) -> str:
        period = draw(rng)
        num_words = rng.randint(3 * len(period), 4 * len(period))
        return "pattern: " + " ".join(period[i % len(period)] for i in range(num_words))

    def item(rng: random.Random) -> Item:
        period = draw(rng)
        num_words = rng.randint(len(period) + 2, 3 * len(period))
        shown = [period[i % len(period)] for i in range(num_words)]
        right = period[num_words % len(period)]
        others = [w for w in period if w != right] + rng.sample([w for w in world.nouns if w not in period], 3)
        return choose(rng, "pattern: " + " ".join(shown), right, others)

    return Skill("pattern", weight, line, item)


def _draw_sum(rng: random.Random) -> tuple[str, str]:
    a, b = rng.randint(0, 99), rng.randint(0, 9)
    return f"{a} + {b} =", str(a + b)


def _near_numbers(rng: random.Random, answer: str) -> list[str]:
    value = int(answer)
    near = [value + d for d in (-10, -2, -1, 1, 2, 10) if value + d >= 0]
    return [str(n) for n in rng.sample(near, len(near))]


def build_skills(world: World) -> tuple[Skill, ...]:
    """Return every skill of `world`, with weights that sum to 1."""
    nouns, letters = list(world.nouns), list(_LETTERS)

    def draw_fact(rng: random.Random) -> tuple[str, str]:
        person, attribute = rng.choice(world.people), rng.choice(ATTRIBUTES)
        return f"{person} {attribute}", world.facts[person, attribute]

    def other_values(rng: random.Random, answer: str) -> list[str]:
        family = next(v for v in world.values.values() if answer in v)
        return rng.sample([v for v in family if v != answer], NUM_CHOICES - 1)

    def draw_product(rng: random.Random) -> tuple[str, str]:
        a, b = rng.choice(world.symbols), rng.choice(world.symbols)
        return f"{a} {b} =", world.product[a, b]

    def other_symbols(rng: random.Random, answer: str) -> list[str]:
        return rng.sample([s for s in world.symbols if s != answer], NUM_CHOICES - 1)

    return (
        _sequence_skill("copy", 0.08, lambda r: r.sample(nouns, r.randint(4, 9)), list, nouns),
        _sequence_skill("reverse", 0.10, lambda r: r.sample(nouns, r.randint(3, 6)), lambda w: w[::-1], nouns),
        _sequence_skill("sort", 0.12, lambda r: r.sample(letters, r.randint(4, 7)), sorted, letters),
        _sequence_skill(
            "translate",
            0.14,
            lambda r: r.sample(nouns, r.randint(3, 6)),
            lambda words: [world.dictionary[w] for w in words],
            list(world.dictionary.values()),
        ),
        _recall_skill(world, 0.16),
        _pattern_skill(world, 0.06),
        _lookup_skill("facts", 0.14, (4, 8), draw_fact, other_values),
        _lookup_skill("product", 0.10, (6, 12), draw_product, other_symbols),
        _lookup_skill("sum", 0.10, (4, 8), _draw_sum, _near_numbers),
    )
