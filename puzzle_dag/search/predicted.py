"""The frontier as it is predicted: the least summed KL divergence that each speed, memory and latency allows, before any child is trained.

Throughput is swept over all batch sizes, the best being kept. Memory and latency would be least at the smallest batch
whatever the model, so they are compared at one: that of the parent's best throughput.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Literal

from puzzle_dag.architecture import Architecture, Block
from puzzle_dag.config import ConstraintName, Scenario
from puzzle_dag.piece_costs import CostSource, PieceCosts
from puzzle_dag.progress import Progress, silent
from puzzle_dag.search.candidates import Candidates, ScoreTable, block_names
from puzzle_dag.search.frontier import parent_point, sweep
from puzzle_dag.search.limits import Measure, make_measure
from puzzle_dag.search.solution import Solution
from puzzle_dag.search.solver import least_total

VERSION = 2
NUM_POINTS = 20
"""Points of each curve."""
QUANTITIES: Mapping[ConstraintName, Literal["at_least", "at_most"]] = {
    "throughput_tokens_per_s": "at_least",
    "memory_bytes": "at_most",
    "latency_s": "at_most",
}
"""What is swept, and which side of it is bounded."""
PointKind = Literal["curve", "parent", "scenario", "searched"]
"""A point of the curve, the parent, what a scenario's child is made from, or what its search first found."""
_FARTHEST = 16.0
"""A model that is this many times as fast, or as small, has hardly a layer left; curves end there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictedPoint:
    """One model on one predicted frontier."""

    target: str
    """Name of the target."""
    quantity: str
    """What the frontier is against: throughput_tokens_per_s, memory_bytes or latency_s."""
    kind: PointKind
    """What it is a point of."""
    scenario: str | None
    """The scenario's name; None for the others."""
    kl: float
    """Summed KL divergence of the chosen blocks, in nats; 0 for the parent."""
    value: float
    """The quantity, in the unit of its name."""
    ratio: float
    """The same as a multiple of the parent's: throughput at the parent's own best batch size, the others at `batch`."""
    batch: int
    """Batch size that the value holds at."""
    status: str
    """How the search ended: optimal, or time_limit; "given" for the parent."""
    gap: float | None
    """Proven relative gap; None where nothing was proven."""
    blocks: str
    """Block of each layer."""
    costs: CostSource
    """Where the costs behind `value` come from."""


def predict_frontier(
    scores: ScoreTable,
    costs: PieceCosts,
    parent_block: Block,
    solutions: Mapping[str, Solution],
    *,
    searched: Mapping[str, Solution] = {},
    num_points: int = NUM_POINTS,
    time_limit_s: float = 20.0,
    progress: Progress = silent,
) -> list[PredictedPoint]:
    """Return the predicted frontiers of one target: a curve for each quantity, the parent and the scenarios' solutions.

    Args:
        scores: of every layer's blocks, layer by layer.
        costs: of the target.
        parent_block: the parent's own block.
        solutions: scenario -> what its child is made from, on this target.
        searched: scenario -> what its search found, where a refinement or a trial made another child of it.
        num_points: of each curve, in even ratios from the parent to the best value that any choice reaches.
        time_limit_s: for each program.
        progress: told the points done, quantity by quantity.
    """
    parent: Architecture = (parent_block,) * len(scores)
    reference = parent_point(costs, parent_block, len(scores)).batch
    candidates, points = Candidates.of(scores, parent_block), list[PredictedPoint]()
    for quantity, side in QUANTITIES.items():
        own = make_measure(quantity, costs, reference).of(parent)
        if not 0 < own < math.inf:
            continue  # costs that say nothing

        point = partial(_point, costs, quantity, own)
        points.append(point("parent", 0.0, reference, parent, status="given", gap=None))
        bounds = _bounds(candidates, costs, quantity, reference, own, num_points)
        scenario = _swept(costs, quantity, side, None if side == "at_least" else reference)
        found = sweep(
            scores,
            {costs.target: costs},
            scenario,
            parent_block,
            constraint=quantity,
            values=bounds,
            time_limit_s=time_limit_s,
            progress=progress,
        )
        for one in (p.solution for p in found if p.solution is not None):
            points.append(point("curve", one.objective, one.batch, one.architecture, status=one.status, gap=one.gap))
        named: list[tuple[PointKind, str, Solution]] = [
            *(("scenario", name, solution) for name, solution in solutions.items()),
            *(("searched", name, solution) for name, solution in searched.items()),
        ]
        for kind, name, solution in named:
            kl = _summed_kl(scores, solution)
            if kl is not None:
                batch = solution.batch if side == "at_least" else reference
                points.append(point(kind, kl, batch, solution.architecture, scenario=name, status=solution.status, gap=solution.gap))
    # On a tiny model noise swallows whole layers: what is left is said to take no time, which is no point of a frontier.
    return [p for p in points if math.isfinite(p.value)]


def _point(
    costs: PieceCosts,
    quantity: ConstraintName,
    own: float,
    kind: PointKind,
    kl: float,
    batch: int,
    architecture: Architecture,
    *,
    status: str,
    gap: float | None,
    scenario: str | None = None,
) -> PredictedPoint:
    """Return an architecture as a point; `own` is the parent's value."""
    value = make_measure(quantity, costs, batch).of(architecture)
    return PredictedPoint(
        target=costs.target,
        quantity=quantity,
        kind=kind,
        scenario=scenario,
        kl=kl,
        value=value,
        ratio=value / own,
        batch=batch,
        status=status,
        gap=gap,
        blocks=" ".join(block.name for block in architecture),
        costs=costs.source,
    )


def _swept(costs: PieceCosts, quantity: ConstraintName, side: str, batch: int | None) -> Scenario:
    """Return the scenario whose one bound is swept, at one batch size or, with None, at all."""
    at = {} if batch is None else {"at": {"batch": batch}}
    content = {
        "version": 1,
        "name": f"frontier-{costs.target}",
        "target": costs.target,
        "constraints": {quantity: {side: 1.0, "relative_to": "parent", **at}},
        "batch_sizes": "all" if batch is None else (batch,),
        "uptrain": {"tokens": 0},
    }
    return Scenario.model_validate(content)


def _bounds(
    candidates: Candidates, costs: PieceCosts, quantity: ConstraintName, reference: int, own: float, num_points: int
) -> list[float]:
    """Return the bounds as multiples of the parent's value, the loosest first; none is the very best value, which rounding may miss."""
    batches = costs.batch_sizes if quantity == "throughput_tokens_per_s" else (reference,)
    reached = [_best(candidates, make_measure(quantity, costs, batch)) for batch in batches]
    farthest = max(reached) / own if quantity == "throughput_tokens_per_s" else min(reached) / own
    farthest = min(max(farthest, 1 / _FARTHEST), _FARTHEST)
    return [farthest ** (k / (num_points + 0.5)) for k in range(1, num_points + 1)]


def _best(candidates: Candidates, measure: Measure) -> float:
    """Return the best value that a quantity can take: of what follows from the least sum."""
    least = least_total(candidates.program(()), candidates.amounts(measure))
    return float(measure.value(measure.constant + Fraction(max(0.0, least))))


def _summed_kl(scores: ScoreTable, solution: Solution) -> float | None:
    """Return the summed KL of a solution; None where a block is not among the scores. A run counts once.

    The objective may be something else: another score, or the measured loss of a refined child.
    """
    known = {s.block if len(block_names(s)) > 1 else (s.layer, s.block): s.kl for layer in scores for s in layer}
    found = [known.get(replacement) for replacement in dict.fromkeys(c.run or (c.layer, c.block) for c in solution.choices)]
    return None if None in found else math.fsum(kl for kl in found if kl is not None)
