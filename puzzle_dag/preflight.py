"""What is checked before any compute is spent: that a profile's files fit each other and the parent, and that the disk has room.

Reads configuration and the parent's config.json only; takes milliseconds.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from puzzle_dag.architecture import FFN, Attention, Block, LayerSpace, Run, variant_union
from puzzle_dag.config import (
    ConfigError,
    Profile,
    Target,
    misfit,
    profile_file,
    read_named,
    read_scenario,
    read_target,
    resolve_runs,
    resolve_space,
    target_file,
)
from puzzle_dag.scenario_checks import check_scenario

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


def resolve_spaces(profile: Profile, shape: "PuzzleDagConfig", *, file: Path | None = None) -> list[LayerSpace]:
    """Return every layer's variants.

    Args:
        profile: as read.
        shape: the parent's configuration.
        file: the profile's file, so that an error names its line.

    Raises:
        ConfigError: a variant that the parent doesn't allow.
    """
    return [
        resolve_space(
            profile.search_space,
            layer=layer,
            num_layers=shape.num_hidden_layers,
            kv_heads=shape.num_key_value_heads,
            intermediate_size=shape.intermediate_size,
            file=file,
        )
        for layer in range(shape.num_hidden_layers)
    ]


def list_runs(profile: Profile, shape: "PuzzleDagConfig", *, file: Path | None = None) -> tuple[Run, ...]:
    """Return the runs of layers that may be replaced at once; `file` as in `resolve_spaces`.

    Raises:
        ConfigError: a run that the parent doesn't have.
    """
    return resolve_runs(profile.search_space, num_layers=shape.num_hidden_layers, file=file)


def _own_block(shape: "PuzzleDagConfig") -> Block:
    return Block(Attention("gqa", shape.num_key_value_heads), FFN("swiglu", shape.intermediate_size))


def list_cost_variants(
    profile: Profile, shape: "PuzzleDagConfig", *, file: Path | None = None
) -> tuple[tuple[Attention, ...], tuple[FFN, ...]]:
    """Return what costs must be known for: the sorted union of the layers' variants and of what runs put into layers.

    `file` as in `resolve_spaces`.

    Raises:
        ConfigError: a variant or a run that the parent doesn't allow.
    """
    attentions, ffns = variant_union(resolve_spaces(profile, shape, file=file))
    placed = [block for run in list_runs(profile, shape, file=file) for block in run.blocks(_own_block(shape))]
    return tuple(sorted({*attentions, *(b.attention for b in placed)})), tuple(sorted({*ffns, *(b.ffn for b in placed)}))


def check_lengths(conf: Path, profile: Profile, targets: Mapping[str, Target], shape: "PuzzleDagConfig") -> None:
    """Check that rows and requests fit the parent's context and the budgets a row.

    Args:
        conf: folder of the configuration, whose lines errors name.
        profile: as read.
        targets: targets by name, as read.
        shape: the parent's configuration.

    Raises:
        ConfigError: they don't.
    """
    longest, row = shape.max_position_embeddings, profile.tokens.row_length

    def wrong(field: str, why: str) -> ConfigError:
        return misfit(profile_file(conf, profile.name), ("tokens", field), why, owner=f"profile {profile.name}")

    if row > longest:
        raise wrong("row_length", f"is {row}; the parent takes at most {longest}")
    for field in ("activations", "scores"):
        value = getattr(profile.tokens, field)
        if value < row:
            raise wrong(field, f"is {value}, less than one row of {row}; give at least {row}")
    for target in targets.values():
        total = target.input_length + target.output_length
        if total > longest:
            why = f"+ output_length is {total}; the parent takes at most {longest}"
            raise misfit(target_file(conf, target.name), ("input_length",), why, owner=f"target {target.name}")


def list_placed_blocks(profile: Profile, shape: "PuzzleDagConfig", *, file: Path | None = None) -> list[set[str]]:
    """Return for every layer the blocks that a child may have there, from the layer's space and from runs.

    `file` as in `resolve_spaces`. Raises ConfigError.
    """
    placed = [{block.name for block in space.blocks} for space in resolve_spaces(profile, shape, file=file)]
    for run in list_runs(profile, shape, file=file):
        for layer, block in zip(run.layers, run.blocks(_own_block(shape)), strict=True):
            placed[layer].add(block.name)
    return placed


def read_targets(conf: Path, profile: Profile) -> dict[str, Target]:
    """Read the targets that a profile names, by name. Raises ConfigError; one without a file by the profile's line."""
    file = profile_file(conf, profile.name)
    return {n: read_named(read_target, conf, n, file=file, location=("targets", i)) for i, n in enumerate(profile.targets)}


def check_profile(conf: Path, profile: Profile, shape: "PuzzleDagConfig") -> None:
    """Check a profile with all the files that it names, against its parent's shape.

    Args:
        conf: folder of the configuration.
        profile: the profile, as read.
        shape: the parent's configuration.

    Raises:
        ConfigError: the first thing that can't work; the message names file or field, value and fix.
    """
    file, targets = profile_file(conf, profile.name), read_targets(conf, profile)
    placed = list_placed_blocks(profile, shape, file=file)
    check_lengths(conf, profile, targets, shape)
    for i, name in enumerate(profile.scenarios):
        scenario = read_named(read_scenario, conf, name, file=file, location=("scenarios", i))
        check_scenario(conf, profile, scenario, targets, lambda: placed)
