"""Libraries that someone else measured: layer -> variant -> nested numbers, searched with the same exact program.

Numbers are named by dotted paths ("metrics.kl_div", "stats.memory_mib"); a total is the sum over the layers. The
layout is that of the Puzzle authors' own search; tables of (layer, variant, metric, value) rows work as well.

A layer id "FIRST-LAST" of two other ids ("3-5", "layer_3-5", "layer_3-layer_5") is a run: its variants replace all
layers from FIRST to LAST at once (a fused FFN, or nothing at all) and their numbers are those of the whole run. They
compete with the single layers' variants in the same program.
"""

import csv
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as parquet

from puzzle_dag.search.infeasible import explain_conflict
from puzzle_dag.search.limits import ScenarioError, SumLimit, as_written
from puzzle_dag.search.program import Floats, Item, Outcome, Program, Row
from puzzle_dag.search.solver import minimise

ForeignLibrary = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""Layer -> variant -> numbers, nested or under dotted names."""
_COLUMNS = ("layer", "variant", "metric", "value")


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


def read_foreign_library(path: Path) -> ForeignLibrary:
    """Read a library: JSON (layer -> variant -> numbers), or CSV or Parquet with the columns layer, variant, metric, value.

    Raises:
        ForeignLibraryError: the file isn't there, isn't of these kinds, or lacks a column.
    """
    try:
        if path.suffix == ".json":
            library = json.loads(path.read_text())
            if not isinstance(library, dict):
                raise ForeignLibraryError(f"{path}: the top level is no object; give layer -> variant -> numbers")
            return library
        if path.suffix == ".csv":
            with path.open(newline="") as f:
                return _from_rows(path, list(csv.DictReader(f)))
        if path.suffix == ".parquet":
            return _from_rows(path, parquet.read_table(path).to_pylist())
    except (OSError, json.JSONDecodeError) as error:
        raise ForeignLibraryError(f"{path} can't be read: {error}") from error
    raise ForeignLibraryError(f"{path}: a library is a .json, .csv or .parquet file")


def _from_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> ForeignLibrary:
    library: dict[str, dict[str, dict[str, Any]]] = {}
    for number, row in enumerate(rows, start=1):
        missing = [c for c in _COLUMNS if row.get(c) is None]
        if missing:
            raise ForeignLibraryError(f"{path}, row {number}: no {missing[0]!r}; the columns are {', '.join(_COLUMNS)}")
        try:
            value = float(row["value"])
        except (TypeError, ValueError):
            raise ForeignLibraryError(f"{path}, row {number}: value {row['value']!r} is no number") from None
        library.setdefault(str(row["layer"]), {}).setdefault(str(row["variant"]), {})[str(row["metric"])] = value
    return library


def _limits(at_most: Mapping[str, float], at_least: Mapping[str, float]) -> list[ForeignLimit]:
    names = dict.fromkeys((*at_most, *at_least))
    lower, upper = ({n: as_written(float(v)) for n, v in bounds.items()} for bounds in (at_least, at_most))
    return [ForeignLimit(name, lower.get(name), upper.get(name)) for name in names]


def _answer(candidates: ForeignCandidates, minimize: str, limits: Sequence[ForeignLimit], outcome: Outcome) -> dict[str, Any]:
    totals = {limit.name: float(candidates.total(limit, outcome.chosen)) for limit in limits}
    objective = float(candidates.total(ForeignLimit(minimize), outcome.chosen))
    bound = min(outcome.bound, objective)
    return {
        "status": outcome.status,
        "objective": objective,
        "bound": bound,
        "gap": (objective - bound) / (abs(objective) or 1.0),
        "seconds": outcome.seconds,
        "costs": totals,
        "choices": {candidates.places[i]: candidates.variants[i] for i in outcome.chosen},
    }


def _infeasible(candidates: ForeignCandidates, limits: Sequence[ForeignLimit], outcome: Outcome) -> dict[str, Any]:
    """Return the answer where nothing meets the bounds: what conflicts, and how near each of those can come."""
    conflict, nearest = explain_conflict(candidates, limits)
    return {
        "status": outcome.status,
        "seconds": outcome.seconds,
        "conflicting": [limit.describe() for limit in conflict],
        "nearest": {n.limit.name: {"value": n.value, "while_met": list(n.others)} for n in nearest},
    }


def solve_foreign_library(
    library: ForeignLibrary,
    *,
    minimize: str,
    at_most: Mapping[str, float] | None = None,
    at_least: Mapping[str, float] | None = None,
    num_solutions: int = 1,
    min_different_layers: int = 1,
    time_limit_s: float = 600.0,
) -> dict[str, Any]:
    """Choose one variant a layer so that a metric's sum is least and the others stay within bounds, proven.

    Args:
        library: layer -> variant -> numbers (see `read_foreign_library`).
        minimize: dotted name of the metric whose sum is minimised.
        at_most: dotted name -> upper bound of its sum.
        at_least: dotted name -> lower bound of its sum.
        num_solutions: how many answers: the best, the best that differs from it enough, and so on.
        min_different_layers: layers in which any two answers differ at least.
        time_limit_s: for each answer.

    Returns:
        JSON types: status ("optimal", "time_limit", "infeasible"), objective, bound, gap, seconds, costs (the bounded
        metrics' sums) and choices (layer or run -> variant); with `num_solutions` above 1 a list of these under "solutions"
        beside the status of the first. Where nothing meets the bounds: status, seconds, conflicting, nearest.

    Raises:
        ForeignLibraryError: a number that is missing or isn't one; the message names layer, variant and the nearest name.
    """
    candidates, limits = ForeignCandidates.of(library), _limits(at_most or {}, at_least or {})
    if num_solutions < 1 or not 1 <= min_different_layers <= len(candidates.layers):
        raise ForeignLibraryError(
            f"num_solutions is {num_solutions} and min_different_layers {min_different_layers}; "
            f"give 1 or more, and 1 to {len(candidates.layers)}"
        )
    answers: list[dict[str, Any]] = []
    searched, costs = candidates, candidates.amounts(minimize)
    while len(answers) < num_solutions:
        outcome = minimise(searched.program(limits), costs, is_met=searched.meets(limits), time_limit_s=time_limit_s)
        if not outcome.chosen:
            if not answers:
                return _infeasible(candidates, limits, outcome) if outcome.status == "infeasible" else {"status": outcome.status}
            break
        answers.append(_answer(candidates, minimize, limits, outcome))
        searched = replace(searched, earlier=(*searched.earlier, (outcome.chosen, min_different_layers)))
    return answers[0] if num_solutions == 1 else {"status": answers[0]["status"], "solutions": answers}
