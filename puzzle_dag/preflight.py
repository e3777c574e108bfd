"""What is checked before any compute is spent: that a profile's files fit each other and the parent, and that the disk has room.

Reads configuration and the parent's config.json only; takes milliseconds.
"""

import shutil
from collections.abc import Collection, Mapping
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from puzzle_dag.architecture import FFN, Attention, Block, LayerSpace, Run, variant_union
from puzzle_dag.config import (
    LOSSES,
    ConfigError,
    Profile,
    Scenario,
    Target,
    locate,
    read_earlier,
    read_scenario,
    read_target,
    resolve_runs,
    resolve_space,
    scenario_file,
)
from puzzle_dag.config.scenario import TIMED

if TYPE_CHECKING:
    from puzzle_dag.model.configuration_puzzle_dag import PuzzleDagConfig

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_SPARE_SHARE = 0.05
_SPARE_BYTES = 256 * 2**20


class DiskFullError(ValueError):
    """The disk has less room than a stage will write."""


def activations_bytes(shape: "PuzzleDagConfig", num_tokens: int, dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16") -> int:
    """Return the size of the cached hidden states: (layers + 1) boundaries x tokens x hidden size, in `dtype`."""
    return int((shape.num_hidden_layers + 1) * num_tokens * shape.hidden_size * _BYTES[dtype])


def require_disk(folder: Path, num_bytes: int, what: str) -> None:
    """Check that `num_bytes` and a margin fit on the disk of `folder` (which need not exist yet).

    Raises:
        DiskFullError: they don't; the message says what needs how much, what is free, and what to do.
    """
    there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(there).free
    needed = num_bytes + max(_SPARE_BYTES, round(num_bytes * _SPARE_SHARE))
    if free < needed:
        raise DiskFullError(
            f"{what} need {needed / 2**30:.2f} GiB on the disk of {there}, which has {free / 2**30:.2f} GiB free; "
            f"free some (puzzle-dag gc), lower the token budgets, or put var/ on another disk"
        )


def resolve_spaces(profile: Profile, shape: "PuzzleDagConfig") -> list[LayerSpace]:
    """Return every layer's variants. Raises ConfigError for a variant that the parent doesn't allow."""
    return [
        resolve_space(
            profile.search_space,
            layer=layer,
            num_layers=shape.num_hidden_layers,
            kv_heads=shape.num_key_value_heads,
            intermediate_size=shape.intermediate_size,
        )
        for layer in range(shape.num_hidden_layers)
    ]


def list_runs(profile: Profile, shape: "PuzzleDagConfig") -> tuple[Run, ...]:
    """Return the runs of layers that may be replaced at once. Raises ConfigError for a run that the parent doesn't have."""
    return resolve_runs(profile.search_space, num_layers=shape.num_hidden_layers)


def _own_block(shape: "PuzzleDagConfig") -> Block:
    return Block(Attention("gqa", shape.num_key_value_heads), FFN("swiglu", shape.intermediate_size))


def list_cost_variants(profile: Profile, shape: "PuzzleDagConfig") -> tuple[tuple[Attention, ...], tuple[FFN, ...]]:
    """Return what costs must be known for: the sorted union of the layers' variants and of what runs put into layers.

    Raises:
        ConfigError: a variant or a run that the parent doesn't allow.
    """
    attentions, ffns = variant_union(resolve_spaces(profile, shape))
    placed = [block for run in list_runs(profile, shape) for block in run.blocks(_own_block(shape))]
    return tuple(sorted({*attentions, *(b.attention for b in placed)})), tuple(sorted({*ffns, *(b.ffn for b in placed)}))


def check_lengths(profile: Profile, targets: Mapping[str, Target], shape: "PuzzleDagConfig") -> None:
    """Check that rows and requests fit the parent's context and the budgets a row. Raises ConfigError."""
    longest = shape.max_position_embeddings
    if profile.tokens.row_length > longest:
        raise ConfigError(f"profile {profile.name}: tokens.row_length is {profile.tokens.row_length}; the parent takes at most {longest}")
    for field in ("activations", "scores"):
        if getattr(profile.tokens, field) < profile.tokens.row_length:
            value, row = getattr(profile.tokens, field), profile.tokens.row_length
            raise ConfigError(f"profile {profile.name}: tokens.{field} is {value}, less than one row of {row}; give at least {row}")
    for target in targets.values():
        total = target.input_length + target.output_length
        if total > longest:
            raise ConfigError(f"target {target.name}: input_length + output_length is {total}; the parent takes at most {longest}")


def _wrong(scenario: Scenario, file: Path | None, field: str, message: str) -> ConfigError:
    where = f"scenario {scenario.name}" if file is None else locate(file, tuple(field.split(".")))
    return ConfigError(f"{where}: {field} {message}")


def check_scenario(scenario: Scenario, targets: Mapping[str, Target], *, file: Path | None = None) -> None:
    """Check that a scenario's targets are the profile's and measure the batch sizes that it names.

    Args:
        scenario: as read.
        targets: the profile's targets by name.
        file: the scenario's file, so that an error names its line.

    Raises:
        ConfigError: they aren't or don't; the message names field, value and fix.
    """

    def target_of(field: str, name: str) -> Target:
        if name not in targets:
            near = get_close_matches(name, targets, n=1)
            fix = f"use one of {', '.join(sorted(targets))}" + (f" (did you mean {near[0]}?)" if near else "")
            message = f"is {name!r}, which the profile doesn't measure; {fix}, or add it to the profile's targets"
            raise _wrong(scenario, file, field, message)
        return targets[name]

    target = target_of("target", scenario.target)
    if scenario.costs == "analytic" and target.hardware == "local-cpu":
        why = f"is 'analytic', but target {target.name} is the machine at hand, which is measured; leave it out"
        raise _wrong(scenario, file, "costs", why)
    measured = f"target {target.name} measures {list(target.batch_sizes)}"
    if isinstance(scenario.batch_sizes, tuple) and (not scenario.batch_sizes or set(scenario.batch_sizes) - set(target.batch_sizes)):
        raise _wrong(scenario, file, "batch_sizes", f"is {list(scenario.batch_sizes)}; {measured}")
    if not any(scenario.allows_batch(batch) for batch in target.batch_sizes):
        raise _wrong(scenario, file, "batch_sizes", f"leaves none; {measured}")
    points = [(f"constraints.{name}", name, bound.target or scenario.target, bound.at) for name, bound in scenario.bounds]
    if scenario.objective.quantity is not None:
        points.append(("objective", scenario.objective.quantity, scenario.target, scenario.objective.at))
    for field, name, target_name, at in points:
        own = target if target_name == scenario.target else target_of(f"{field}.target", target_name)
        if name in TIMED and at is not None and at.batch not in own.batch_sizes:
            raise _wrong(scenario, file, f"{field}.at.batch", f"is {at.batch}; target {own.name} measures {list(own.batch_sizes)}")


def list_placed_blocks(profile: Profile, shape: "PuzzleDagConfig") -> set[tuple[int, str]]:
    """Return every (layer, block) that a child may have: from the layers' spaces and from runs. Raises ConfigError."""
    parent = _own_block(shape)
    own = {(layer, block.name) for layer, space in enumerate(resolve_spaces(profile, shape)) for block in space.blocks}
    return own | {
        (layer, block.name) for run in list_runs(profile, shape) for layer, block in zip(run.layers, run.blocks(parent), strict=True)
    }


def check_structure(scenario: Scenario, placed: Collection[tuple[int, str]], num_layers: int, *, file: Path | None = None) -> None:
    """Check that a scenario's structure speaks of layers and blocks that there are; `placed` says which. Raises ConfigError."""
    structure = scenario.structure
    patterns: list[tuple[str, int | str, str]] = [("fixed", layer, pattern) for layer, pattern in structure.fixed.items()]
    patterns += [("forbidden", layer, pattern) for layer, several in structure.forbidden.items() for pattern in several]
    for kind, layer, pattern in patterns:
        field = f"structure.{kind}.{layer}"
        if layer != "all" and layer not in range(num_layers):
            raise _wrong(scenario, file, field, f"names a layer that isn't there; the parent has layers 0 to {num_layers - 1}")
        names = sorted({name for i, name in placed if layer in ("all", i)})
        if not any(fnmatchcase(name, pattern) for name in names):
            raise _wrong(scenario, file, field, f"is {pattern!r}, which matches no block of the search space: {', '.join(names)}")
    for place, least in (("structure", structure.min_different_layers), ("pool", scenario.pool.min_different_layers)):
        if least > num_layers:
            raise _wrong(scenario, file, f"{place}.min_different_layers", f"is {least}; the parent has {num_layers} layers")


def check_scores(scenario: Scenario, profile: Profile, *, file: Path | None = None) -> None:
    """Check that every score that a scenario minimises or bounds is one that the profile's blocks get. Raises ConfigError."""
    graded = () if profile.task_scores is None else profile.task_scores.tasks
    objective = scenario.objective
    for field, names in (("objective.subject_to", objective.subject_to), ("objective.minimize", objective.weights)):
        unknown = [name for name in names if name not in (*LOSSES, *graded)]
        if unknown:
            near = get_close_matches(unknown[0], (*LOSSES, *graded), n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            tasks = ", ".join([*graded, unknown[0]])
            fix = f"{hint}To grade every block on it, write `task_scores: {{tasks: [{tasks}]}}` into conf/profiles/{profile.name}.yaml"
            raise _wrong(scenario, file, field, f"names {unknown[0]!r}, which profile {profile.name} doesn't score; {fix}")


def check_refinable(scenario: Scenario, profile: Profile, *, file: Path | None = None) -> None:
    """Check that a scenario can be refined, where its profile asks for that. Raises ConfigError."""
    if profile.refinement is not None and not scenario.objective.is_summed_losses:
        fix = f"minimise {', '.join(LOSSES)} or a sum of these, or take `refinement` out of conf/profiles/{profile.name}.yaml"
        raise _wrong(scenario, file, "objective", f"can't be refined, for a child in the making isn't measured by it; {fix}")


def check_budget(scenario: Scenario, profile: Profile, *, file: Path | None = None) -> None:
    """Check that a child is healed on whole rows, or not at all. Raises ConfigError."""
    given, row = scenario.uptrain.tokens, profile.tokens.row_length
    if 0 < given < row:
        raise _wrong(scenario, file, "uptrain.tokens", f"is {given}, less than one row of {row}; give 0, or at least {row}")


def check_profile(conf: Path, profile: Profile, shape: "PuzzleDagConfig") -> None:
    """Check a profile with all the files that it names, against its parent's shape.

    Args:
        conf: folder of the configuration.
        profile: the profile, as read.
        shape: the parent's configuration.

    Raises:
        ConfigError: the first thing that can't work; the message names file or field, value and fix.
    """
    placed = list_placed_blocks(profile, shape)
    targets = {name: read_target(conf, name) for name in profile.targets}
    check_lengths(profile, targets, shape)
    for name in profile.scenarios:
        scenario = read_scenario(conf, name)
        check_refinable(scenario, profile, file=scenario_file(conf, name))
        check_budget(scenario, profile, file=scenario_file(conf, name))
        for asked in (scenario, *read_earlier(conf, scenario).values()):
            file = scenario_file(conf, asked.name)
            check_scenario(asked, targets, file=file)
            check_scores(asked, profile, file=file)
            check_structure(asked, placed, shape.num_hidden_layers, file=file)
