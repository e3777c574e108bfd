"""The variants of a library that someone else measured: layer -> variant -> nested numbers, as the search chooses among them.

Numbers are named by dotted paths ("metrics.kl_div", "stats.memory_mib"); a total is the sum over the layers. The
layout is that of the Puzzle authors' own search; tables of (layer, variant, metric, value) rows work as well.

A layer id "FIRST-LAST" of two other ids ("3-5", "layer_3-5", "layer_3-layer_5") is a run: its variants replace all
layers from FIRST to LAST at once (a fused FFN, or nothing at all) and their numbers are those of the whole run. They
compete with the single layers' variants in the same program.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from fractions import Fraction
from typing import Any

import numpy as np

from puzzle_dag.search.limits import ScenarioError, SumLimit, as_written
from puzzle_dag.search.program import Floats, Item, Program, Row

ForeignLibrary = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""Layer -> variant -> numbers, nested or under dotted names."""


class ForeignLibraryError(ScenarioError):
    """A library, a metric's name or a number that can't be read."""


ForeignLimit = SumLimit
"""A bound of a metric's sum over the layers."""


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Sort "layer_2" before "layer_10"."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name) if part]


_RUN = re.compile(r"(.*\d)-(.*\d)")


def _ends_of_run(name: str, library: ForeignLibrary) -> tuple[str, str] | None:
    """Return the first and the last layer of a run's id ("3-5", "layer_3-5"), None for the id of a single layer.

    Raises ForeignLibraryError where one of the two isn't there: then it's a run of which an end is missing.
    """
    match = _RUN.fullmatch(name)
    if match is None:
        return None
    first, written = match[1], match[2]
    prefix = first.rstrip("0123456789")
    last = written if written in library else prefix + written
    if (first in library) != (last in library):
        missing = last if first in library else first
        raise ForeignLibraryError(f"{name!r} reads as a run of layers, but there is no layer {missing!r}; add it, or rename {name!r}")
    return (first, last) if first in library else None


def _numbers(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the leaves of a nested mapping by dotted path."""
    flat: dict[str, Any] = {}
    for name, value in content.items():
        if isinstance(value, Mapping):
            flat.update(_numbers(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat


@dataclass(frozen=True, slots=True)
class ForeignCandidates:
    """The variants of a foreign library, flat over the layers and the runs of layers.

    `layers` are the ids of the single layers in order, `places` the id that each variant stands under: a layer's or a run's.
    """

    layers: tuple[str, ...]
    variants: tuple[str, ...]
    items: tuple[Item, ...]
    numbers: tuple[Mapping[str, Any], ...]
    places: tuple[str, ...] = ()
    earlier: tuple[tuple[tuple[int, ...], int], ...] = field(default=())

    @staticmethod
    def of(library: ForeignLibrary) -> "ForeignCandidates":
        """Flatten a library, layers in natural order. Raises ForeignLibraryError for a layer without variants."""
        if not library:
            raise ForeignLibraryError("the library has no layers; give layer -> variant -> numbers")
        runs = {name: ends for name in library if (ends := _ends_of_run(name, library)) is not None}
        layers = tuple(sorted((name for name in library if name not in runs), key=_natural))
        covered: dict[str, tuple[int, ...]] = {name: (index,) for index, name in enumerate(layers)}
        for name, (first, last) in runs.items():
            if first in runs or last in runs or covered[first] >= covered[last]:
                raise ForeignLibraryError(f"run {name!r} must go from one layer to a later one")
            covered[name] = tuple(range(covered[first][0], covered[last][0] + 1))
        found = ForeignCandidates(layers, (), (), ())
        for place in sorted(library, key=lambda name: (covered[name][0], len(covered[name]))):
            found = found._with_place(place, covered[place], library[place])
        return found

    def _with_place(self, place: str, layers: tuple[int, ...], variants: Any) -> "ForeignCandidates":
        """Return the candidates with those of one layer or run. Raises ForeignLibraryError where they are none."""
        if not isinstance(variants, Mapping) or not variants:
            raise ForeignLibraryError(f"layer {place!r} has no variants; give variant -> numbers")
        for variant, content in variants.items():
            if not isinstance(content, Mapping):
                raise ForeignLibraryError(f"layer {place!r}, variant {variant!r}: {content!r} is no mapping of names to numbers")
        return replace(
            self,
            variants=(*self.variants, *variants),
            items=(*self.items, *(Item(variant, layers) for variant in variants)),
            numbers=(*self.numbers, *(_numbers(content) for content in variants.values())),
            places=(*self.places, *(place for _ in variants)),
        )

    def exact(self, metric: str, item: int) -> Fraction:
        """Return an item's number, as the decimal it was written as. Raises ForeignLibraryError."""
        where = f"layer {self.places[item]!r}, variant {self.variants[item]!r}"
        known = self.numbers[item]
        if metric not in known:
            near = get_close_matches(metric, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(sorted(known)) or 'none'}"
            raise ForeignLibraryError(f"{where} has no number {metric!r}; {hint}")
        value = known[metric]
        if isinstance(value, bool) or not isinstance(value, int | float) or not np.isfinite(value):
            raise ForeignLibraryError(f"{where}: {metric} is {value!r}; it must be a finite number")
        return Fraction(value) if isinstance(value, int) else as_written(value)

    def amounts(self, metric: str) -> Floats:
        """Return every item's number."""
        return np.array([float(self.exact(metric, i)) for i in range(len(self.items))])

    def sums(self, limit: ForeignLimit) -> Floats:
        """Return what each item adds to the sum behind a limit."""
        return self.amounts(limit.name)

    def total(self, limit: ForeignLimit, chosen: Sequence[int]) -> Fraction:
        """Return the exact sum of chosen items."""
        return sum((self.exact(limit.name, i) for i in chosen), Fraction(0))

    @property
    def structure(self) -> str:
        """What is asked of the variants themselves, in words: nothing, whoever asks why something is infeasible."""
        return ""

    def without_structure(self) -> "ForeignCandidates":
        """Return the same candidates without earlier choices to differ from."""
        return replace(self, earlier=())

    def program(self, limits: Sequence[ForeignLimit]) -> Program:
        """Return the program of these limits and of the difference from earlier choices."""
        rows = []
        for limit in limits:
            lower = -np.inf if limit.at_least is None else float(limit.at_least)
            upper = np.inf if limit.at_most is None else float(limit.at_most)
            rows.append(Row(limit.name, self.sums(limit), lower, upper))
        for chosen, least in self.earlier:
            same = np.zeros(len(self.items))
            same[list(chosen)] = [len(self.items[i].layers) for i in chosen]  # a run that is chosen again repeats all its layers
            rows.append(Row("difference", same, upper=len(self.layers) - least))
        return Program(len(self.layers), self.items, tuple(rows))

    def meets(self, limits: Sequence[ForeignLimit]) -> Callable[[tuple[int, ...]], bool]:
        """Return the exact check of a choice: the bounds, and that every layer is covered once."""

        def is_met(chosen: tuple[int, ...]) -> bool:
            covered = [layer for i in chosen for layer in self.items[i].layers]
            return covered == list(range(len(self.layers))) and all(limit.is_met(self.total(limit, chosen)) for limit in limits)

        return is_met
