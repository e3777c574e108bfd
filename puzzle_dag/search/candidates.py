"""The candidates of a search: every scored block of every layer, and the integer program over them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from puzzle_dag.architecture import Architecture, Block
from puzzle_dag.config import Objective
from puzzle_dag.pieces import Place
from puzzle_dag.search.limits import Limit, Measure, ScenarioError
from puzzle_dag.search.program import Floats, Indices, Item, Program, Row
from puzzle_dag.search.score import BlockScore

ScoreTable = Sequence[Sequence[BlockScore]]
"""Scores of each layer's blocks, layer by layer."""


@dataclass(frozen=True, slots=True)
class Candidates:
    """Scored blocks, flat over the layers, in the order of the program's items.

    `attention_pieces` and `ffn_pieces` say, for each candidate, which of `pieces` it is made of.
    """

    scores: tuple[BlockScore, ...]
    blocks: tuple[Block, ...]
    items: tuple[Item, ...]
    parent: Architecture
    pieces: tuple[tuple[int, Place, str], ...]
    attention_pieces: Indices
    ffn_pieces: Indices

    @staticmethod
    def of(table: ScoreTable, parent_block: Block) -> "Candidates":
        """Flatten a score table. Raises ScenarioError where a layer has no score, or none for the parent's own block."""
        for layer, scores in enumerate(table):
            if parent_block.name not in {s.block for s in scores} or any(s.layer != layer for s in scores):
                raise ScenarioError(f"scores of layer {layer} are incomplete: the parent's block {parent_block.name} must be among them")
        flat = tuple(score for scores in table for score in scores)
        parsed = {name: Block.parse(name) for name in {s.block for s in flat}}
        blocks = tuple(parsed[s.block] for s in flat)
        attentions: list[tuple[int, Place, str]] = [(s.layer, "attention", b.attention.name) for s, b in zip(flat, blocks, strict=True)]
        ffns: list[tuple[int, Place, str]] = [(s.layer, "ffn", b.ffn.name) for s, b in zip(flat, blocks, strict=True)]
        index = {piece: i for i, piece in enumerate(dict.fromkeys((*attentions, *ffns)))}
        return Candidates(
            flat,
            blocks,
            tuple(Item(s.block, (s.layer,)) for s in flat),
            (parent_block,) * len(table),
            tuple(index),
            np.array([index[p] for p in attentions]),
            np.array([index[p] for p in ffns]),
        )

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return len(self.parent)

    def costs(self, objective: Objective) -> Floats:
        """Return what each candidate adds to the objective, nats or shares: its score's distance from the parent's.

        `kl` as it is; `lm_loss` as the increment over the parent's own block in the same layer; `top1_loss` as the
        share of tokens without agreement.
        """
        if objective.minimize == "kl":
            return np.array([s.kl for s in self.scores])
        if objective.minimize == "top1_loss":
            return np.array([1.0 - s.top1_agreement for s in self.scores])
        own = {s.layer: s.lm_loss for s, b in zip(self.scores, self.blocks, strict=True) if b == self.parent[s.layer]}
        return np.array([s.lm_loss - own[s.layer] for s in self.scores])

    def sums(self, measure: Measure) -> Floats:
        """Return what each candidate adds to the sum behind a measure, as floats."""
        if measure.name == "num_attention_layers":
            return np.array([float(block.attention.kind == "gqa") for block in self.blocks])
        amounts = np.array([float(measure.amount(measure.costs.of_piece(*piece))) for piece in self.pieces])
        return np.asarray(amounts[self.attention_pieces] + amounts[self.ffn_pieces])

    def row(self, limit: Limit) -> Row:
        """Return a limit as a row of the program."""
        lower, upper = limit.sum_bounds()
        constant = limit.measure.constant
        return Row(
            limit.name,
            self.sums(limit.measure),
            -np.inf if lower is None else float(lower - constant),
            np.inf if upper is None else float(upper - constant),
        )

    def program(self, limits: Sequence[Limit]) -> Program:
        """Return the program that these limits make."""
        return Program(self.num_layers, self.items, tuple(self.row(limit) for limit in limits))

    def architecture(self, chosen: Sequence[int]) -> Architecture:
        """Return the architecture of chosen items."""
        assert [self.scores[i].layer for i in chosen] == list(range(self.num_layers))
        return tuple(self.blocks[i] for i in chosen)

    def meets(self, limits: Sequence[Limit]) -> Callable[[tuple[int, ...]], bool]:
        """Return the check that a choice meets the limits in exact arithmetic."""

        def is_met(chosen: tuple[int, ...]) -> bool:
            architecture = self.architecture(chosen)
            return all(limit.is_met(limit.measure.total(architecture)) for limit in limits)

        return is_met

    def exact_sum(self, costs: Floats, chosen: Sequence[int]) -> float:
        """Return the exact sum of chosen costs, rounded once."""
        return float(sum((Fraction(float(costs[i])) for i in chosen), Fraction(0)))
