"""Where a target's costs come from: measured here, imported, or, for those who opted in, estimated from published peaks."""

import logging
from collections.abc import Iterable

from puzzle_dag.architecture import FFN, Attention, Block
from puzzle_dag.config import Target
from puzzle_dag.costs.comparison import Comparison
from puzzle_dag.costs.heldout import measure_and_compare
from puzzle_dag.costs.measure import measure_target
from puzzle_dag.costs.roofline import estimate_table
from puzzle_dag.costs.table import CostTable
from puzzle_dag.engine.hardware import HardwareMismatchError, check_hardware, detect_hardware
from puzzle_dag.model.configuration_puzzle_dag import PuzzleDagConfig
from puzzle_dag.progress import Progress, silent
from puzzle_dag.store import ArtifactStore

log = logging.getLogger(__name__)


class UnmeasuredTargetError(ValueError):
    """A target that nobody measured, and analytic costs are not asked for."""


def is_measurable(target: Target) -> bool:
    """Say whether this machine is the hardware that a target names."""
    try:
        check_hardware(target, detect_hardware())
    except HardwareMismatchError:
        return False
    return True


def explain_unmeasured(target: Target) -> str:
    """Return what to do about a target that was not measured: measure, import, or opt in to analytic costs."""
    return (
        f"target {target.name!r} has no measured costs: measure it on a machine with {target.hardware} "
        f"(puzzle-dag measure --target {target.name}), import what was measured there, or accept estimates from published peaks "
        f"with `costs: analytic` in the scenario"
    )


def obtain_costs(
    shape: PuzzleDagConfig,
    parent_block: Block,
    target: Target,
    attentions: Iterable[Attention],
    ffns: Iterable[FFN],
    store: ArtifactStore,
    *,
    analytic: bool,
    remeasure: bool = False,
    progress: Progress = silent,
) -> tuple[CostTable, list[Comparison]]:
    """Return a target's costs and how well they predict probes and held-out models, as measured here or where a file came from.

    Args:
        shape: the parent's configuration.
        parent_block: the parent's own block.
        target: hardware, engine, mode and workload.
        attentions: attention variants; the parent's and the no-op may be among them.
        ffns: FFN variants, likewise.
        store: keeps each engine's measurement.
        analytic: accept an estimate where this machine can't measure the target; a scenario opts in to that.
        remeasure: measure here again what is stored, and replace it; what was imported stays.
        progress: called after each engine.

    Raises:
        UnmeasuredTargetError: this is other hardware, and estimates are not accepted; says what to do.
        RooflineError: they are, but nothing is published here of the target's hardware.
        VllmMissingError, WorkloadTooLongError, UnknownDtypeError, EngineFailedError: as `measure_target` raises them.
    """
    attentions, ffns = list(attentions), list(ffns)
    if is_measurable(target):
        return measure_and_compare(shape, parent_block, target, attentions, ffns, store, remeasure=remeasure, progress=progress)
    try:
        # What was imported needs no engine.
        table = measure_target(shape, parent_block, target, attentions, ffns, store, progress=progress)
        return table, [Comparison(**c) for c in table.provenance.comparisons] if table.provenance is not None else []
    except HardwareMismatchError as error:
        if not analytic:
            raise UnmeasuredTargetError(f"{explain_unmeasured(target)} ({error})") from error
    log.warning("target %s: nobody measured it; its costs are analytic, from published peaks of %s", target.name, target.hardware)
    return estimate_table(shape, parent_block, target, attentions, ffns), []
