"""Libraries that someone else measured: layer -> variant -> nested numbers, searched with the same exact program.

Numbers are named by dotted paths ("metrics.kl_div", "stats.memory_mib"); a total is the sum over the layers. The
layout is that of the Puzzle authors' own search; tables of (layer, variant, metric, value) rows work as well.
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
from puzzle_dag.search.limits import ScenarioError, as_written
from puzzle_dag.search.program import Floats, Item, Outcome, Program, Row, minimise

ForeignLibrary = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""Layer -> variant -> numbers, nested or under dotted names."""
_COLUMNS = ("layer", "variant", "metric", "value")


class ForeignLibraryError(ScenarioError):
    """A library, a metric's name or a number that can't be read."""


@dataclass(frozen=True, slots=True)
class ForeignLimit:
    """A bound of a metric's sum over the layers."""

    name: str
    at_least: Fraction | None = None
    at_most: Fraction | None = None

    def sum_bounds(self) -> tuple[Fraction | None, Fraction | None]:
        """Return (at_least, at_most)."""
        return self.at_least, self.at_most

    def with_sum_bounds(self, *, lower: bool, upper: bool) -> "ForeignLimit":
        """Keep only the named bounds."""
        return ForeignLimit(self.name, self.at_least if lower else None, self.at_most if upper else None)

    def value(self, total: Fraction) -> Fraction:
        """Return the total itself."""
        return total

    def is_met(self, total: Fraction) -> bool:
        """Say whether a total lies within the bounds, exactly."""
        return (self.at_least is None or total >= self.at_least) and (self.at_most is None or total <= self.at_most)

    def describe(self) -> str:
        """Return e.g. "stats.memory_mib at most 70000"."""
        bounds = [f"{word} {float(b):.6g}" for word, b in (("at least", self.at_least), ("at most", self.at_most)) if b is not None]
        return f"{self.name} {' and '.join(bounds)}"


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Sort "layer_2" before "layer_10"."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name) if part]


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
    """The variants of a foreign library, flat over the layers."""

    layers: tuple[str, ...]
    variants: tuple[str, ...]
    items: tuple[Item, ...]
    numbers: tuple[Mapping[str, Any], ...]
    earlier: tuple[tuple[tuple[int, ...], int], ...] = field(default=())

    @staticmethod
    def of(library: ForeignLibrary) -> "ForeignCandidates":
        """Flatten a library, layers in natural order. Raises ForeignLibraryError for a layer without variants."""
        if not library:
            raise ForeignLibraryError("the library has no layers; give layer -> variant -> numbers")
        layers = tuple(sorted(library, key=_natural))
        variants, items, numbers = [], [], []
        for index, layer in enumerate(layers):
            if not isinstance(library[layer], Mapping) or not library[layer]:
                raise ForeignLibraryError(f"layer {layer!r} has no variants; give variant -> numbers")
            for variant in library[layer]:
                content = library[layer][variant]
                if not isinstance(content, Mapping):
                    raise ForeignLibraryError(f"layer {layer!r}, variant {variant!r}: {content!r} is no mapping of names to numbers")
                variants.append(variant)
                items.append(Item(variant, (index,)))
                numbers.append(_numbers(content))
        return ForeignCandidates(layers, tuple(variants), tuple(items), tuple(numbers))

    def exact(self, metric: str, item: int) -> Fraction:
        """Return an item's number, as the decimal it was written as. Raises ForeignLibraryError."""
        where = f"layer {self.layers[self.items[item].layers[0]]!r}, variant {self.variants[item]!r}"
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
            same[list(chosen)] = 1.0
            rows.append(Row("difference", same, upper=len(self.layers) - least))
        return Program(len(self.layers), self.items, tuple(rows))

    def meets(self, limits: Sequence[ForeignLimit]) -> Callable[[tuple[int, ...]], bool]:
        """Return the exact check of a choice."""
        return lambda chosen: all(limit.is_met(self.total(limit, chosen)) for limit in limits)


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
        "choices": {candidates.layers[candidates.items[i].layers[0]]: candidates.variants[i] for i in outcome.chosen},
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
        metrics' sums) and choices (layer -> variant); with `num_solutions` above 1 a list of these under "solutions"
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
