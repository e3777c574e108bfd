"""Scores of runs: how far the parent's answers move when several layers that follow each other are replaced at once.

A run's score is not the sum of its layers' single scores: what one layer would have given the next is gone as well. All runs
that begin at one layer start from its cached hidden state; each joins the stack of states that goes through the
parent's remaining layers where it ends, so that a layer is run once for all.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from puzzle_dag.architecture import Run
from puzzle_dag.model.fused_ffn import stack_ffns
from puzzle_dag.model.modeling_puzzle_dag import PuzzleDagLayer
from puzzle_dag.model.replacement import make_layer
from puzzle_dag.pieces import NOOP, ActivationCacheLike
from puzzle_dag.progress import Progress, silent
from puzzle_dag.search.divergence import Reference, ScoreSums
from puzzle_dag.search.layer_runner import LayerRunner, ScoreError, cast_parent, check_computing, check_drift
from puzzle_dag.search.task_scores import GradedBlockScore
from puzzle_dag.store import ArtifactStore, fingerprint

if TYPE_CHECKING:
    from puzzle_dag.model.parent import Parent

VERSION = 1
RUN_SCORE_KIND = "run_score"


@dataclass(frozen=True, slots=True)
class RunScore(GradedBlockScore):
    """What replacing a run of layers does to the parent. Of its BlockScore, `layer` is the first layer, `block` the run's name.

    Attributes:
        blocks: the block of each of its layers, e.g. ("kv4/w256", "noop/noop").
        digests: of each of these blocks' pieces, as a single block's digest says it; `digest` is that of all.
    """

    blocks: tuple[str, ...] = ()
    digests: tuple[str, ...] = ()

    def to_row(self) -> dict[str, Any]:
        """Return a flat row; `of_row` reads it back. Tasks are columns of their own."""
        row = {**asdict(self), "blocks": " ".join(self.blocks), "digests": " ".join(self.digests)}
        return {"run": row.pop("block"), "num_layers": len(self.blocks), **{k: v for k, v in row.items() if k != "tasks"}, **self.tasks}

    @staticmethod
    def of_row(row: Mapping[str, Any]) -> "RunScore":
        """Read a row that `to_row` wrote; further columns are scores on tasks."""
        own = {k: row[k] for k in ("layer", "kl", "lm_loss", "top1_agreement", "num_tokens", "digest")}
        known = {*own, "run", "num_layers", "blocks", "digests"}
        tasks = {k: v for k, v in row.items() if k not in known and v is not None}
        return RunScore(block=row["run"], blocks=tuple(row["blocks"].split()), digests=tuple(row["digests"].split()), tasks=tasks, **own)


def digest_run(parent: "Parent", run: Run) -> tuple[str, ...]:
    """Return the digest of each of a run's blocks: a layer without pieces has the one that its no-ops have anywhere."""
    nothing = fingerprint([NOOP, NOOP])
    if run.kind == "drop":
        return (nothing,) * len(run.layers)
    attention = fingerprint({"layer": parent.layer_digest(run.first), "place": "attention"})
    fused = fingerprint({"fused": [parent.layer_digest(layer) for layer in run.layers]})
    return (fingerprint([attention, fused]), *(nothing,) * (len(run.layers) - 1))


def _fused_layer(parent: "Parent", runner: LayerRunner, run: Run) -> PuzzleDagLayer:
    ffns = stack_ffns([parent.layer_state(layer, "ffn") for layer in run.layers])
    state = {**parent.layer_state(run.first, "attention"), **ffns}
    return make_layer(parent, runner.model, run.first, run.blocks(parent.block)[0], state)


def _final_states(
    runner: LayerRunner, states: Tensor, runs: Sequence[Run], fused: Mapping[Run, PuzzleDagLayer]
) -> dict[Run | None, Tensor]:
    """Return the final states [rows, length, hidden] of the parent (None) and with each run replaced.

    Args:
        runner: runs the parent's layers.
        states: what enters the runs' first layer.
        runs: all begin at the same layer.
        fused: the layer that takes the place of each fused run.
    """
    first, num_rows = runs[0].first, len(states)
    names: list[Run | None] = [None]
    stack = states
    for layer in range(first, runner.model.config.num_hidden_layers):
        stack = runner.layer(runner.model.model.layers[layer], layer, stack)
        ending = [run for run in runs if run.last == layer]
        if ending:
            names += ending
            stack = torch.cat([stack, *(runner.layer(fused[run], first, states) if run in fused else states for run in ending)])
    return dict(zip(names, stack.split(num_rows), strict=True))


@torch.inference_mode()
def _score_runs(
    parent: "Parent", runs: Sequence[Run], cache: ActivationCacheLike, *, rows_per_batch: int, dtype: torch.dtype, progress: Progress
) -> dict[Run, ScoreSums]:
    """Run the parent with each of `runs`, which begin at one layer, replaced; return their sums."""
    model, first = cast_parent(parent, dtype), runs[0].first
    device, tokens = model.lm_head.weight.device, cache.tokens("score")
    runner, rows_each = LayerRunner(model, tokens.shape[1]), max(1, rows_per_batch // (len(runs) + 1))
    fused = {run: _fused_layer(parent, runner, run) for run in runs if run.kind == "fuse"}
    sums = {run: ScoreSums() for run in runs}
    for start in range(0, len(tokens), rows_each):
        batch = tokens[start : start + rows_each].to(device)
        stop = start + len(batch)
        states = cache.hidden("score", first, start=start, stop=stop).to(device, dtype)
        final = _final_states(runner, states, runs, fused)
        check_drift(final[None], cache.hidden("score", parent.num_layers, start=start, stop=stop), first)
        reference = Reference(model.lm_head, model.model.norm(final[None]), batch)
        for run in runs:
            sums[run].add(reference, model.lm_head, model.model.norm(final[run]))
        progress(stop * tokens.shape[1] * len(runs), tokens.numel() * len(runs), "tokens")
    return sums


def score_runs(
    parent: "Parent",
    runs: Sequence[Run],
    cache: ActivationCacheLike,
    store: ArtifactStore,
    *,
    activations_digest: str,
    rows_per_batch: int | None = None,
    compute_dtype: str = "bfloat16",
    rescore: bool = False,
    progress: Progress = silent,
) -> list[RunScore]:
    """Score runs that begin at the same layer, each alone in the parent, on the cache's score split.

    Args:
        parent: the parent; computed with on its device, in `compute_dtype` (a copy where its weights have another).
        runs: the runs; () gives no score.
        cache: hidden states of the parent; the boundary of the runs' first layer is read, and the last as a check.
        store: scores are kept here, one a run; only those that are missing are computed.
        activations_digest: digest of `cache`'s content, part of the scores' key.
        rows_per_batch: rows that run through the remaining layers at once, all stacked runs together.
        compute_dtype: "bfloat16" or "float32"; divergences are always taken in float32.
        rescore: compute all runs and replace what is stored.
        progress: told the tokens done, over all runs.

    Returns:
        One score a run, in the order of `runs`.

    Raises:
        ScoreError: the activations are not of this parent, a score is not finite, an unknown dtype.
    """
    dtype, rows_per_batch = check_computing(parent, compute_dtype, rows_per_batch)
    scores: dict[Run, RunScore] = {}
    inputs = {}
    for run in runs:
        assert run.first == runs[0].first, "one cached state for all"
        inputs[run] = {
            "version": VERSION,
            "parent": parent.digest,
            "run": run.name,
            "activations": activations_digest,
            "compute_dtype": compute_dtype,
        }
        if not rescore and (found := store.find(RUN_SCORE_KIND, fingerprint(inputs[run]))):
            scores[run] = RunScore.of_row(found.metadata)
    missing = [run for run in runs if run not in scores]
    if missing:
        sums = _score_runs(parent, missing, cache, rows_per_batch=rows_per_batch, dtype=dtype, progress=progress)
        for run in missing:
            scores[run] = _make_score(parent, run, sums[run])
            _write_score(store, scores[run], inputs[run])
    return [scores[run] for run in runs]


def _make_score(parent: "Parent", run: Run, sums: ScoreSums) -> RunScore:
    kl, lm_loss, agreement = sums.means()
    if not (math.isfinite(kl) and math.isfinite(lm_loss)):
        raise ScoreError(f"{run.name}: gives KL {kl} and LM loss {lm_loss}; leave it out of search_space.runs")
    digests = digest_run(parent, run)
    blocks = tuple(block.name for block in run.blocks(parent.block))
    return RunScore(
        run.first, run.name, kl, lm_loss, agreement, sums.num_tokens, fingerprint(list(digests)), blocks=blocks, digests=digests
    )


def _write_score(store: ArtifactStore, score: RunScore, inputs: Mapping[str, Any]) -> None:
    row = score.to_row()
    store.write(RUN_SCORE_KIND, fingerprint(inputs), lambda _: fingerprint(row), inputs=inputs, metadata=row)
