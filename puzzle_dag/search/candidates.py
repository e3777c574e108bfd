"""The candidates of a search: every scored block of every layer and every scored run of layers, and the program over them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np

from puzzle_dag.architecture import Architecture, Block
from puzzle_dag.config import LOSSES, Objective
from puzzle_dag.search.limits import Limit, Measure, ScenarioError, SumLimit
from puzzle_dag.search.program import Floats, Indices, Item, Program, Row

if TYPE_CHECKING:  # they bring tensors along, which a search doesn't need
    from puzzle_dag.pieces import Place
    from puzzle_dag.search.score import BlockScore

ScoreTable = Sequence[Sequence["BlockScore"]]
"""Scores of each layer's blocks, layer by layer. `task_scores.GradedBlockScore` among them bring lm-eval tasks along;
`run_score.RunScore` stand for the runs that begin at the layer."""
AnyLimit = Limit | SumLimit
"""A bound of a cost, or of a summed score."""


@dataclass(frozen=True, slots=True)
class Candidates:
    """Scored blocks and runs, flat over the layers, in the order of the program's items.

    `blocks` are those that a candidate puts into its layers, one for most, several for a run. `different_from` holds
    architectures and the number of layers that an answer must differ from each in; `max_distinct` is how many different
    blocks it may have, and `near` an architecture and the number of layers that an answer may differ from it in at most. Candidate i is
    made of the `pieces` that `pieces_of[first_piece[i]:first_piece[i + 1]]` says. `known_sums` keeps what `amounts` has worked out, for the
    bounds of a sweep differ while the sums stay. `structure` says in words what a scenario asks of the blocks, and `free` are all
    candidates that there were before.
    """

    scores: "tuple[BlockScore, ...]"
    blocks: tuple[Architecture, ...]
    items: tuple[Item, ...]
    parent: Architecture
    pieces: "tuple[tuple[int, Place, str], ...]"
    pieces_of: Indices
    first_piece: Indices
    parent_scores: "tuple[BlockScore, ...]"
    different_from: tuple[tuple[Architecture, int], ...] = ()
    max_distinct: int | None = None
    near: tuple[Architecture, int] | None = None
    structure: str = ""
    free: "Candidates | None" = field(default=None, compare=False)
    known_sums: dict[tuple[str, str, str, int, int], Floats] = field(default_factory=dict, compare=False)

    @staticmethod
    def of(table: ScoreTable, parent_block: Block) -> "Candidates":
        """Flatten a score table. Raises ScenarioError where a layer has no score, or none for the parent's own block."""
        for layer, scores in enumerate(table):
            if parent_block.name not in {s.block for s in scores} or any(s.layer != layer for s in scores):
                raise ScenarioError(f"scores of layer {layer} are incomplete: the parent's block {parent_block.name} must be among them")
        flat = tuple(score for scores in table for score in scores)
        names = [block_names(s) for s in flat]
        parsed = {name: Block.parse(name) for name in {name for several in names for name in several}}
        blocks = tuple(tuple(parsed[name] for name in several) for several in names)
        made_of = [list(_pieces(s.layer, own)) for s, own in zip(flat, blocks, strict=True)]
        index = {piece: i for i, piece in enumerate(dict.fromkeys(piece for several in made_of for piece in several))}
        return Candidates(
            flat,
            blocks,
            tuple(_item(s.layer, several) for s, several in zip(flat, names, strict=True)),
            (parent_block,) * len(table),
            tuple(index),
            np.array([index[piece] for several in made_of for piece in several]),
            _starts(made_of),
            tuple(next(s for s in scores if s.block == parent_block.name) for scores in table),
        )

    def restricted(self, kept: Sequence[int], *, max_distinct: int | None) -> "Candidates":
        """Return only the given candidates, of which an answer may have `max_distinct` different blocks."""
        indices = list(kept)
        bounds = [*self.first_piece.tolist(), len(self.pieces_of)]
        made_of = [self.pieces_of[bounds[i] : bounds[i + 1]] for i in indices]
        return replace(
            self,
            scores=tuple(self.scores[i] for i in indices),
            blocks=tuple(self.blocks[i] for i in indices),
            items=tuple(self.items[i] for i in indices),
            pieces_of=np.concatenate(made_of),
            first_piece=_starts(made_of),
            max_distinct=max_distinct,
            known_sums={},
        )

    def without_structure(self) -> "Candidates":
        """Return all candidates that there were before a structure was asked for."""
        return self if self.free is None else self.free

    def differing(self, architecture: Architecture, num_layers: int) -> "Candidates":
        """Return the same candidates, with an answer that must differ from `architecture` in `num_layers` or more."""
        return replace(self, different_from=(*self.different_from, (architecture, num_layers)))

    def close_to(self, architecture: Architecture, num_layers: int) -> "Candidates":
        """Return the same candidates, with an answer that may differ from `architecture` in `num_layers` at most."""
        return replace(self, near=(architecture, num_layers))

    def rescored(self, table: ScoreTable) -> "Candidates":
        """Return the same candidates with other scores; the structure stays."""
        scores = {(s.layer, s.block): s for layer in table for s in layer}
        own = tuple(scores[s.layer, s.block] for s in self.parent_scores)
        return replace(self, scores=tuple(scores[s.layer, s.block] for s in self.scores), parent_scores=own)

    def placed_names(self) -> Iterator[tuple[int, str]]:
        """Yield layer and block for each layer of each candidate."""
        for item, own in zip(self.items, self.blocks, strict=True):
            yield from ((layer, block.name) for layer, block in zip(item.layers, own, strict=True))

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return len(self.parent)

    def costs(self, objective: Objective) -> Floats:
        """Return what each candidate adds to the objective's summed score. Raises ScenarioError for a score that isn't there."""
        terms = [weight * self.losses(name) for name, weight in objective.weights.items()]
        return sum(terms[1:], terms[0])

    def losses(self, score: str) -> Floats:
        """Return what each candidate loses of one score: its distance from the parent's own block in the same layer.

        `kl` in nats, as it is; `lm_loss` as the increment over the parent's, in nats; `top1_loss` as the share of
        tokens without agreement; an lm-eval task as what the parent scores above it. Raises ScenarioError for a
        score that the table hasn't.
        """
        if score == "kl":
            return np.array([s.kl for s in self.scores])
        if score == "top1_loss":
            return np.array([1.0 - s.top1_agreement for s in self.scores])
        if score == "lm_loss":
            return np.array([s.lm_loss - self.parent_scores[s.layer].lm_loss for s in self.scores])
        graded = [_tasks(s) for s in (*self.scores, *self.parent_scores)]
        missing = [s for s, tasks in zip((*self.scores, *self.parent_scores), graded, strict=True) if score not in tasks]
        if missing:
            known = [*LOSSES, *sorted(set.intersection(*({*tasks} for tasks in graded)))]
            near = get_close_matches(score, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            where = f"layer {missing[0].layer}'s block {missing[0].block}"
            raise ScenarioError(f"objective: {where} has no score {score!r}{hint} All blocks have {', '.join(known)}")
        return np.array([self._parent_task(s.layer, score) - _tasks(s)[score] for s in self.scores])

    def _parent_task(self, layer: int, task: str) -> float:
        return _tasks(self.parent_scores[layer])[task]

    def sums(self, limit: AnyLimit) -> Floats:
        """Return what each candidate adds to the sum behind a limit."""
        return self.losses(limit.name) if isinstance(limit, SumLimit) else self.amounts(limit.measure)

    def total(self, limit: AnyLimit, chosen: Sequence[int]) -> Fraction:
        """Return the exact sum behind a limit for chosen items."""
        if isinstance(limit, SumLimit):
            return _exact(self.losses(limit.name), chosen)
        return limit.measure.total(self.architecture(chosen))

    def amounts(self, measure: Measure) -> Floats:
        """Return what each candidate adds to the sum behind a measure, as floats."""
        if measure.name == "num_attention_layers":
            return np.array([float(sum(block.attention.kind == "gqa" for block in own)) for own in self.blocks])
        key = (measure.name, measure.costs.target, measure.costs.digest, measure.batch, measure.length)
        if key not in self.known_sums:
            amounts = np.array([float(measure.amount(measure.costs.of_piece(*piece))) for piece in self.pieces])
            self.known_sums[key] = np.add.reduceat(amounts[self.pieces_of], self.first_piece)
        return self.known_sums[key]

    def row(self, limit: AnyLimit) -> Row:
        """Return a limit as a row of the program."""
        lower, upper = limit.sum_bounds()
        constant = Fraction(0) if isinstance(limit, SumLimit) else limit.measure.constant
        return Row(
            limit.name,
            self.sums(limit),
            -np.inf if lower is None else float(lower - constant),
            np.inf if upper is None else float(upper - constant),
        )

    def program(self, limits: Sequence[AnyLimit]) -> Program:
        """Return the program that these limits and the structure make."""
        rows = [self.row(limit) for limit in limits]
        rows += [Row("difference", self._kept_of(other), upper=self.num_layers - least) for other, least in self.different_from]
        if self.near is not None:
            rows.append(Row("nearness", self._kept_of(self.near[0]), lower=self.num_layers - self.near[1]))
        return Program(self.num_layers, self.items, tuple(rows), self.max_distinct)

    def _kept_of(self, architecture: Architecture) -> Floats:
        """Return the number of layers in which each candidate is what an architecture has there."""
        placed = zip(self.items, self.blocks, strict=True)
        return np.array([float(sum(b == architecture[i] for i, b in zip(item.layers, own, strict=True))) for item, own in placed])

    def architecture(self, chosen: Sequence[int]) -> Architecture:
        """Return the architecture of chosen items."""
        assert [layer for i in chosen for layer in self.items[i].layers] == list(range(self.num_layers))
        return tuple(block for i in chosen for block in self.blocks[i])

    def meets(self, limits: Sequence[AnyLimit]) -> Callable[[tuple[int, ...]], bool]:
        """Return the check that a choice meets the limits, in exact arithmetic, and the structure."""

        def is_met(chosen: tuple[int, ...]) -> bool:
            return self.has_structure(chosen) and all(limit.is_met(self.total(limit, chosen)) for limit in limits)

        return is_met

    def has_structure(self, chosen: Sequence[int]) -> bool:
        """Say whether a choice has few enough different blocks, and differs from others in as many layers as it must and may."""
        own = self.architecture(chosen)
        few = self.max_distinct is None or len(set(own)) <= self.max_distinct
        close = self.near is None or num_different_layers(own, self.near[0]) <= self.near[1]
        return few and close and all(num_different_layers(own, other) >= least for other, least in self.different_from)

    def exact_sum(self, costs: Floats, chosen: Sequence[int]) -> float:
        """Return the exact sum of chosen costs, rounded once."""
        return float(_exact(costs, chosen))


def num_different_layers(one: Architecture, other: Architecture) -> int:
    """Return in how many layers two architectures have another block."""
    return sum(a != b for a, b in zip(one, other, strict=True))


def block_names(score: "BlockScore") -> tuple[str, ...]:
    """Return the block that a score's replacement puts into each of its layers: its own, or a run's several (a RunScore)."""
    several: tuple[str, ...] = getattr(score, "blocks", ())
    return several or (score.block,)


def placed_digests(score: "BlockScore") -> Iterator[tuple[int, str, str]]:
    """Yield layer, block and digest of the pieces for each layer that a score's replacement covers."""
    digests: tuple[str, ...] = getattr(score, "digests", ()) or (score.digest,)
    for offset, (name, digest) in enumerate(zip(block_names(score), digests, strict=True)):
        yield score.layer + offset, name, digest


def _pieces(layer: int, blocks: Architecture) -> "Iterator[tuple[int, Place, str]]":
    for index, block in enumerate(blocks, start=layer):
        yield index, "attention", block.attention.name
        yield index, "ffn", block.ffn.name


def _item(layer: int, names: tuple[str, ...]) -> Item:
    first, *others = dict.fromkeys(names)
    return Item(first, tuple(range(layer, layer + len(names))), tuple(others))


def _starts(made_of: "Sequence[Sequence[object]] | Sequence[Indices]") -> Indices:
    return np.cumsum([0, *(len(several) for several in made_of)])[:-1]


def _exact(costs: Floats, chosen: Sequence[int]) -> Fraction:
    return sum((Fraction(float(costs[i])) for i in chosen), Fraction(0))


def _tasks(score: "BlockScore") -> Mapping[str, float]:
    """Return a block's lm-eval scores by task, where it was graded (a GradedBlockScore)."""
    found: Mapping[str, float] = getattr(score, "tasks", {})
    return found
