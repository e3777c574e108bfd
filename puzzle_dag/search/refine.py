"""Refinement: a solution improved step by step with scores that know what else was replaced.

The summed score takes every block to act alone. Around a solution the child itself says better: what it loses, and what
exchanging one block of it would change (`search/context.py`). The sum of such changes is true for one exchange and a first-order
estimate for several, so each step solves the same program with these numbers and lets only so many layers change (a trust
region). A step is kept if the child that it leads to, measured, is better; else fewer layers may change. What a refinement
ends with is never worse than what it began with, on the tokens that blocks are scored on.
"""

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from puzzle_dag.architecture import Architecture, Block
from puzzle_dag.config import LOSSES, Scenario
from puzzle_dag.piece_costs import PieceCosts
from puzzle_dag.progress import Progress, silent
from puzzle_dag.search.candidates import Candidates, ScoreTable
from puzzle_dag.search.context import Context, measure_in_context, score_in_context
from puzzle_dag.search.divergence import ScoreSums
from puzzle_dag.search.layer_runner import ScoreError
from puzzle_dag.search.limits import ScenarioError
from puzzle_dag.search.score import BlockScore, pair_digest
from puzzle_dag.search.solution import Solution
from puzzle_dag.search.solve import prepare, solve_candidates
from puzzle_dag.store import ArtifactStore

VERSION = 1

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Losses:
    """What a child loses on the tokens that blocks are scored on, in the units of the scores of that name."""

    kl: float
    """Mean KL(parent || child), nats a token."""
    lm_loss: float
    """Its next-token loss, nats a token."""
    top1_loss: float
    """Share of tokens at which its most likely next token is another than the parent's."""

    @staticmethod
    def of(sums: ScoreSums) -> "Losses":
        """Return a child's own."""
        kl, lm_loss, agreement = sums.means()
        return Losses(kl, lm_loss, 1.0 - agreement)


@dataclass(frozen=True, slots=True)
class Step:
    """A child that a refinement tried."""

    round: int
    """Which scores in context it was found with, from 1; 0 is the solution that the refinement began with."""
    radius: int
    """Layers that it was allowed to change."""
    num_changed: int
    """Layers that it changed."""
    predicted: float
    """Loss that the scores in context promised."""
    measured: float | None
    """Loss of the child; None where its outputs were not finite."""
    is_kept: bool
    """Whether it is better than what there was."""
    blocks: str
    """Block of each layer."""

    @property
    def words(self) -> str:
        """The step in a line of a log."""
        measured = "nothing finite" if self.measured is None else f"{self.measured:.4f}"
        kept = "kept" if self.is_kept else "not kept"
        return f"round {self.round}, {self.num_changed} layers changed: {self.predicted:.4f} promised, {measured} measured, {kept}"


@dataclass(frozen=True, slots=True)
class Refinement:
    """What a refinement ended with."""

    solution: Solution
    """Of the best child: its objective is the measured loss, its status "feasible", and nothing is proven of it."""
    steps: tuple[Step, ...]
    """What was tried, in order, the solution that it began with first."""

    @property
    def losses(self) -> tuple[float, ...]:
        """Measured losses of the children that were kept: what it began with first, what it ended with last."""
        return tuple(step.measured for step in self.steps if step.is_kept and step.measured is not None)


def check_refinable(scenario: Scenario) -> None:
    """Check that a scenario is one that scores in context speak of. Raises ScenarioError."""
    if not scenario.objective.is_summed_losses:
        raise ScenarioError(
            f"scenario {scenario.name}: objective: it can't be refined, only {', '.join(LOSSES)} and sums of these without budgets; "
            "change the objective, or take `refinement` out of the profile"
        )


def refine_solution(
    solution: Solution,
    table: ScoreTable,
    costs: Mapping[str, PieceCosts],
    scenario: Scenario,
    context: Context,
    store: ArtifactStore,
    *,
    num_rounds: int,
    earlier: Mapping[str, Scenario] | None = None,
    rescore: bool = False,
    time_limit_s: float = 600.0,
    progress: Progress = silent,
) -> Refinement:
    """Improve a solution under the constraints of its scenario.

    Args:
        solution: where to begin; of this table and these costs.
        table: the scores of blocks alone, which say what may be chosen and, for `earlier`, what was.
        costs: as `solve_scenario`.
        scenario: as `solve_scenario`; its objective is the loss that falls.
        context: the parent, the pieces and the tokens.
        store: scores in context are kept here.
        num_rounds: how often scores are taken in context, at most; each costs what scoring all blocks alone does.
        earlier: as `solve_scenario`.
        rescore: take scores in context anew.
        time_limit_s: for each program.
        progress: told the layers scored, round by round.

    Returns:
        The solution and all steps. The score of a choice is that of the block alone, as in `solution`; what loosening a
        bound would buy is carried over from there.

    Raises:
        ScenarioError: the objective is none that scores in context speak of, or the solution has runs.
        ScoreError: the library changed since the blocks were scored, or the first child's outputs are not finite.
        PieceMissingError: a variant was never made.
    """
    check_refinable(scenario)
    if solution.runs:
        raise ScenarioError(f"scenario {scenario.name}: its solution has runs, which can't be refined: {', '.join(solution.runs)}")
    _check_pieces(table, context)
    start = time.monotonic()
    candidates = prepare(table, costs, scenario, context.parent.block, earlier=earlier)
    parent = Losses.of(measure_in_context(context, candidates.parent))
    search = _Search(candidates, costs, scenario, parent.lm_loss, time_limit_s)
    trail = _Trail.begin(solution, search, context)
    for number in range(1, num_rounds + 1):
        scores = score_in_context(context, trail.best.architecture, store, rescore=rescore, progress=progress)
        if not trail.go_on(number, scores):
            break
    alone = {(s.layer, s.block): float(c) for s, c in zip(candidates.scores, candidates.costs(scenario.objective), strict=True)}
    done = replace(
        trail.best,
        status="feasible",
        objective=trail.loss,
        bound=None,
        gap=None,
        choices=tuple(replace(choice, score=alone[choice.layer, choice.block]) for choice in trail.best.choices),
        batches=tuple(replace(outcome, bound=None) for outcome in trail.best.batches),
        seconds=solution.seconds + time.monotonic() - start,
        loosened=solution.loosened,
    )
    return Refinement(done, tuple(trail.steps))


@dataclass(frozen=True, slots=True)
class _Search:
    """A scenario's program, solved with scores in context."""

    candidates: Candidates
    costs: Mapping[str, PieceCosts]
    scenario: Scenario
    parent_lm_loss: float
    time_limit_s: float

    def loss(self, losses: Losses) -> float:
        """Return the scenario's objective for a whole child."""
        values = {**asdict(losses), "lm_loss": losses.lm_loss - self.parent_lm_loss}
        return math.fsum(weight * values[name] for name, weight in self.scenario.objective.weights.items())

    def near(self, scores: Sequence[Sequence[BlockScore]], losses: Losses, architecture: Architecture, radius: int) -> Solution:
        """Return the best child within `radius` layers of another, by the scores in its context."""
        table = [[_share(score, losses, len(architecture), self.parent_lm_loss) for score in layer] for layer in scores]
        candidates = self.candidates.rescored(table).close_to(architecture, radius)
        # An increment over the parent's loss is what the table holds already.
        candidates = replace(candidates, parent_scores=tuple(replace(s, lm_loss=0.0) for s in candidates.parent_scores))
        return solve_candidates(candidates, self.costs, self.scenario, time_limit_s=self.time_limit_s)


@dataclass(slots=True)
class _Trail:
    """Where a refinement is, and what it tried on the way."""

    search: _Search
    context: Context
    best: Solution
    loss: float
    radius: int
    measured: dict[Architecture, Losses]
    steps: list[Step]

    @staticmethod
    def begin(solution: Solution, search: _Search, context: Context) -> "_Trail":
        """Measure the solution to begin with."""
        losses = Losses.of(measure_in_context(context, solution.architecture))
        loss = search.loss(losses)
        if not math.isfinite(loss):
            raise ScoreError(f"scenario {solution.scenario}: the outputs of its child are not finite; train the library again")
        first = _as_step(0, 0, solution, solution, loss, loss, True)
        return _Trail(search, context, solution, loss, len(solution.choices), {solution.architecture: losses}, [first])

    def go_on(self, number: int, scores: Sequence[Sequence[BlockScore]]) -> bool:
        """Take the best step that scores in the child promise, fewer layers at a time until one is better; say whether there was one."""
        architecture = self.best.architecture
        while self.radius:
            found = self.search.near(scores, self.measured[architecture], architecture, self.radius)
            if found.architecture == architecture:
                break  # nothing within reach is promised to be better
            if found.architecture not in self.measured:
                self.measured[found.architecture] = Losses.of(measure_in_context(self.context, found.architecture))
            loss = self.search.loss(self.measured[found.architecture])
            step = _as_step(number, self.radius, found, self.best, found.objective, loss, loss < self.loss)
            self.steps.append(step)
            _log.info("%s: %s", found.scenario, step.words)
            if step.is_kept:
                self.best, self.loss = found, loss
                return True
            self.radius = min(self.radius, step.num_changed) // 2
        return False


def _share(score: BlockScore, losses: Losses, num_layers: int, parent_lm_loss: float) -> BlockScore:
    """Return a score in context as a summand: the child's loss in even shares, and what the exchange changes of it.

    Of the blocks that are there the sum is then the child's own loss; of others, the loss that is expected of them.
    """
    top1_loss = losses.top1_loss / num_layers + (1.0 - score.top1_agreement) - losses.top1_loss
    return replace(
        score,
        kl=losses.kl / num_layers + score.kl - losses.kl,
        lm_loss=(losses.lm_loss - parent_lm_loss) / num_layers + score.lm_loss - losses.lm_loss,
        top1_agreement=1.0 - top1_loss,
    )


def _check_pieces(table: ScoreTable, context: Context) -> None:
    """Check that the scores are of the pieces at hand. Raises ScoreError."""
    for layer, (scores, pieces) in enumerate(zip(table, context.pieces, strict=True)):
        changed = [s.block for s in scores if s.digest != pair_digest(pieces, Block.parse(s.block))]
        if changed:
            raise ScoreError(f"layer {layer}: the library's {changed[0]} changed after it was scored; run `python -m assets refresh`")


def _as_step(number: int, radius: int, found: Solution, before: Solution, predicted: float, loss: float, is_kept: bool) -> Step:
    num_changed = sum(a != b for a, b in zip(found.architecture, before.architecture, strict=True))
    measured = loss if math.isfinite(loss) else None
    return Step(number, radius, num_changed, predicted, measured, is_kept, " ".join(c.block for c in found.choices))
