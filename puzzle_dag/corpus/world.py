"""An invented world: words, people and a binary operation that exist nowhere else.

Whatever a model knows of this world it can only have learned from our generator, so knowledge kept by a
child is knowledge kept from its parent, not luck. The world is a pure function of its seed.
"""

import random
from dataclasses import dataclass

_NOUNS = (
    "ant apple arch arm axe bag ball band bark barn bat bay bean bear bed bee bell belt bird boat bone book boot "
    "bowl box bread brick broom bulb bus cake camp cap card cart cat cave chair cheese clay clock cloud coat coin "
    "comb cook cord corn cow crab crow crown cup deer desk dish dog doll door dove drum duck dust eagle ear egg elm "
    "fan farm fern fig fire fish flag flute fly foot fork fox frog fruit gate gem glass glove goat gold goose grape "
    "grass hat hawk hen hill hoof hook horn horse house ice ink iron jar"
)

_CONSONANTS = "bdfgklmnprstvz"
_VOWELS = "aeiou"

ATTRIBUTES = ("home", "food", "work", "pet")


@dataclass(frozen=True, slots=True)
class World:
    """Everything there is to know, with `facts[(person, attribute)]` a word and `product[(a, b)]` a symbol."""

    nouns: tuple[str, ...]
    people: tuple[str, ...]
    values: dict[str, tuple[str, ...]]
    facts: dict[tuple[str, str], str]
    dictionary: dict[str, str]
    symbols: tuple[str, ...]
    product: dict[tuple[str, str], str]


def build_world(seed: int = 7, num_people: int = 96, num_symbols: int = 16) -> World:
    """Build the invented world of `seed`: facts, a dictionary of every noun, a random operation table."""
    rng = random.Random(seed)
    nouns = tuple(_NOUNS.split())
    taken = set(nouns)

    def invent(num_syllables: int) -> str:
        while True:
            word = "".join(rng.choice(_CONSONANTS) + rng.choice(_VOWELS) for _ in range(num_syllables))
            if word not in taken:
                taken.add(word)
                return word

    people = tuple(invent(3) for _ in range(num_people))
    values = {attribute: tuple(invent(2) + rng.choice("lnrs") for _ in range(24)) for attribute in ATTRIBUTES}
    facts = {(p, a): rng.choice(values[a]) for p in people for a in ATTRIBUTES}
    dictionary = {noun: invent(2) for noun in nouns}
    symbols = tuple(invent(1) for _ in range(num_symbols))
    product = {(a, b): rng.choice(symbols) for a in symbols for b in symbols}
    return World(nouns, people, values, facts, dictionary, symbols, product)
