"""Costs that were measured on another machine: a file is checked, kept with where it comes from, and found again for a target.

What is imported is kept in the artifact store under what a measurement can't do without: the parent's shape, hardware, number
types, GPUs and lengths. Engine version and mode may differ from those that serve; that is told, or refused (`agreement`).
"""

import dataclasses
import datetime
import logging
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from puzzle_dag.architecture import FFN, Attention
from puzzle_dag.config import Target
from puzzle_dag.costs.agreement import check_agreement, find_serving_version, same_version
from puzzle_dag.costs.provenance import Provenance, digest_shape
from puzzle_dag.costs.table import CONSTANT, PHASES, CostTable, CostTableError, sort_rows
from puzzle_dag.engine.hardware import Hardware, HardwareMismatchError, check_hardware, detect_hardware
from puzzle_dag.model.configuration_puzzle_dag import PuzzleDagConfig
from puzzle_dag.store import ArtifactStore, fingerprint

log = logging.getLogger(__name__)

IMPORT_KIND = "imported_costs"
"""Kind of imported tables in the artifact store."""
_FILE = "costs.parquet"
_DECISIVE = ("engine", "hardware", "dtype", "quantization", "kv_cache_dtype", "tensor_parallel_size", "input_length", "output_length")


class ImportedCostsError(ValueError):
    """A cost file that can't be imported, or that was and lacks what is asked of it."""


def _identify(target: Target, shape_digest: str) -> dict[str, Any]:
    """Return what must be the same for a table to be a target's."""
    return {"shape": shape_digest, **{name: getattr(target, name) for name in _DECISIVE}}


def _check_rows(table: CostTable, path: Path) -> None:
    """Check that every variant has a sound number at every batch size and phase. Raises ImportedCostsError."""
    variants = {(r.place, r.variant) for r in table.rows}
    if ("constant", CONSTANT) not in variants:
        raise ImportedCostsError(f"{path} has no row of the engine's constant; export it again")
    try:
        for place, variant in variants:
            for batch in table.target.batch_sizes:
                for phase in PHASES:
                    table.row(place, variant, batch, phase)
    except CostTableError as error:
        raise ImportedCostsError(f"{path} is not complete: {error}") from error
    for row in table.rows:
        if not (math.isfinite(row.seconds) and row.seconds >= 0 and row.weight_bytes >= 0 and row.kv_bytes_per_token >= 0):
            raise ImportedCostsError(f"{path}: {row.place} {row.variant} at batch {row.batch} costs {row.seconds} s; measure it again")
        if row.source not in ("measured", "by construction"):
            raise ImportedCostsError(f"{path}: its costs are {row.source}, not measured; import what was measured, on the machine that did")


def _check_machine(table: CostTable, path: Path) -> None:
    """Check that a table was measured on what its target names. Raises ImportedCostsError, EngineVersionError."""
    row = table.rows[0]
    same_version(row.engine_version, row.engine_version, str(path))
    if table.target.hardware == "local-cpu":
        here = detect_hardware().name
        if row.hardware != here:
            raise ImportedCostsError(
                f"{path}: target {table.target.name!r} is the machine at hand, and was measured on {row.hardware}; "
                f"this is {here}: measure here"
            )
        return
    try:
        check_hardware(table.target, Hardware("gpu", row.hardware, 0))
    except HardwareMismatchError:
        raise ImportedCostsError(
            f"{path}: its target {table.target.name!r} is for {table.target.hardware}, but it was measured on {row.hardware}"
        ) from None


def _complete(table: CostTable, provenance: Provenance) -> Provenance:
    """Return the provenance with what an older version of this package told by the target alone, which is the one that was measured."""
    return provenance if provenance.multiprocess is not None else dataclasses.replace(provenance, multiprocess=table.target.multiprocess)


def _of_target(provenance: Provenance, target: Target) -> Provenance:
    """Return the provenance with the comparisons of a target's batch sizes, under its name."""
    kept = tuple({**c, "target": target.name} for c in provenance.comparisons if c["batch"] in target.batch_sizes)
    return dataclasses.replace(provenance, comparisons=kept)


def import_table(path: Path, store: ArtifactStore) -> CostTable:
    """Check a file that `puzzle-dag measure --out` wrote, keep it, and return it. One for the same target is replaced.

    Raises:
        CostTableError: the file is missing, damaged, of a newer version, or no cost table.
        ImportedCostsError: it doesn't say where it comes from, is not complete, or was measured on what its target doesn't name.
        EngineVersionError: it doesn't say which engine measured it.
    """
    table = CostTable.read(path)
    if table.provenance is None:
        raise ImportedCostsError(f"{path} doesn't say where it comes from; write it with `puzzle-dag measure --out` of this version")
    if table.provenance.shape_digest != fingerprint(table.provenance.shape):
        raise ImportedCostsError(f"{path}: the digest of its parent's shape is not that of the shape; export it again")
    if not table.rows:
        raise ImportedCostsError(f"{path} has no rows; export it again")
    _check_rows(table, path)
    _check_machine(table, path)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    provenance = dataclasses.replace(_complete(table, table.provenance), imported_from=path.name, imported_at=now)
    kept = dataclasses.replace(table, provenance=provenance)

    def fill(folder: Path) -> str:
        kept.write(folder / _FILE)
        # A table's digest is that of its rows; what its held-out models tell is judged, too, so that it counts as another file.
        return fingerprint([kept.digest, provenance.multiprocess, provenance.comparisons])

    inputs = _identify(table.target, provenance.shape_digest)
    store.write(IMPORT_KIND, fingerprint(inputs), fill, inputs=inputs, metadata={"file": path.name, "digest": kept.digest, "at": now})
    return kept


def find_import_digest(shape: PuzzleDagConfig, target: Target, store: ArtifactStore) -> str | None:
    """Return the digest of what was imported for a target, None where nothing was: what tells that another file came."""
    found = store.find(IMPORT_KIND, fingerprint(_identify(target, digest_shape(shape))))
    return None if found is None else found.digest


def find_imported(
    shape: PuzzleDagConfig, target: Target, attentions: Iterable[Attention], ffns: Iterable[FFN], store: ArtifactStore
) -> CostTable | None:
    """Return the imported costs of a target, or None where none were imported for this shape, hardware, precision and workload.

    Rows are those of the target's batch sizes and of the variants that are asked for, and say "imported".

    Raises:
        ImportedCostsError: the imported table lacks a batch size or a variant.
        CostTableError: the kept file is damaged; import it again.
        EngineDisagreementError: another engine version or mode serves, and the target is strict.
    """
    found = store.find(IMPORT_KIND, fingerprint(_identify(target, digest_shape(shape))))
    if found is None:
        return None
    table = CostTable.read(found.folder / _FILE)
    pieces = {("attention", a.name) for a in attentions} | {("ffn", f.name) for f in ffns} | {("constant", CONSTANT)}
    missing = sorted(f"{place} {name}" for place, name in pieces - {(r.place, r.variant) for r in table.rows})
    batches = sorted(set(target.batch_sizes) - set(table.batch_sizes))
    if missing or batches:
        lacks = [f"variants {', '.join(missing)}"] * bool(missing) + [f"batch sizes {', '.join(map(str, batches))}"] * bool(batches)
        raise ImportedCostsError(
            f"target {target.name!r}: the costs that were imported from {found.metadata['file']} lack {' and '.join(lacks)}; "
            "measure them with these on that machine and import the file again, or leave them out here"
        )
    rows = [
        dataclasses.replace(r, target=target.name, source="by construction" if r.source == "by construction" else "imported")
        for r in table.rows
        if r.batch in target.batch_sizes and (r.place, r.variant) in pieces
    ]
    residuals = {k: v for k, v in table.residuals.items() if int(k.partition("/")[0]) in target.batch_sizes}
    assert table.provenance is not None  # nothing else is imported
    provenance = _of_target(_complete(table, table.provenance), target)
    imported = CostTable(sort_rows(rows), target, table.num_engines, residuals, provenance, table.levelling)
    check_agreement(imported, target, find_serving_version(target))
    log.info("target %s: costs imported from %s, measured on %s", target.name, found.metadata["file"], rows[0].hardware)
    return imported
