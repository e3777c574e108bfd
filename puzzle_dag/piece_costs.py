"""What pieces cost on one target, as plain numbers: what a cost table is turned into for the search.

The search knows nothing of engines or tables. It sees, for every (layer, place, variant), parameters, bytes and
seconds, plus what the model costs beside its blocks; a model's cost is the sum of its pieces' and the constant.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Literal, get_args

from puzzle_dag.architecture import Architecture, Block

if TYPE_CHECKING:  # importing it takes seconds, for it knows tensors; a search doesn't
    from puzzle_dag.pieces import Place

Phase = Literal["prefill", "decode"]
CostSource = Literal["measured", "imported", "analytic"]
"""Where seconds come from: an engine on this machine, an engine on another, or published peaks; the firmest first."""
Seconds = Mapping[int, Mapping[Phase, float]]
"""Batch size -> phase -> seconds of one run of that phase at the target's lengths."""


def weakest_source(sources: Iterable[CostSource]) -> CostSource:
    """Return the least firm of some costs' sources: what rests on all of them is as firm as that one. Raises ValueError for none."""
    return max(sources, key=get_args(CostSource).index)


@dataclass(frozen=True, slots=True)
class PieceCost:
    """The cost of one piece (or of what is left of a model without its blocks).

    `seconds[batch]["prefill"]` is the time that it adds to the prefill of a whole batch, `["decode"]` what it adds
    to the rest of the generation, after the first token. Raises ValueError for a negative or non-finite number.
    """

    parameters: int
    weight_bytes: int
    kv_bytes_per_token: int
    seconds: Seconds

    def __post_init__(self) -> None:
        for name in ("parameters", "weight_bytes", "kv_bytes_per_token"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} = {getattr(self, name)}: a cost can't be negative")
        for batch, phases in self.seconds.items():
            for phase, value in phases.items():
                if not (math.isfinite(value) and value >= 0):
                    raise ValueError(f"seconds[{batch}][{phase!r}] = {value}: must be finite and not negative; measure the target again")


@dataclass(frozen=True, slots=True)
class PieceCosts:
    """Costs of every piece on one target.

    Attributes:
        target: the target's name.
        input_length: prompt tokens a request.
        output_length: generated tokens a request.
        batch_sizes: measured batch sizes, increasing.
        pieces: (layer, place, variant name) -> cost; "noop" is there too.
        constant: embeddings, final norm, head, and the engine's own time.
        digest: of the cost table that these numbers come from.
        source: where the seconds come from; a solution carries it along, so that an estimate never passes for a measurement.
    """

    target: str
    input_length: int
    output_length: int
    batch_sizes: tuple[int, ...]
    pieces: "Mapping[tuple[int, Place, str], PieceCost]"
    constant: PieceCost
    digest: str
    source: CostSource = "measured"

    @staticmethod
    def same_in_every_layer(
        pieces: "Mapping[tuple[Place, str], PieceCost]", *, num_layers: int
    ) -> "dict[tuple[int, Place, str], PieceCost]":
        """Return `pieces` for a model whose layers all have one shape, so that a variant costs the same in each."""
        return {(layer, place, name): cost for layer in range(num_layers) for (place, name), cost in pieces.items()}

    def of_block(self, layer: int, block: Block) -> tuple[PieceCost, PieceCost]:
        """Return the costs of a block's two pieces. Raises ValueError for a variant that was not measured."""
        return self.of_piece(layer, "attention", block.attention.name), self.of_piece(layer, "ffn", block.ffn.name)

    def of_piece(self, layer: int, place: "Place", name: str) -> PieceCost:
        """Return the cost of one piece. Raises ValueError for a variant that was not measured."""
        try:
            return self.pieces[layer, place, name]
        except KeyError:
            measured = sorted({n for i, p, n in self.pieces if i == layer and p == place})
            raise ValueError(
                f"target {self.target}: {place} {name} of layer {layer} has no cost; measured are {', '.join(measured) or 'none'}. "
                f"Measure the target with this variant in the search space"
            ) from None

    def _of(self, architecture: Architecture) -> Iterable[PieceCost]:
        yield self.constant
        for layer, block in enumerate(architecture):
            yield from self.of_block(layer, block)

    def check_batch(self, batch: int) -> int:
        """Return `batch`. Raises ValueError, naming what was measured, where it was not."""
        if batch not in self.batch_sizes:
            measured = ", ".join(map(str, self.batch_sizes))
            raise ValueError(
                f"target {self.target}: batch {batch} was not measured; use one of {measured}, or add it to the target's batch_sizes"
            )
        return batch

    def seconds(self, architecture: Architecture, batch: int, phase: Phase) -> Fraction:
        """Return the exact sum of an architecture's seconds in a phase."""
        self.check_batch(batch)
        return sum((Fraction(c.seconds[batch][phase]) for c in self._of(architecture)), Fraction(0))

    def parameters(self, architecture: Architecture) -> int:
        """Return an architecture's number of parameters."""
        return sum(c.parameters for c in self._of(architecture))

    def weight_bytes(self, architecture: Architecture) -> int:
        """Return the bytes of an architecture's weights."""
        return sum(c.weight_bytes for c in self._of(architecture))

    def kv_bytes_per_token(self, architecture: Architecture) -> int:
        """Return the KV cache's bytes a token, over all layers."""
        return sum(c.kv_bytes_per_token for c in self._of(architecture))
