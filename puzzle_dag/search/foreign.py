"""Libraries that someone else measured, read from their files and searched with the same exact program.

`search/foreign_candidates.py` says what a library is made of, and how runs of layers are written.
"""

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet

from puzzle_dag.search.conflict import Feasibility, explain_conflict
from puzzle_dag.search.foreign_candidates import ForeignCandidates, ForeignLibrary, ForeignLibraryError, ForeignLimit
from puzzle_dag.search.limits import SIDES, as_written
from puzzle_dag.search.program import Outcome
from puzzle_dag.search.solution import Loosened
from puzzle_dag.search.solver import minimise
from puzzle_dag.search.step import loosened_limit, step_kinds, tell_loosened

_COLUMNS = ("layer", "variant", "metric", "value")
_LOOSENED_SHARE = Fraction(5, 100)


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
    """Return an answer: all of its keys always, None or empty where nothing was found."""
    found = bool(outcome.chosen)
    objective = float(candidates.total(ForeignLimit(minimize), outcome.chosen)) if found else None
    bound = outcome.bound if math.isfinite(outcome.bound) else None
    if objective is not None and bound is not None:
        bound = min(bound, objective)
    return {
        "status": outcome.status,
        "objective": objective,
        "bound": bound,
        "gap": None if objective is None or bound is None else (objective - bound) / (abs(objective) or 1.0),
        "seconds": outcome.seconds,
        "costs": {limit.name: float(candidates.total(limit, outcome.chosen)) for limit in limits} if found else {},
        "choices": {candidates.places[i]: candidates.variants[i] for i in outcome.chosen},
    }


def _explanation(candidates: ForeignCandidates, limits: Sequence[ForeignLimit]) -> dict[str, Any]:
    """Return why nothing meets the bounds: what conflicts, and how near each of those can come."""
    conflict = explain_conflict(Feasibility(candidates), limits)
    return {
        "conflicting": [limit.describe() for limit in conflict.limits],
        "nearest": {n.limit.name: {"value": n.value, "while_met": list(n.others)} for n in conflict.nearest},
    }


def _loosen_each(
    candidates: ForeignCandidates, minimize: str, limits: Sequence[ForeignLimit], objective: float, time_limit_s: float
) -> list[dict[str, Any]]:
    """Loosen each bound alone and solve again; return an entry (see `solution.Loosened`) a bound and step, the largest gain first."""
    costs, found = candidates.amounts(minimize), list[Loosened]()
    bounds = [(index, side) for index, limit in enumerate(limits) for side in SIDES if getattr(limit, side) is not None]
    for index, side, kind in [(i, s, kind) for i, s in bounds for kind in step_kinds(limits[i], s)]:
        before = limits[index]
        after = loosened_limit(candidates, before, side, kind, _LOOSENED_SHARE)
        changed = [after if i == index else limit for i, limit in enumerate(limits)]
        outcome = minimise(candidates.program(changed), costs, is_met=candidates.meets(changed), time_limit_s=time_limit_s)
        # A time limit may leave less than what is known already, which is a choice of the loosened program, too.
        reached = min(objective, float(candidates.total(ForeignLimit(minimize), outcome.chosen)) if outcome.chosen else objective)
        gain = objective - reached
        found.append(tell_loosened(before, after, side, kind, _LOOSENED_SHARE, value=objective, reached=reached, gain=gain))
    return [asdict(entry) for entry in sorted(found, key=lambda entry: -entry.gain)]


def solve_foreign_library(
    library: ForeignLibrary,
    *,
    minimize: str,
    at_most: Mapping[str, float] | None = None,
    at_least: Mapping[str, float] | None = None,
    num_solutions: int = 1,
    min_different_layers: int = 1,
    loosen: bool = False,
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
        loosen: also tell, of the best answer, what each bound 5 % looser would buy; a solve for each.
        time_limit_s: for each program.

    Returns:
        JSON types: status ("optimal", "time_limit", "infeasible"), objective, bound, gap, seconds, costs (the bounded
        metrics' sums) and choices (layer or run -> variant), None or empty where no answer was found; with `num_solutions`
        above 1 a list of these under "solutions" beside the status of the first. Where nothing meets the bounds also
        conflicting and nearest. With `loosen` an answer also has loosening: a list of `solution.Loosened`, as JSON.

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
                why = _explanation(candidates, limits) if outcome.status == "infeasible" else {}
                return {**_answer(candidates, minimize, limits, outcome), **why, **({"solutions": []} if num_solutions > 1 else {})}
            break
        answers.append(_answer(candidates, minimize, limits, outcome))
        searched = replace(searched, earlier=(*searched.earlier, (outcome.chosen, min_different_layers)))
    if loosen:
        answers[0]["loosening"] = _loosen_each(candidates, minimize, limits, answers[0]["objective"], time_limit_s)
    return answers[0] if num_solutions == 1 else {"status": answers[0]["status"], "solutions": answers}
