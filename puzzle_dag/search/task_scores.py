"""Scores of blocks on lm-eval tasks, beside the losses that every block is scored with."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from puzzle_dag.search.score import BlockScore


@dataclass(frozen=True, slots=True)
class GradedBlockScore(BlockScore):
    """A block's losses, and what the parent with this one block exchanged scores on lm-eval tasks.

    Attributes:
        tasks: task -> score, the higher the better.
    """

    tasks: Mapping[str, float] = field(default_factory=dict)


_LOSSES = tuple(f.name for f in fields(BlockScore))


def score_of_row(row: Mapping[str, Any]) -> BlockScore:
    """Return a row of the score table: columns beside a BlockScore's own are scores on tasks."""
    losses = {name: row[name] for name in _LOSSES}
    tasks = {name: value for name, value in row.items() if name not in losses and value is not None}
    return GradedBlockScore(**losses, tasks=tasks) if tasks else BlockScore(**losses)
