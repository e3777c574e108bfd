"""One row of a cost table: what its target says, what the variant weighs by arithmetic, and the seconds that somebody found."""

from dataclasses import dataclass
from typing import Literal

from puzzle_dag.config import Target
from puzzle_dag.costs.memory import NumberTypes, count_kv_bytes_per_token, count_weight_bytes, size_variant
from puzzle_dag.costs.table import CostPlace, CostRow
from puzzle_dag.engine.jobs import EngineResult
from puzzle_dag.model.configuration_puzzle_dag import PuzzleDagConfig
from puzzle_dag.piece_costs import Phase


@dataclass(frozen=True, slots=True, kw_only=True)
class RowTemplate:
    """What all rows of one table share: parent, target, and the machine and engine that their seconds are of."""

    shape: PuzzleDagConfig
    """The parent's configuration."""
    target: Target
    """The target, complete."""
    hardware: str
    """Processor or GPU."""
    num_threads: int
    """CPU threads of the engine; 0 on GPUs."""
    engine_version: str
    """Distribution and version of the engine."""
    source: Literal["measured", "analytic"]
    """Where the seconds come from; those of a no-op come from its construction."""

    @staticmethod
    def measured(shape: PuzzleDagConfig, target: Target, result: EngineResult) -> "RowTemplate":
        """Return the template of a table that engines measured, of which `result` is one's: all ran on one machine."""
        return RowTemplate(
            shape=shape,
            target=target,
            hardware=result.hardware,
            num_threads=result.num_threads,
            engine_version=result.engine_version,
            source="measured",
        )

    def fill(
        self,
        place: CostPlace,
        variant: str,
        batch: int,
        phase: Phase,
        *,
        seconds: float,
        error: float = 0.0,
        noise: float = 0.0,
        mixing_s: float = 0.0,
    ) -> CostRow:
        """Return the row of one variant at one batch size in one phase.

        Args:
            place: where the variant stands.
            variant: its name.
            batch: concurrent requests.
            phase: "prefill" or "decode".
            seconds: time it adds to the phase, for the whole batch.
            error: standard error of `seconds`.
            noise: relative standard deviation between engines that measured the same model.
            mixing_s: the part of `seconds` that only a model of unlike layers pays.

        Raises:
            UnknownDtypeError: the bytes of the target's number types are not known.
        """
        target, types = self.target, NumberTypes.of(self.target)
        share = size_variant(self.shape, place, variant, target.tensor_parallel_size)
        return CostRow(
            target=target.name,
            hardware=self.hardware,
            num_threads=self.num_threads,
            engine_version=self.engine_version,
            mode=target.mode,
            dtype=target.dtype,
            quantization=target.quantization or "none",
            kv_cache_dtype=target.kv_cache_dtype,
            tensor_parallel_size=target.tensor_parallel_size,
            input_length=target.input_length,
            output_length=target.output_length,
            batch=batch,
            phase=phase,
            place=place,
            variant=variant,
            seconds=seconds,
            seconds_error=error,
            repeat_noise=noise,
            parameters=size_variant(self.shape, place, variant).parameters,
            weight_bytes=count_weight_bytes(share, types),
            kv_bytes_per_token=count_kv_bytes_per_token(share, types),
            source="by construction" if variant == "noop" else self.source,
            mixing_s=mixing_s,
        )
