"""The held-out check: random models that were no probes, what the costs predict for them, and what engines measure.

Held-out models and probes are measured in the same rounds, so that a slow minute of the machine hits both alike.
"""

import hashlib
import statistics
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, replace

from puzzle_dag.architecture import FFN, NO_BLOCK, Architecture, Attention, Block
from puzzle_dag.config import Target
from puzzle_dag.costs.comparison import Comparison, TimedPhase, compare
from puzzle_dag.costs.measure import measure_models, measure_target, plan_target
from puzzle_dag.costs.table import CostTable
from puzzle_dag.model.configuration_puzzle_dag import PuzzleDagConfig
from puzzle_dag.progress import Progress, silent
from puzzle_dag.store import ArtifactStore

VERSION = 2
"""Version of the draw and of the comparison; part of the asset's code version."""

ENOUGH_MODELS = 8
"""Held-out models from which on a verdict counts."""
SMALLEST_BATCH = 8
"""Batch size from which on predictions are judged; below, the engine's own overhead is most of a step."""
MEDIAN_LIMIT = 0.03
"""Largest median error that passes."""
WORST_LIMIT = 0.08
"""Largest error of any model that passes."""
NOISE_FACTOR = 1.2
"""Where this multiple of the repeat noise is more than a limit, it takes the limit's place: no model predicts noise."""
JUDGED: tuple[TimedPhase, ...] = ("prefill", "total")
_DRAWS_PER_MODEL = 200


def _pick(candidates: Sequence[Block], draw: str) -> Block:
    """Return one of the candidates, each with the same chance: the one whose name, hashed with `draw`, comes first."""
    return min(candidates, key=lambda block: hashlib.blake2b(f"{draw}/{block.name}".encode(), digest_size=8).digest())


def draw_models(
    blocks: Sequence[Sequence[Block]],
    num_models: int,
    *,
    known: Collection[Architecture] = (),
    seed: int = 0,
    own_width: int | None = None,
) -> list[Architecture]:
    """Draw different random models that keep attention somewhere and are none of `known`; fewer where the space has no more.

    By rendezvous hashing (Thaler and Ravishankar, 1998): each layer of each model takes the candidate with the smallest hash, so
    every candidate has the same chance, and one that is added changes just the places that it takes itself. What was measured of
    the other models stays good.

    Args:
        blocks: the candidates of each layer, in any order.
        num_models: models wanted.
        known: models that are out of the question, such as the probes.
        seed: the same seed and space give the same models.
        own_width: the parent's FFN width; the layers that a wider FFN was fused of are left out after it, as in a child.
    """
    drawn = dict.fromkeys(known)
    num_known = len(drawn)
    for draw in range(num_models * _DRAWS_PER_MODEL):
        if len(drawn) == num_known + num_models:
            break
        architecture = tuple(_pick(candidates, f"{seed}/{draw}/{layer}") for layer, candidates in enumerate(blocks))
        if own_width is not None:
            architecture = leave_out_fused(architecture, own_width)
        if any(b.attention.kind == "gqa" for b in architecture):
            drawn.setdefault(architecture)
    return list(drawn)[num_known:]


def leave_out_fused(architecture: Architecture, own_width: int) -> Architecture:
    """Return the architecture without the layers whose FFNs went into a wider one before; what doesn't fit gets the parent's width.

    Args:
        architecture: any blocks; an FFN of n times `own_width` stands for a run of n layers.
        own_width: the parent's FFN width.
    """
    blocks: list[Block] = []
    for block in architecture:
        if len(blocks) == len(architecture):
            break
        num_layers = max(1, block.ffn.intermediate_size // own_width)
        if len(blocks) + num_layers > len(architecture):
            num_layers, block = 1, Block(block.attention, FFN("swiglu", own_width))
        blocks += [block, *(NO_BLOCK,) * (num_layers - 1)]
    return tuple(blocks)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """How well held-out models were predicted at one batch size in one phase."""

    batch: int
    """Concurrent requests."""
    phase: TimedPhase
    """"prefill" or "total"."""
    num_models: int
    """Held-out models."""
    median_error: float
    """Median over the models of the absolute relative error."""
    worst_error: float
    """Largest of them."""
    median_noise: float
    """Median over the same models of the difference between engines; 0 where each had only one."""
    worst_noise: float
    """Largest of them."""

    @property
    def median_limit(self) -> float:
        """The median error that passes."""
        return max(MEDIAN_LIMIT, NOISE_FACTOR * self.median_noise)

    @property
    def worst_limit(self) -> float:
        """The largest error that passes."""
        return max(WORST_LIMIT, NOISE_FACTOR * self.worst_noise)

    @property
    def passed(self) -> bool:
        """Whether both errors are within their limits."""
        return self.median_error <= self.median_limit and self.worst_error <= self.worst_limit


def judged_batches(batch_sizes: Iterable[int]) -> list[int]:
    """Return the batch sizes that are judged: from 8 on, or the largest where there is none."""
    sizes = sorted(batch_sizes)
    return [b for b in sizes if b >= SMALLEST_BATCH] or sizes[-1:]


def judge(rows: Iterable[Comparison]) -> list[Verdict]:
    """Return the verdicts on held-out models, one for each judged batch size and phase; rows of probes are left out."""
    heldout = [r for r in rows if r.kind == "held out"]
    verdicts = []
    for batch in judged_batches({r.batch for r in heldout}):
        for phase in JUDGED:
            found = [r for r in heldout if (r.batch, r.phase) == (batch, phase)]
            errors, noises = [abs(r.error) for r in found], [r.noise or 0.0 for r in found]
            verdicts.append(
                Verdict(
                    batch=batch,
                    phase=phase,
                    num_models=len(found),
                    median_error=statistics.median(errors),
                    worst_error=max(errors),
                    median_noise=statistics.median(noises),
                    worst_noise=max(noises),
                )
            )
    return verdicts


def measure_and_compare(
    shape: PuzzleDagConfig,
    parent_block: Block,
    target: Target,
    attentions: Iterable[Attention],
    ffns: Iterable[FFN],
    store: ArtifactStore,
    *,
    remeasure: bool = False,
    progress: Progress = silent,
) -> tuple[CostTable, list[Comparison]]:
    """Measure a target's costs, and `target.heldout_models` models beside the probes, and hold the table against all of them.

    Args and errors are those of `measure_target`. The models are drawn from all pairs of the variants, at the parent's
    depth; every engine is stored like a probe, so a second call measures nothing.

    Returns:
        The table, and one comparison a (probe or held-out model, batch size, phase), which the table's provenance has, too.
    """
    attentions, ffns = sorted({parent_block.attention, *attentions}), sorted({parent_block.ffn, *ffns})
    probes = [p.architecture for p in plan_target(shape, parent_block, target, attentions, ffns)]
    blocks = [[Block(a, f) for a in attentions for f in ffns]] * shape.num_hidden_layers
    heldout = draw_models(blocks, target.heldout_models, known=probes, own_width=parent_block.ffn.intermediate_size)
    rounds = measure_models(shape, [*probes, *heldout], target, store, remeasure=remeasure, progress=progress)
    # Without a second engine nobody could say how much of an error is noise.
    twice = target.model_copy(update={"engines_per_probe": max(2, target.engines_per_probe)})
    anew = remeasure and target.engines_per_probe < twice.engines_per_probe
    again = measure_models(shape, heldout, twice, store, remeasure=anew, progress=progress) if heldout else []
    table = measure_target(shape, parent_block, target, attentions, ffns, store)
    of_probes = set(probes)
    rows = compare(table, [m for m in rounds if m.architecture in of_probes], "probe") + compare(table, again, "held out")
    assert table.provenance is not None  # it was measured, just now or before
    return replace(table, provenance=replace(table.provenance, comparisons=tuple(asdict(r) for r in rows))), rows
