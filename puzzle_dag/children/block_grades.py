"""Grades of blocks: what the parent with one block, or one run of layers, exchanged scores on lm-eval tasks.

Puzzle's task-based scores (arXiv 2411.19146, section 4.2): where a deployment is about some tasks, what each block loses on these
says more than a divergence. lm-eval itself grades the parent with the block in it; the layers before are run once for all
blocks of a layer. Every (block, task) is stored when it is there, so an interrupted run goes on.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from puzzle_dag.architecture import Architecture, LayerSpace, Run
from puzzle_dag.children import evaluate, tasks
from puzzle_dag.children.assemble import place_state
from puzzle_dag.children.evaluate import TaskResult, evaluate_model
from puzzle_dag.children.shared_prefix import SharedPrefix
from puzzle_dag.config import BundledCorpus, TaskScoreSettings, TextCorpus
from puzzle_dag.model.replacement import make_layer, replaced_layers
from puzzle_dag.pieces import LayerPieces, piece_name
from puzzle_dag.progress import Progress, silent
from puzzle_dag.store import ArtifactStore, fingerprint

if TYPE_CHECKING:
    from puzzle_dag.model.parent import Parent

log = logging.getLogger(__name__)

VERSION = 1
GRADE_KIND = "block_grade"


class TaskScoreError(ValueError):
    """A task that gives no accuracy."""


@dataclass(frozen=True, slots=True)
class BlockGrade:
    """What the parent with one replacement scores on one task.

    Attributes:
        layer: index of the (first) layer.
        block: name of the block, "kv4/w384", or of the run, "drop_3-5".
        task: lm-eval's name of the task.
        metric: "acc", "acc_norm" or "exact_match", the higher the better.
        value: mean over the items.
        stderr: standard error of the mean.
        num_items: items.
    """

    layer: int
    block: str
    task: str
    metric: str
    value: float
    stderr: float
    num_items: int


@dataclass(frozen=True, slots=True)
class Replacement:
    """What is put into the parent: a block a layer from `layer` on, with the pieces that they are made of."""

    name: str
    layer: int
    blocks: Architecture
    pieces: tuple[LayerPieces, ...]
    digest: str
    """Of the pieces; "" for the parent's own block, which is the same model in every layer."""


def list_replacements(parent: "Parent", layer: int, space: LayerSpace, pieces: LayerPieces, runs: Sequence[Run]) -> list[Replacement]:
    """Return every pair of a layer's space, the parent's own first, then the runs that begin at the layer."""
    found = []
    for block in sorted(space.blocks, key=lambda b: (b != parent.block, b)):
        digests = [pieces.digest("attention", block.attention.name), pieces.digest("ffn", block.ffn.name)]
        found.append(Replacement(block.name, layer, (block,), (pieces,), "" if block == parent.block else fingerprint([layer, *digests])))
    for run in runs:
        blocks = run.blocks(parent.block)
        fused = {piece_name("ffn", blocks[0].ffn.name): tuple(run.layers)} if run.kind == "fuse" else {}
        own = tuple(LayerPieces(i, {}, fused=fused if i == run.first else {}) for i in run.layers)
        found.append(Replacement(run.name, layer, blocks, own, fingerprint([run.name])))
    return found


def _layer_states(parent: "Parent", replacement: Replacement) -> dict[int, Mapping[str, Tensor]]:
    """Return the tensors of each replaced layer."""
    states: dict[int, Mapping[str, Tensor]] = {}
    for offset, (block, pieces) in enumerate(zip(replacement.blocks, replacement.pieces, strict=True)):
        layer = replacement.layer + offset
        attention = place_state(parent, pieces, layer, "attention", block.attention.name)
        states[layer] = {**attention, **place_state(parent, pieces, layer, "ffn", block.ffn.name)}
    return states


def _grade_inputs(
    parent: "Parent", replacement: Replacement, task: str, settings: TaskScoreSettings, corpus: BundledCorpus | TextCorpus, items: Any
) -> dict[str, Any]:
    return {
        "versions": [VERSION, evaluate.VERSION, tasks.VERSION],
        "parent": parent.digest,
        "dtype": str(parent.model.lm_head.weight.dtype),
        "replacement": replacement.digest,
        "task": task,
        "settings": settings.model_dump(exclude={"tasks"}),
        "corpus": corpus.model_dump(),
        "items": items,
    }


def _make_grade(replacement: Replacement, result: TaskResult) -> BlockGrade:
    if not result.is_accuracy:
        raise TaskScoreError(
            f"task_scores.tasks: {result.task} gives {result.metric}, which is no accuracy; leave it out (every block has `lm_loss`)"
        )
    shown = {k: getattr(result, k) for k in ("task", "metric", "value", "stderr", "num_items")}
    return BlockGrade(replacement.layer, replacement.name, **shown)


def grade_blocks(
    parent: "Parent",
    replacements: Sequence[Replacement],
    settings: TaskScoreSettings,
    corpus: BundledCorpus | TextCorpus,
    store: ArtifactStore,
    data_folder: Path,
    *,
    regrade: bool = False,
    progress: Progress = silent,
) -> list[BlockGrade]:
    """Grade replacements that begin at the same layer, each alone in the parent, with lm-eval.

    Args:
        parent: the loaded parent; while a replacement is graded it stands in the parent's own model.
        replacements: from `list_replacements`.
        settings: tasks, items and batch size.
        corpus: says which invented world the bundled skills ask about.
        store: grades are kept here, one a replacement and task; only those that are missing are computed.
        data_folder: where the bundled tasks' files go.
        regrade: compute all and replace what is stored.
        progress: told of the replacements graded, so that it can say how long the others will take.

    Returns:
        One grade a replacement and task, in their order.

    Raises:
        UnknownTaskError: a bundled task that there is none of.
        TaskScoreError: a task gives no accuracy.
        PieceMissingError: a variant was never made.
    """
    items = {t: tasks.item_sources([t]) for t in settings.tasks}
    keys = {(r.name, t): _grade_inputs(parent, r, t, settings, corpus, items[t]) for r in replacements for t in settings.tasks}
    grades: dict[tuple[str, str], BlockGrade] = {}
    for replacement in replacements:
        for task in settings.tasks:
            found = None if regrade else store.find(GRADE_KIND, fingerprint(keys[replacement.name, task]))
            if found is not None:
                # The parent's own block is stored once, for whichever layer came first.
                grades[replacement.name, task] = BlockGrade(**{**found.metadata, "layer": replacement.layer})
    missing = [r for r in replacements if any((r.name, t) not in grades for t in settings.tasks)]
    log.info("layer %d: %d of %d blocks to grade on %d tasks", replacements[0].layer, len(missing), len(replacements), len(settings.tasks))
    prefixes: dict[tuple[str, ...], SharedPrefix] = {}
    progress(0, len(missing), "blocks")
    for done, replacement in enumerate(missing, start=1):
        wanted = tuple(t for t in settings.tasks if (replacement.name, t) not in grades)
        prefix = prefixes.setdefault(wanted, SharedPrefix(parent.model, replacement.layer))
        for result in _grade(parent, replacement, wanted, prefix, settings, corpus, data_folder):
            grade, inputs = _make_grade(replacement, result), keys[replacement.name, result.task]
            grades[replacement.name, result.task] = grade
            _write_grade(store, grade, inputs)
        progress(done, len(missing), "blocks")
    return [grades[r.name, t] for r in replacements for t in settings.tasks]


def _grade(
    parent: "Parent",
    replacement: Replacement,
    wanted: Sequence[str],
    prefix: SharedPrefix,
    settings: TaskScoreSettings,
    corpus: BundledCorpus | TextCorpus,
    data_folder: Path,
) -> list[TaskResult]:
    model = parent.model
    states = _layer_states(parent, replacement)
    blocks = dict(zip(states, replacement.blocks, strict=True))
    layers = {layer: make_layer(parent, model, layer, blocks[layer], state) for layer, state in states.items()}
    with prefix.using(), replaced_layers(model, layers):
        return evaluate_model(model, parent.tokenizer, wanted, settings.grading, corpus, data_folder, seed=settings.seed)


def _write_grade(store: ArtifactStore, grade: BlockGrade, inputs: Mapping[str, Any]) -> None:
    content = asdict(grade)
    store.write(GRADE_KIND, fingerprint(inputs), lambda _: fingerprint(content), inputs=inputs, metadata=content)
