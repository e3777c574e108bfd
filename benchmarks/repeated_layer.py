"""The rival's way to cost a variant: one base layer against one base layer and ten repeats, all built as a Llama.

For each variant of a place one model is measured, the base layer followed by `NUM_REPEATS` layers that hold the variant
and nothing in the other place: cost = (t(1 + 10) - t(1)) / 10. A no-op costs exactly 0. What is left of t(1)
when its own two costs are taken off is the engine's constant. No regression, no mixtures, one engine a variant a round.
"""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from puzzle_dag.architecture import FFN, Architecture, Attention, Block
from puzzle_dag.config import Target
from puzzle_dag.costs.probes import Variant
from puzzle_dag.costs.rows import RowTemplate
from puzzle_dag.costs.table import CONSTANT, PHASES, CostTable, sort_rows
from puzzle_dag.costs.tabulate import Measurement, group_engines
from puzzle_dag.engine.levelling import Levelling
from puzzle_dag.model.configuration_puzzle_dag import PuzzleDagConfig

NUM_REPEATS = 10
_NOTHING = {"attention": Attention("noop"), "ffn": FFN("noop")}


def as_llama(shape: PuzzleDagConfig) -> PuzzleDagConfig:
    """Return the shape without what Llama lacks: biases, norms of queries and keys, sliding windows."""
    fields: dict[str, Any] = shape.to_dict()
    for name in ("model_type", "per_layer_config", "layer_types"):
        fields.pop(name, None)
    plain = {"family": "llama", "qkv_bias": False, "o_bias": False, "qk_norm": False, "mlp_bias": False, "sliding_window": None}
    return PuzzleDagConfig(**{**fields, **plain})


@dataclass(frozen=True, slots=True)
class RepeatedLayers:
    """The models of the method: the base, and one a variant that is no no-op."""

    base: Architecture
    """One layer, the parent's."""
    repeats: dict[Variant, Architecture]
    """Variant -> the base layer and ten repeats."""

    @staticmethod
    def plan(parent: Block, attentions: Iterable[Attention], ffns: Iterable[FFN]) -> "RepeatedLayers":
        """Return the models for some variants; the parent's own are measured like any other."""
        repeats: dict[Variant, Architecture] = {}
        for attention in sorted({parent.attention, *attentions} - {_NOTHING["attention"]}):
            repeats["attention", attention.name] = (parent, *[Block(attention, FFN("noop"))] * NUM_REPEATS)
        for ffn in sorted({parent.ffn, *ffns} - {_NOTHING["ffn"]}):
            repeats["ffn", ffn.name] = (parent, *[Block(Attention("noop"), ffn)] * NUM_REPEATS)
        return RepeatedLayers((parent,), repeats)

    @property
    def models(self) -> list[Architecture]:
        """Every model, the base first."""
        return [self.base, *self.repeats.values()]

    def plan_engines(self, num_engines: int) -> tuple[int, int]:
        """Return (rounds over all models, engines of the base) that take at least `num_engines` starts.

        What is left over after whole rounds goes to the base, which every cost rests on.
        """
        rounds = max(1, num_engines // len(self.models))
        return rounds, rounds + max(0, num_engines - rounds * len(self.models))

    def tabulate(
        self, shape: PuzzleDagConfig, target: Target, parent: Block, measured: Sequence[Measurement], levelling: Levelling
    ) -> CostTable:
        """Return the method's cost table: medians over the engines, differences over ten; a negative difference counts 0.

        Seconds are levelled as those of the table that it is held against.
        """
        template, rows, engines = RowTemplate.measured(shape, target, measured[0].result), [], group_engines(measured)
        pieces: list[Variant] = [("attention", "noop"), ("ffn", "noop"), *self.repeats, ("constant", CONSTANT)]
        for batch in target.batch_sizes:
            for phase in PHASES:

                def seconds(architecture: Architecture, batch: int = batch, phase: str = phase) -> float:
                    return statistics.median(levelling.seconds(e.at(batch), phase) for e in engines[architecture])

                base_s = seconds(self.base)
                costs = {v: max(0.0, (seconds(model) - base_s) / NUM_REPEATS) for v, model in self.repeats.items()}
                own = costs["attention", parent.attention.name] + costs["ffn", parent.ffn.name]
                costs |= {("attention", "noop"): 0.0, ("ffn", "noop"): 0.0, ("constant", CONSTANT): max(0.0, base_s - own)}
                rows += [template.fill(*piece, batch, phase, seconds=costs[piece]) for piece in pieces]
        return CostTable(sort_rows(rows), target, len(measured), {}, levelling=levelling)
