"""Scenarios of a foreign library: checked against it, solved, and the answers added up again from the library itself."""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from puzzle_dag.config.foreign import ForeignScenario
from puzzle_dag.config.reading import ConfigError, misfit
from puzzle_dag.progress import Progress, silent
from puzzle_dag.search.foreign import solve_foreign_library
from puzzle_dag.search.foreign_candidates import ForeignCandidates, ForeignLibrary, ForeignLibraryError, ForeignLimit
from puzzle_dag.search.limits import as_written


class ForeignInfeasibleError(ForeignLibraryError):
    """Nothing in a foreign library meets a scenario; the message names what conflicts and the nearest that can be met."""


def list_metrics(library: ForeignLibrary) -> list[str]:
    """Return the dotted names that are a finite number in every variant of every layer, sorted."""
    candidates = ForeignCandidates.of(library)
    names = sorted({name for numbers in candidates.numbers for name in numbers})

    def is_everywhere(name: str) -> bool:
        try:
            candidates.amounts(name)
        except ForeignLibraryError:
            return False
        return True

    return [name for name in names if is_everywhere(name)]


def list_sources(library: ForeignLibrary) -> list[str]:
    """Return what the variants say of where their numbers come from ("measured", "synthetic"): their text `source`, sorted."""
    numbers = ForeignCandidates.of(library).numbers
    return sorted({str(n["source"]) for n in numbers if isinstance(n.get("source"), str)})


def grid_of(library: ForeignLibrary, metric: str) -> dict[str, dict[str, float]]:
    """Return layer -> variant -> number, layers in natural order, runs of layers (where there are any) after them.

    Raises:
        ForeignLibraryError: a variant lacks the number.
    """
    layers = ForeignCandidates.of(library).layers
    grid: dict[str, dict[str, float]] = {}
    for place in (*layers, *(p for p in library if p not in layers)):
        amounts = ForeignCandidates.of({place: library[place]}).amounts(metric)
        grid[place] = dict(zip(library[place], map(float, amounts), strict=True))
    return grid


def layers_of(place: str, layers: Sequence[str]) -> list[str]:
    """Return the layers that a variant under `place` replaces: the layer itself, or all of a run "FIRST-LAST" ("layer_3-5").

    Args:
        place: id of a layer or of a run.
        layers: ids of the single layers, in order.

    Raises:
        ForeignLibraryError: it is neither.
    """
    if place in layers:
        return [place]
    first, _, last = place.rpartition("-")
    for end in (last, first.rstrip("0123456789") + last):
        if first in layers and end in layers:
            return list(layers[layers.index(first) : layers.index(end) + 1])
    raise ForeignLibraryError(f"the library has no layer {place!r}")


def choice_by_layer(library: ForeignLibrary, choices: Mapping[str, str]) -> dict[str, str]:
    """Return layer -> what stands there, in the order of the layers: the variant's name, and its run's where it covers more layers.

    Raises:
        ForeignLibraryError: a layer is covered twice or not at all.
    """
    layers, found = ForeignCandidates.of(library).layers, dict[str, str]()
    for place, variant in choices.items():
        for layer in layers_of(place, layers):
            if layer in found:
                raise ForeignLibraryError(f"layer {layer!r} has two choices")
            found[layer] = variant if place == layer else f"{variant} ({place})"
    missing = [layer for layer in layers if layer not in found]
    if missing:
        raise ForeignLibraryError(f"layer {missing[0]!r} has no choice")
    return {layer: found[layer] for layer in layers}


def check_foreign_scenario(scenario: ForeignScenario, library: ForeignLibrary, *, profile: str, file: Path | None = None) -> None:
    """Check that a scenario is of this profile and speaks of numbers that every variant of the library has.

    Args:
        scenario: as read.
        library: the profile's library.
        profile: name of the profile.
        file: the scenario's file, so that an error names its line.

    Raises:
        ConfigError: it isn't or doesn't; the message names field, value and fix.
        ForeignLibraryError: the library can't be searched.
    """

    def wrong(field: tuple[str, ...], why: str) -> ConfigError:
        return misfit(file, field, why, owner=f"scenario {scenario.name}")

    candidates, least = ForeignCandidates.of(library), scenario.min_different_layers
    if scenario.library != profile:
        raise wrong(("library",), f"is {scenario.library!r}, but profile {profile!r} names it; make them equal")
    for field, metric in ((("minimize",), scenario.minimize), *((("constraints", name), name) for name in scenario.constraints)):
        try:
            candidates.amounts(metric)
        except ForeignLibraryError as error:
            raise wrong(field, f"can't be summed: {error}") from None
    if least > len(candidates.layers):
        raise wrong(("min_different_layers",), f"is {least}; the library has {len(candidates.layers)} layers")


def solve_foreign_scenario(library: ForeignLibrary, scenario: ForeignScenario) -> list[dict[str, Any]]:
    """Return the scenario's answers, best first, each as `solve_foreign_library` gives it; fewer where no more differ enough.

    The first one has "loosening", too.

    Raises:
        ForeignInfeasibleError: nothing meets the constraints.
        ForeignLibraryError: a number is missing.
    """
    answer = solve_foreign_library(
        library,
        minimize=scenario.minimize,
        at_most={name: b.at_most for name, b in scenario.constraints.items() if b.at_most is not None},
        at_least={name: b.at_least for name, b in scenario.constraints.items() if b.at_least is not None},
        num_solutions=scenario.num_solutions,
        min_different_layers=scenario.min_different_layers,
        loosen=True,
    )
    answers: list[dict[str, Any]] = answer.get("solutions", [answer])
    if answer["status"] != "infeasible" and answers and answers[0]["choices"]:
        return answers
    if answer["status"] != "infeasible":
        raise ForeignLibraryError(f"scenario {scenario.name}: no answer within the time limit; the solver says {answer['status']}")
    nearest = "; ".join(
        f"{name} can come to {near['value']:.6g}" + (f" with {', '.join(near['while_met'])}" if near["while_met"] else "")
        for name, near in answer["nearest"].items()
    )
    raise ForeignInfeasibleError(f"scenario {scenario.name}: no choice meets {' and '.join(answer['conflicting'])}; {nearest}")


def total_of(library: ForeignLibrary, choices: Mapping[str, str], metric: str) -> Fraction:
    """Return the exact sum of a number over chosen variants, read from the library.

    Args:
        library: the library.
        choices: layer -> variant.
        metric: dotted name.

    Raises:
        ForeignLibraryError: the library has no such variant or number.
    """
    total = Fraction(0)
    for place, variant in choices.items():
        if variant not in library.get(place, {}):
            raise ForeignLibraryError(f"the library has no variant {variant!r} in layer {place!r}")
        total += ForeignCandidates.of({place: {variant: library[place][variant]}}).exact(metric, 0)
    return total


def recheck_answers(library: ForeignLibrary, scenario: ForeignScenario, answers: Sequence[Mapping[str, Any]]) -> list[str]:
    """Add every answer up again, from the library and not from the solver; return what is wrong, in words.

    What must hold: each layer is covered exactly once, by a variant that the library has; the sums are those that the answer says and lie
    within the scenario's bounds, in exact arithmetic; the objective is not below the proven bound; any two answers differ enough.
    """
    wrong: list[str] = []
    covers: list[tuple[int, dict[str, str]]] = []
    for rank, answer in enumerate(answers, start=1):
        choices, where = answer["choices"], f"solution {rank}"
        try:
            cover = choice_by_layer(library, choices)
            objective = total_of(library, choices, scenario.minimize)
            sums = {name: total_of(library, choices, name) for name in scenario.constraints}
        except ForeignLibraryError as error:
            wrong.append(f"{where}: {error}")
            continue
        if float(objective) != answer["objective"] or answer["bound"] > answer["objective"]:
            wrong.append(f"{where}: {scenario.minimize} is {float(objective)}, not {answer['objective']} (bound {answer['bound']})")
        for name, bound in scenario.constraints.items():
            least, most = (None if b is None else as_written(b) for b in (bound.at_least, bound.at_most))
            limit = ForeignLimit(name, at_least=least, at_most=most)
            if not limit.is_met(sums[name]) or answer["costs"].get(name) != float(sums[name]):
                wrong.append(f"{where}: {name} is {float(sums[name]):.6g}, said {answer['costs'].get(name)}; asked for {limit.describe()}")
        for other, earlier in covers:
            num_different = sum(earlier[layer] != variant for layer, variant in cover.items())
            if num_different < scenario.min_different_layers:
                wrong.append(f"solutions {other} and {rank} differ in {num_different} layers, not {scenario.min_different_layers}")
        covers.append((rank, cover))
    return wrong


def sweep_foreign_library(
    library: ForeignLibrary, minimize: str, metric: str, *, num_points: int = 10, progress: Progress = silent
) -> list[tuple[float, float]]:
    """Return the trade-off between two numbers: (sum of `metric`, least sum of `minimize`) as an upper bound of `metric` is swept.

    The bound goes in even steps from the least sum that there is to that of the unbounded optimum; the other numbers are free.

    Raises:
        ForeignLibraryError: a number is missing.
    """
    free = solve_foreign_library(library, minimize=minimize)
    most = float(total_of(library, free["choices"], metric))
    least = float(solve_foreign_library(library, minimize=metric)["objective"])
    points = []
    for done in range(num_points):
        # The least sum is exact and must not be missed by the rounding of the steps.
        bound = least if done == 0 else most if done == num_points - 1 else least + (most - least) * done / (num_points - 1)
        answer = solve_foreign_library(library, minimize=minimize, at_most={metric: bound})
        if answer["choices"]:
            points.append((float(total_of(library, answer["choices"], metric)), float(answer["objective"])))
        progress(done + 1, num_points, "points")
    return sorted(set(points))
