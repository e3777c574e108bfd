"""The cost table of a target: one row for each variant, batch size and phase; a Parquet file is its stored form."""

import io
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from puzzle_dag.architecture import Architecture
from puzzle_dag.config import Target
from puzzle_dag.costs.provenance import Provenance
from puzzle_dag.engine.levelling import AS_MEASURED, Levelling
from puzzle_dag.piece_costs import CostSource, Phase, PieceCost, PieceCosts
from puzzle_dag.pieces import Place
from puzzle_dag.store import fingerprint, write_atomically

if TYPE_CHECKING:
    from puzzle_dag.model.configuration_puzzle_dag import PuzzleDagConfig

PHASES: tuple[Phase, ...] = ("prefill", "decode")
CONSTANT = "engine"
"""Variant name of the row for what a model costs beside its layers: embedding, norm, head and the engine's own time."""
CostPlace = Literal["attention", "ffn", "constant"]
"""A place of a layer, or what a model costs beside its layers."""
_METADATA_KEY = b"puzzle_dag"
_FORMAT = 3


class CostTableError(ValueError):
    """A cost table that can't be read, or that lacks what is asked of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CostRow:
    """What one variant costs at one batch size in one phase, per layer that has it."""

    target: str
    """Name of the target."""
    hardware: str
    """Processor or GPU that was measured."""
    num_threads: int
    """CPU threads of the engine; 0 on GPUs."""
    engine_version: str
    """Distribution and version of the engine."""
    mode: str
    """"eager" or "compiled"."""
    dtype: str
    """Type of weights and activations."""
    quantization: str
    """Weight quantisation, or "none"."""
    input_length: int
    """Prompt tokens a request."""
    output_length: int
    """Generated tokens a request."""
    batch: int
    """Concurrent requests."""
    phase: Phase
    """"prefill" (to the last first token) or "decode" (the rest of the generation, all of it)."""
    place: CostPlace
    """Where the variant stands."""
    variant: str
    """Name of the variant; "engine" for the constant."""
    seconds: float
    """Time it adds to the phase of a model whose layers are unlike each other, for the whole batch, at the pace of the table's
    `levelling`."""
    seconds_error: float
    """Standard error of `seconds` from the fit."""
    repeat_noise: float
    """Relative standard deviation between engines that measured the same model at this batch and phase, levelled as `seconds` are."""
    parameters: int
    """Its parameters."""
    weight_bytes: int
    """Bytes of its weights on one GPU, exact."""
    kv_bytes_per_token: int
    """Bytes of KV cache a token on one GPU, exact."""
    source: Literal["measured", "imported", "analytic", "by construction"]
    """Where `seconds` comes from: measured on this machine, measured on another and imported, or estimated by the roofline from
    published peaks (its two errors are then 0 and say nothing). A no-op is nothing that runs, so it costs zero by construction."""
    kv_cache_dtype: str = "auto"
    """Type of the KV cache; "auto" is that of the activations."""
    tensor_parallel_size: int = 1
    """GPUs that a layer is spread over."""
    mixing_s: float = 0.0
    """The part of `seconds` that a model pays for its layers being unlike: it falls away where this variant stands alone beside the
    parent's own, as in its probe. 0 for the parent's own and for no-ops."""


@dataclass(frozen=True)
class CostTable:
    """All rows of a target and what was measured for them."""

    rows: tuple[CostRow, ...]
    """The rows, sorted by batch, phase, place and variant."""
    target: Target
    """The target, complete."""
    num_engines: int
    """Engines that the fit rests on."""
    residuals: dict[str, float]
    """"batch/phase" -> relative spread of the measurements about the fit."""
    provenance: Provenance | None = None
    """Where it comes from; None for what nobody measured, and for files of an older version of this package."""
    levelling: Levelling = AS_MEASURED
    """At which of the machine's paces the seconds are: what is compared with them is told at the same. By default as measured."""

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """Measured batch sizes, increasing."""
        return tuple(sorted({r.batch for r in self.rows}))

    @property
    def source(self) -> CostSource:
        """Where the table's seconds come from: one table never mixes measured and analytic ones."""
        source = next(r.source for r in self.rows if r.place == "constant")
        assert source != "by construction"
        return source

    @property
    def digest(self) -> str:
        """Digest of the content; where it comes from is no part of that."""
        return fingerprint({"rows": [asdict(r) for r in self.rows], **self._metadata()})

    def row(self, place: str, variant: str, batch: int, phase: Phase) -> CostRow:
        """Return one row. Raises CostTableError, saying what there is, where it was not measured."""
        for row in self.rows:
            if (row.place, row.variant, row.batch, row.phase) == (place, variant, batch, phase):
                return row
        there = sorted({f"{r.place}/{r.variant}" for r in self.rows})
        raise CostTableError(
            f"target {self.target.name!r}: no cost of {place} {variant} at batch {batch} in {phase}; "
            f"batch sizes are {list(self.batch_sizes)}, variants {', '.join(there)}; measure the target again with what is missing"
        )

    def piece_seconds(self, place: Place, variant: str, batch: int, phase: Phase) -> float:
        """Return the seconds that a variant adds to a phase, for the whole batch. Raises CostTableError."""
        return self.row(place, variant, batch, phase).seconds

    def constant_seconds(self, batch: int, phase: Phase) -> float:
        """Return the seconds that a model without layers would take (embedding, head, engine). Raises CostTableError."""
        return self.row("constant", CONSTANT, batch, phase).seconds

    def noise(self, batch: int, phase: Phase) -> float:
        """Return the relative standard deviation between engines that measured the same model. Raises CostTableError."""
        return self.row("constant", CONSTANT, batch, phase).repeat_noise

    def seconds(self, architecture: Architecture, batch: int, phase: Phase) -> float:
        """Return the predicted seconds of a model in a phase. Raises CostTableError for a variant that was not measured.

        A model with only one kind of piece beside the parent's has layers that are alike, and pays nothing for mixing. (The search,
        which adds up pieces, takes every child for mixed.)
        """
        rows = [self.row("attention", b.attention.name, batch, phase) for b in architecture]
        rows += [self.row("ffn", b.ffn.name, batch, phase) for b in architecture]
        is_mixed = len({(r.place, r.variant) for r in rows if r.mixing_s}) > 1
        return self.constant_seconds(batch, phase) + sum(r.seconds - (0.0 if is_mixed else r.mixing_s) for r in rows)

    def block_share(self, architecture: Architecture, batch: int, phase: Phase | None = None) -> float:
        """Return the share of a model's predicted time that its blocks take, in a phase or over both; the rest is the constant.

        Only that share can be saved by other blocks. Raises CostTableError for a variant that was not measured.
        """
        phases = PHASES if phase is None else (phase,)
        constant = sum(self.constant_seconds(batch, p) for p in phases)
        return 1 - constant / sum(self.seconds(architecture, batch, p) for p in phases)

    def to_piece_costs(self, shape: "PuzzleDagConfig") -> PieceCosts:
        """Return the table as the search sees it, for a parent of this shape (every layer alike)."""
        names = sorted({(r.place, r.variant) for r in self.rows})
        costs = {name: self._piece_cost(*name) for name in names}
        pieces = {(place, variant): cost for (place, variant), cost in costs.items() if place != "constant"}
        return PieceCosts(
            target=self.target.name,
            input_length=self.target.input_length,
            output_length=self.target.output_length,
            batch_sizes=self.batch_sizes,
            pieces=PieceCosts.same_in_every_layer(pieces, num_layers=shape.num_hidden_layers),
            constant=costs["constant", CONSTANT],
            digest=self.digest,
            source=self.source,
        )

    def _piece_cost(self, place: str, variant: str) -> PieceCost:
        rows = {(b, p): self.row(place, variant, b, p) for b in self.batch_sizes for p in PHASES}
        first = next(iter(rows.values()))
        seconds = {b: {p: rows[b, p].seconds for p in PHASES} for b in self.batch_sizes}
        return PieceCost(first.parameters, first.weight_bytes, first.kv_bytes_per_token, seconds)

    def _metadata(self) -> dict[str, Any]:
        return {"target": self.target.model_dump(mode="json"), "num_engines": self.num_engines, "residuals": self.residuals}

    def write(self, path: Path) -> None:
        """Write one Parquet file, atomically."""
        columns = {f.name: [getattr(r, f.name) for r in self.rows] for f in fields(CostRow)}
        provenance = None if self.provenance is None else asdict(self.provenance)
        told = {"format": _FORMAT, **self._metadata(), "digest": self.digest, "provenance": provenance, "levelling": asdict(self.levelling)}
        table = pa.table(columns, schema=_SCHEMA).replace_schema_metadata({_METADATA_KEY: json.dumps(told)})
        buffer = io.BytesIO()
        pq.write_table(table, buffer)
        write_atomically(path, buffer.getvalue())

    @staticmethod
    def read(path: Path) -> "CostTable":
        """Read what `write` wrote.

        Raises:
            CostTableError: the file is missing, damaged, changed since, of a newer version, or no cost table; says what to do.
        """
        try:
            parquet = pq.read_table(path)
            told = json.loads((parquet.schema.metadata or {})[_METADATA_KEY])
            if told.get("format", 1) > _FORMAT:
                raise CostTableError(
                    f"{path} is of format {told['format']}, and this version of puzzle_dag reads up to {_FORMAT}; update it"
                )
            rows = tuple(CostRow(**row) for row in parquet.to_pylist())
            provenance = None if told.get("provenance") is None else Provenance.from_json(told["provenance"])
            target, levelling = Target.model_validate(told["target"]), Levelling(**told.get("levelling", {}))
            table = CostTable(rows, target, told["num_engines"], told["residuals"], provenance, levelling)
            if told.get("digest", table.digest) != table.digest:
                raise ValueError("its rows are not those that were written")
        except FileNotFoundError:
            raise CostTableError(f"{path} does not exist; measure the target first") from None
        except CostTableError:
            raise
        except (pa.ArrowException, OSError, KeyError, TypeError, ValueError, AttributeError) as error:
            fix = "measure the target again (stored probes are reused), or import the file again"
            raise CostTableError(f"{path} is damaged or no cost table ({error}); {fix}") from error
        return table


def sort_rows(rows: Iterable[CostRow]) -> tuple[CostRow, ...]:
    """Return rows in the order of the table: batch, phase (prefill first), place, variant."""
    return tuple(sorted(rows, key=lambda r: (r.batch, PHASES.index(r.phase), r.place, r.variant)))


_TYPES: dict[Any, pa.DataType] = {int: pa.int64(), float: pa.float64()}
_SCHEMA = pa.schema([(f.name, _TYPES.get(f.type, pa.string())) for f in fields(CostRow)])
