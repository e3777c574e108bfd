"""Whether one scenario can be solved at all: what it says, checked against its profile, the targets and the parent's layers.

`check_scenario` makes every check that there is, so whoever takes a scenario in (a refresh, the command, the form, the watched folder,
a sweep) calls it and nothing else: what one of them lets pass, the others do as well.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path

from puzzle_dag.config import LOSSES, Bound, ConfigError, Profile, Scenario, Target, misfit, read_earlier, scenario_file
from puzzle_dag.config.scenario import TIMED

PlacedBlocks = Sequence[AbstractSet[str]]
"""For every layer of the parent the names of the blocks that a child may have there (`preflight.list_placed_blocks`)."""
_Keys = tuple[int | str, ...]


def check_scenario(
    conf: Path,
    profile: Profile,
    scenario: Scenario,
    targets: Mapping[str, Target],
    read_placed: Callable[[], PlacedBlocks],
    *,
    file: Path | None = None,
) -> dict[str, Scenario]:
    """Check one scenario and those that it must differ from in every way there is.

    Args:
        conf: folder of the configuration.
        profile: the profile that is to solve it.
        scenario: as read.
        targets: the profile's targets by name.
        read_placed: returns what a child's layers may have. Called only where the scenario speaks of layers, since that takes the
            parent's configuration, and with it libraries that take seconds to import.
        file: where the scenario was read, so that an error names its line; its place in `conf` unless given.

    Returns:
        The scenarios that it must differ from, by name.

    Raises:
        ConfigError: the first thing that can't work; the message names file, line, field, value and fix.
    """
    file = file or scenario_file(conf, scenario.name)
    check_refinable(scenario, profile, file=file)
    check_budget(scenario, profile, file=file)
    earlier = read_earlier(conf, scenario, file=file)
    for asked in (scenario, *earlier.values()):
        where = file if asked is scenario else scenario_file(conf, asked.name)
        check_targets(asked, targets, file=where)
        check_scores(asked, profile, file=where)
        if _speaks_of_layers(asked):
            check_structure(asked, read_placed(), file=where)
    return earlier


def _wrong(scenario: Scenario, file: Path | None, field: _Keys, message: str) -> ConfigError:
    return misfit(file, field, message, owner=f"scenario {scenario.name}")


def _located_bounds(scenario: Scenario) -> Iterator[tuple[_Keys, str, Bound]]:
    """Yield the keys of each bound's place in the file, its quantity, and the bound."""
    for name, found in sorted(scenario.constraints.items()):
        if isinstance(found, Bound):
            yield ("constraints", name), name, found
        else:
            yield from ((("constraints", name, i), name, bound) for i, bound in enumerate(found))


def check_targets(scenario: Scenario, targets: Mapping[str, Target], *, file: Path | None = None) -> None:
    """Check that a scenario's targets are the profile's and measure the batch sizes that it names.

    Args:
        scenario: as read.
        targets: the profile's targets by name.
        file: the scenario's file, so that an error names its line.

    Raises:
        ConfigError: they aren't or don't; the message names field, value and fix.
    """

    def target_of(field: _Keys, name: str) -> Target:
        if name not in targets:
            near = get_close_matches(name, targets, n=1)
            fix = f"use one of {', '.join(sorted(targets))}" + (f" (did you mean {near[0]}?)" if near else "")
            message = f"is {name!r}, which the profile doesn't measure; {fix}, or add it to the profile's targets"
            raise _wrong(scenario, file, field, message)
        return targets[name]

    target = target_of(("target",), scenario.target)
    if scenario.costs == "analytic" and {targets[n].hardware for n in scenario.targets if n in targets} == {"local-cpu"}:
        why = f"is 'analytic', but target {' and target '.join(scenario.targets)} is the machine at hand, which is measured; leave it out"
        raise _wrong(scenario, file, ("costs",), why)
    measured = f"target {target.name} measures {list(target.batch_sizes)}"
    if isinstance(scenario.batch_sizes, tuple) and (not scenario.batch_sizes or set(scenario.batch_sizes) - set(target.batch_sizes)):
        raise _wrong(scenario, file, ("batch_sizes",), f"is {list(scenario.batch_sizes)}; {measured}")
    if not any(scenario.allows_batch(batch) for batch in target.batch_sizes):
        raise _wrong(scenario, file, ("batch_sizes",), f"leaves none; {measured}")
    points = [(field, name, bound.target or scenario.target, bound.at) for field, name, bound in _located_bounds(scenario)]
    if scenario.objective.quantity is not None:
        points.append((("objective",), scenario.objective.quantity, scenario.target, scenario.objective.at))
    for field, name, target_name, at in points:
        own = target if target_name == scenario.target else target_of((*field, "target"), target_name)
        if name in TIMED and at is not None and at.batch not in own.batch_sizes:
            why = f"is {at.batch}; target {own.name} measures {list(own.batch_sizes)}"
            raise _wrong(scenario, file, (*field, "at", "batch"), why)


def _speaks_of_layers(scenario: Scenario) -> bool:
    structure = scenario.structure
    least = max(structure.min_different_layers, scenario.pool.min_different_layers)
    return bool(structure.fixed or structure.forbidden) or least > 1


def check_structure(scenario: Scenario, placed: PlacedBlocks, *, file: Path | None = None) -> None:
    """Check that a scenario's structure speaks of layers and blocks that there are; `placed` says which. Raises ConfigError."""
    structure, num_layers = scenario.structure, len(placed)
    patterns: list[tuple[str, int | str, str]] = [("fixed", layer, pattern) for layer, pattern in structure.fixed.items()]
    patterns += [("forbidden", layer, pattern) for layer, several in structure.forbidden.items() for pattern in several]
    for kind, layer, pattern in patterns:
        field = ("structure", kind, str(layer))
        if layer != "all" and layer not in range(num_layers):
            raise _wrong(scenario, file, field, f"names a layer that isn't there; the parent has layers 0 to {num_layers - 1}")
        names = sorted({name for i, several in enumerate(placed) if layer in ("all", i) for name in several})
        if not any(fnmatchcase(name, pattern) for name in names):
            raise _wrong(scenario, file, field, f"is {pattern!r}, which matches no block of the search space: {', '.join(names)}")
    for place, least in (("structure", structure.min_different_layers), ("pool", scenario.pool.min_different_layers)):
        if least > num_layers:
            raise _wrong(scenario, file, (place, "min_different_layers"), f"is {least}; the parent has {num_layers} layers")


def check_scores(scenario: Scenario, profile: Profile, *, file: Path | None = None) -> None:
    """Check that every score that a scenario minimises or bounds is one that the profile's blocks get. Raises ConfigError."""
    graded = () if profile.task_scores is None else profile.task_scores.tasks
    objective = scenario.objective
    for field, names in (("subject_to", objective.subject_to), ("minimize", objective.weights)):
        unknown = [name for name in names if name not in (*LOSSES, *graded)]
        if unknown:
            near = get_close_matches(unknown[0], (*LOSSES, *graded), n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            tasks = ", ".join([*graded, unknown[0]])
            fix = f"{hint}To grade every block on it, write `task_scores: {{tasks: [{tasks}]}}` into conf/profiles/{profile.name}.yaml"
            why = f"names {unknown[0]!r}, which profile {profile.name} doesn't score; {fix}"
            raise _wrong(scenario, file, ("objective", field), why)


def check_budget(scenario: Scenario, profile: Profile, *, file: Path | None = None) -> None:
    """Check that a child is healed on whole rows, or not at all. Raises ConfigError."""
    given, row = scenario.uptrain.tokens, profile.tokens.row_length
    if 0 < given < row:
        raise _wrong(scenario, file, ("uptrain", "tokens"), f"is {given}, less than one row of {row}; give 0, or at least {row}")


def check_refinable(scenario: Scenario, profile: Profile, *, file: Path | None = None) -> None:
    """Check that a scenario can be refined, where its profile asks for that. Raises ConfigError."""
    if profile.refinement is not None and not scenario.objective.is_summed_losses:
        fix = f"minimise {', '.join(LOSSES)} or a sum of these, or take `refinement` out of conf/profiles/{profile.name}.yaml"
        raise _wrong(scenario, file, ("objective",), f"can't be refined, for a child in the making isn't measured by it; {fix}")
