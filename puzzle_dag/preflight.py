"""What is checked before any compute is spent: that a profile's files fit each other and the parent, and that the disk has room.

Reads configuration and the parent's config.json only; takes milliseconds.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from puzzle_dag.architecture import LayerSpace
from puzzle_dag.config import ConfigError, Profile, Scenario, Target, read_scenario, read_target, resolve_space
from puzzle_dag.model.configuration_puzzle_dag import PuzzleDagConfig

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_SPARE_SHARE = 0.05
_SPARE_BYTES = 256 * 2**20


class DiskFullError(ValueError):
    """The disk has less room than a stage will write."""


def activations_bytes(shape: PuzzleDagConfig, num_tokens: int, dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16") -> int:
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


def resolve_spaces(profile: Profile, shape: PuzzleDagConfig) -> list[LayerSpace]:
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


def check_lengths(profile: Profile, targets: Mapping[str, Target], shape: PuzzleDagConfig) -> None:
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


def check_scenario(scenario: Scenario, targets: Mapping[str, Target]) -> None:
    """Check that a scenario's target is the profile's and has the batch sizes and costs that it names. Raises ConfigError."""
    where = f"scenario {scenario.name}"
    target = targets.get(scenario.target)
    if target is None:
        known = ", ".join(sorted(targets))
        raise ConfigError(f"{where}: target is {scenario.target!r}, which the profile doesn't measure; use one of {known}")
    if scenario.costs == "analytic" and target.hardware == "local-cpu":
        raise ConfigError(f"{where}: costs is 'analytic', but target {target.name} is the machine at hand, which is measured; leave it out")
    if scenario.batch_sizes != "all":
        unknown = sorted(set(scenario.batch_sizes) - set(target.batch_sizes))
        if unknown or not scenario.batch_sizes:
            measured = list(target.batch_sizes)
            raise ConfigError(f"{where}: batch_sizes is {list(scenario.batch_sizes)}; target {target.name} measures {measured}")
    for name, bound in scenario.constraints.items():
        timed = name in ("throughput_tokens_per_s", "latency_s", "ttft_s", "tpot_s")
        if timed and bound.at is not None and bound.at.batch not in target.batch_sizes:
            field = f"constraints.{name}.at.batch"
            raise ConfigError(f"{where}: {field} is {bound.at.batch}; target {target.name} measures {list(target.batch_sizes)}")


def check_profile(conf: Path, profile: Profile, shape: PuzzleDagConfig) -> None:
    """Check a profile with all the files that it names, against its parent's shape.

    Args:
        conf: folder of the configuration.
        profile: the profile, as read.
        shape: the parent's configuration.

    Raises:
        ConfigError: the first thing that can't work; the message names file or field, value and fix.
    """
    resolve_spaces(profile, shape)
    targets = {name: read_target(conf, name) for name in profile.targets}
    check_lengths(profile, targets, shape)
    for name in profile.scenarios:
        check_scenario(read_scenario(conf, name), targets)
