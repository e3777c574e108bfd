"""What a child kept of its parent's accuracy, with standard errors that use that both answered the same items."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from puzzle_dag.children.evaluate import TaskResult, make_result

VERSION = 2
"""Version of the formulas; part of the asset's code version."""


class UnpairedResultsError(ValueError):
    """Results of parent and child that were not obtained on the same items."""


@dataclass(frozen=True, slots=True)
class Retention:
    """One task: the child's share of its parent's accuracy."""

    task: str
    """Name of the task."""
    metric: str
    """Metric that is compared; an accuracy."""
    parent: float
    """The parent's accuracy."""
    child: float
    """The child's accuracy."""
    chance: float
    """Accuracy of guessing."""
    raw: float | None
    """child / parent; None where the parent has nothing right."""
    raw_stderr: float | None
    """Paired standard error of `raw`."""
    corrected: float | None
    """(child - chance) / (parent - chance); None where the parent is no better than guessing."""
    corrected_stderr: float | None
    """Paired standard error of `corrected`."""
    num_items: int
    """Items that both answered."""


@dataclass(frozen=True, slots=True)
class Perplexity:
    """One measure of how well text is predicted: no accuracy, so nothing is retained; the lower, the better."""

    task: str
    """Name of the task."""
    metric: str
    """"nats_per_token" or "bits_per_byte"."""
    parent: float
    """The parent's value."""
    child: float
    """The child's value."""
    difference: float
    """child - parent."""
    difference_stderr: float
    """Its paired standard error."""
    num_items: int
    """Documents that both read."""


@dataclass(frozen=True, slots=True)
class MeanRetention:
    """The mean over tasks of the chance-corrected retention."""

    value: float | None
    """Mean over the tasks for which it is defined; None where there is none."""
    stderr: float | None
    """Its standard error over items; the tasks' items are independent of each other."""
    num_tasks: int
    """Tasks that count."""
    left_out: tuple[str, ...]
    """Tasks at which the parent is no better than guessing."""


def paired_ratio(child: Sequence[float], parent: Sequence[float], offset: float = 0.0) -> tuple[float, float] | None:
    """Return r = (mean(child) - offset) / (mean(parent) - offset) and its standard error; None where r makes no sense.

    By the delta method on pairs, var(r) = var(child_i - r * parent_i) / (n * (mean(parent) - offset)^2): an item that
    both get right, or both wrong, adds next to nothing.

    Args:
        child: the child's value of each item.
        parent: the parent's, of the same items.
        offset: what is subtracted from both, e.g. the accuracy of guessing.
    """
    c, p = np.asarray(child, dtype=np.float64), np.asarray(parent, dtype=np.float64)
    gain = float(p.mean()) - offset
    if gain <= 0 or len(p) < 2:
        return None
    ratio = (float(c.mean()) - offset) / gain
    return ratio, float((c - ratio * p).std(ddof=1)) / math.sqrt(len(p)) / gain


def _require_same_items(parent: TaskResult, child: TaskResult) -> None:
    if parent.num_items != child.num_items or parent.chance != child.chance:
        raise UnpairedResultsError(
            f"task {parent.task}: the parent answered {parent.num_items} items (chance {parent.chance}), "
            f"the child {child.num_items} (chance {child.chance}); grade both with the same settings"
        )
    if parent.items_digest != child.items_digest:
        raise UnpairedResultsError(
            f"task {parent.task}: the child was asked other items than its parent, as happens when Python or a data set was updated "
            "in between; grade all again (python -m assets refresh --regrade)"
        )


def _pair(parent: TaskResult, child: TaskResult) -> Retention:
    assert parent.chance is not None
    raw = paired_ratio(child.per_item, parent.per_item)
    corrected = paired_ratio(child.per_item, parent.per_item, parent.chance)
    return Retention(
        task=parent.task,
        metric=parent.metric,
        parent=parent.value,
        child=child.value,
        chance=parent.chance,
        raw=raw[0] if raw else None,
        raw_stderr=raw[1] if raw else None,
        corrected=corrected[0] if corrected else None,
        corrected_stderr=corrected[1] if corrected else None,
        num_items=parent.num_items,
    )


def _compare(parent: TaskResult, child: TaskResult) -> Perplexity:
    differences = [c - p for c, p in zip(child.per_item, parent.per_item, strict=True)]
    found = make_result(parent.task, parent.metric, differences, chance=None, weights=parent.weights)
    return Perplexity(parent.task, parent.metric, parent.value, child.value, found.value, found.stderr, parent.num_items)


def _pairs(
    parent_results: Sequence[TaskResult], child_results: Sequence[TaskResult], *, accuracies: bool
) -> Iterator[tuple[TaskResult, TaskResult]]:
    children = {(r.task, r.metric): r for r in child_results}
    for parent in parent_results:
        if parent.is_accuracy != accuracies:
            continue
        child = children.get((parent.task, parent.metric))
        if child is None:
            raise UnpairedResultsError(f"task {parent.task}: the child has no {parent.metric}; grade both with the same settings")
        _require_same_items(parent, child)
        yield parent, child


def retention(parent_results: Sequence[TaskResult], child_results: Sequence[TaskResult]) -> list[Retention]:
    """Return the retention of each accuracy in `parent_results`, in their order; `perplexities` returns the others.

    Raises:
        UnpairedResultsError: the child lacks a task of the parent's, or was graded on other items.
    """
    return [_pair(*pair) for pair in _pairs(parent_results, child_results, accuracies=True)]


def perplexities(parent_results: Sequence[TaskResult], child_results: Sequence[TaskResult]) -> list[Perplexity]:
    """Return parent and child side by side for each result that is no accuracy; errors are those of `retention`."""
    return [_compare(*pair) for pair in _pairs(parent_results, child_results, accuracies=False)]


def mean_retention(retentions: Sequence[Retention], *, task_prefix: str = "skill_") -> MeanRetention:
    """Return the mean chance-corrected retention over the tasks whose names start with `task_prefix` ("" takes all)."""
    chosen = [r for r in retentions if r.task.startswith(task_prefix)]
    values = [(r.corrected, r.corrected_stderr) for r in chosen if r.corrected is not None and r.corrected_stderr is not None]
    left_out = tuple(r.task for r in chosen if r.corrected is None)
    if not values:
        return MeanRetention(None, None, 0, left_out)
    mean = sum(v for v, _ in values) / len(values)
    return MeanRetention(mean, math.sqrt(sum(e * e for _, e in values)) / len(values), len(values), left_out)
