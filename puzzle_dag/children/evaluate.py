"""Grade a checkpoint with lm-eval: accuracy of every item, so that parent and child can be compared in pairs."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from puzzle_dag.children.tasks import draw_tasks, is_local, write_tasks
from puzzle_dag.config import AccuracySettings, BundledCorpus, TextCorpus
from puzzle_dag.model.checkpoint import load_checkpoint, register_auto_classes
from puzzle_dag.model.modeling_puzzle_dag import PuzzleDagForCausalLM
from puzzle_dag.progress import Progress, silent
from puzzle_dag.store import fingerprint

VERSION = 2
"""Version of how results are read; part of the asset's code version."""

_DEFAULT_WORLD_SEED = 7
# Where a task reports several metrics, the one that papers quote.
_METRICS = ("acc_norm", "acc", "exact_match", "bits_per_byte")


class TaskResultError(ValueError):
    """A task whose results can't be used: no known metric, or no items."""


@dataclass(frozen=True, slots=True)
class TaskResult:
    """One metric of one task: the mean over items, and every item."""

    task: str
    """Name of the task as asked for."""
    metric: str
    """"acc", "acc_norm" or "exact_match" (larger is better); "nats_per_token" or "bits_per_byte" (smaller is better)."""
    value: float
    """Mean of `per_item`, weighted by `weights`."""
    stderr: float
    """Standard error of the mean."""
    chance: float | None
    """Accuracy of guessing; None where the metric is no accuracy."""
    num_items: int
    """Items or documents."""
    per_item: list[float]
    """Value of each item, in the order of the data."""
    weights: list[float] | None = None
    """Tokens or bytes of each document; None where every item counts the same."""
    items_digest: str = ""
    """Digest of what was asked, item by item; results are paired only where theirs are the same."""

    @property
    def is_accuracy(self) -> bool:
        """Whether larger is better and `chance` is known."""
        return self.chance is not None


def make_result(
    task: str,
    metric: str,
    per_item: list[float],
    *,
    chance: float | None,
    weights: list[float] | None = None,
    items_digest: str = "",
) -> TaskResult:
    """Return a result with its mean and the standard error of a (weighted) mean.

    Raises:
        TaskResultError: there are no items.
    """
    if not per_item:
        raise TaskResultError(f"task {task}: lm-eval returned no items; check the task's data")
    each = weights or [1.0] * len(per_item)
    total = sum(each)
    value = sum(w * x for w, x in zip(each, per_item, strict=True)) / total
    num_items = len(per_item)
    # of a ratio of sums (delta method); for equal weights the usual s / sqrt(n)
    spread = sum((w * (x - value)) ** 2 for w, x in zip(each, per_item, strict=True))
    stderr = math.sqrt(spread * num_items / (num_items - 1)) / total if num_items > 1 else math.nan
    return TaskResult(task, metric, value, stderr, chance, num_items, per_item, weights, items_digest)


def _digest_items(samples: Sequence[Mapping[str, Any]]) -> str:
    """Return the digest of what lm-eval asked, in its order: every item's requests and the answer that counts as right."""
    return fingerprint([[repr(s["arguments"]), repr(s.get("target"))] for s in samples])


def _graded_result(task: str, samples: Sequence[Mapping[str, Any]]) -> TaskResult:
    metric = next((m for m in _METRICS if m in samples[0]["metrics"]), None)
    if metric is None:
        raise TaskResultError(f"task {task}: reports {samples[0]['metrics']}, none of {', '.join(_METRICS)}; leave it out")
    first_filter = samples[0]["filter"]
    kept = [s for s in samples if s["filter"] == first_filter]
    is_choice = all(len(s["arguments"]) > 1 for s in kept)
    chance = sum(1 / len(s["arguments"]) for s in kept) / len(kept) if is_choice else 0.0
    return make_result(task, metric, [float(s[metric]) for s in kept], chance=chance, items_digest=_digest_items(kept))


def _perplexity_results(task: str, samples: Sequence[Mapping[str, Any]], tokenizer: Any) -> list[TaskResult]:
    texts = [s["arguments"][0][0] for s in samples]
    nats = [-float(s["filtered_resps"][0]) for s in samples]
    num_tokens = [float(len(ids)) for ids in tokenizer(texts)["input_ids"]]
    num_bytes = [float(len(t.encode())) for t in texts]
    measures = (("nats_per_token", num_tokens, 1.0), ("bits_per_byte", num_bytes, math.log(2)))
    digest = _digest_items(samples)
    return [
        make_result(task, metric, [x / n / unit for x, n in zip(nats, sizes, strict=True)], chance=None, weights=sizes, items_digest=digest)
        for metric, sizes, unit in measures
    ]


def _run_lm_eval(model: PuzzleDagForCausalLM, tokenizer: Any, settings: AccuracySettings, names: Sequence[str], **options: Any) -> Any:
    """Run lm-eval's `simple_evaluate`; imported here because it takes seconds and most of the package needs none of it."""
    import datasets
    import lm_eval
    import lm_eval.api.task
    import lm_eval.evaluator
    from lm_eval.tasks import TaskManager

    from puzzle_dag.children.shared_context import SharedContextLM

    include_path, progress, hub = options["include_path"], options["progress"], not all(is_local(n) for n in names)
    for noisy in ("lm_eval", "datasets", "httpx"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    lm_eval.api.task.tqdm = partial(lm_eval.api.task.tqdm, disable=True)  # one bar a task, of milliseconds, and no option against it
    # Nobody reads the report on this machine that comes with every answer; pip, compilers and the processor are asked for it, for seconds.
    lm_eval.evaluator.add_env_info = lambda storage: None
    return lm_eval.simple_evaluate(
        model=SharedContextLM(model, tokenizer, batch_size=settings.batch_size, progress=progress),
        tasks=list(names),
        num_fewshot=settings.num_fewshot,
        limit=settings.num_items if hub else None,  # our own tasks' files hold as many items as are asked for
        task_manager=TaskManager(include_path=str(include_path), include_defaults=hub),
        bootstrap_iters=0,
        log_samples=True,
    )


def _item_options(settings: AccuracySettings, corpus: BundledCorpus | TextCorpus, seed: int) -> dict[str, Any]:
    world_seed = corpus.world_seed if isinstance(corpus, BundledCorpus) else _DEFAULT_WORLD_SEED
    return {"num_items": settings.num_items, "task_items": settings.task_items, "world_seed": world_seed, "seed": seed}


def draw_items(
    tasks: Sequence[str], settings: AccuracySettings, corpus: BundledCorpus | TextCorpus, *, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """Return what the local tasks would ask; arguments and errors as for `evaluate_checkpoint`. Nothing is graded or written."""
    return draw_tasks(tasks, **_item_options(settings, corpus, seed))


def evaluate_model(
    model: PuzzleDagForCausalLM,
    tokenizer: Any,
    tasks: Sequence[str],
    settings: AccuracySettings,
    corpus: BundledCorpus | TextCorpus,
    data_folder: Path,
    *,
    seed: int = 0,
    progress: Progress = silent,
) -> list[TaskResult]:
    """Grade a loaded model; arguments and errors as for `evaluate_checkpoint`."""
    write_tasks(tasks, data_folder, **_item_options(settings, corpus, seed))
    found: dict[str, list[Any]] = {}
    for names in ([t for t in tasks if is_local(t)], [t for t in tasks if not is_local(t)]):
        if names:
            answered = _run_lm_eval(model, tokenizer, settings, names, include_path=data_folder, progress=progress)
            for task in names:
                leaves = answered.get("group_subtasks", {}).get(task) or [task]
                found[task] = [s for leaf in leaves for s in answered["samples"][leaf]]
    results: list[TaskResult] = []
    for task in tasks:
        samples = found[task]
        if not samples:
            raise TaskResultError(f"task {task}: lm-eval returned no items; check the task's data")
        if "bits_per_byte" in samples[0]["metrics"]:
            results += _perplexity_results(task, samples, tokenizer)
        else:
            results.append(_graded_result(task, samples))
    return results


def evaluate_checkpoint(
    folder: Path,
    tasks: Sequence[str],
    settings: AccuracySettings,
    corpus: BundledCorpus | TextCorpus,
    data_folder: Path,
    *,
    dtype: str | None = None,
    device: str = "cpu",
    seed: int = 0,
    progress: Progress = silent,
) -> list[TaskResult]:
    """Grade a checkpoint with lm-eval on the same items as any other with the same arguments.

    Args:
        folder: a checkpoint that `save_checkpoint` wrote; for the parent use `evaluate_model`.
        tasks: lm-eval task names; our own need no network.
        settings: items a task, questions a batch, solved examples before each question.
        corpus: says which invented world the skills ask about.
        data_folder: where our tasks' files and the data sets' cache go.
        dtype: compute type; by default the checkpoint's own.
        device: where the model runs.
        seed: seed of our tasks' items.
        progress: told of the choices scored.

    Returns:
        One result a task, two for perplexity (nats a token, bits a byte), in the order of `tasks`.

    Raises:
        UnknownTaskError: a `skill_` task that there is no skill for.
        TaskResultError: a task gave no usable result.
    """
    model = load_checkpoint(folder, dtype=dtype, device=device)
    register_auto_classes()  # or transformers asks whether to run the checkpoint's own code
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return evaluate_model(model, tokenizer, tasks, settings, corpus, data_folder, seed=seed, progress=progress)
