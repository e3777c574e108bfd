"""Were costs measured with the engine that serves? Another version or mode is told, or refused where the target is strict.

The mode is eager or compiled, with the engine core in the same process or in one of its own.
"""

import logging
import re

from puzzle_dag.config import Target
from puzzle_dag.costs.table import CostTable
from puzzle_dag.engine.client import VllmMissingError, read_engine_version
from puzzle_dag.engine.hardware import HardwareMismatchError, check_hardware, detect_hardware

log = logging.getLogger(__name__)

_PROCESSES = {False: "in one process", True: "with the engine core in a process of its own"}
_VERSION = re.compile(r"(?:(\S+) )?(\d+\.\d+\S*)")


class EngineVersionError(ValueError):
    """An engine version that is not known, or not the one that a target names."""


class EngineDisagreementError(ValueError):
    """Costs were measured with another engine version or mode than the one that serves, and the target is strict."""


def _split_version(text: str, where: str) -> tuple[str | None, str]:
    """Return distribution (None where only the version is given) and version. Raises EngineVersionError."""
    found = _VERSION.fullmatch(text)
    if found is None:
        fix = 'a version is written like "vllm 0.32.0"; measure again, or import a table that says what measured it'
        raise EngineVersionError(f"{where}: the engine version {text!r} is unknown; {fix}")
    return found[1], found[2]


def same_version(left: str, right: str, where: str) -> bool:
    """Say whether two engine versions are the same, by distribution where both name one. Raises EngineVersionError."""
    (left_name, left_version), (right_name, right_version) = _split_version(left, where), _split_version(right, where)
    return left_version == right_version and (left_name == right_name or None in (left_name, right_name))


def find_serving_version(target: Target) -> str | None:
    """Return the engine version that serves a target: the one it names, or the installed one where this is its hardware, else None."""
    if target.engine_version is not None:
        return target.engine_version
    try:
        check_hardware(target, detect_hardware())
        return read_engine_version()
    except (HardwareMismatchError, VllmMissingError):
        return None


def check_installed(target: Target, installed: str) -> None:
    """Check that the installed engine is the one that a target names, where it names one.

    Raises:
        EngineVersionError: it is another; names both.
    """
    if target.engine_version is not None and not same_version(target.engine_version, installed, f"target {target.name!r}"):
        raise EngineVersionError(
            f"target {target.name!r}: field `engine_version` is {target.engine_version}, but {installed} is installed; "
            "install that version, or change the field"
        )


def find_multiprocess(table: CostTable) -> bool | None:
    """Return whether the engines that measured a table had their core in a process of its own; None where that was not kept."""
    if table.provenance is not None and table.provenance.multiprocess is not None:
        return table.provenance.multiprocess
    # What was measured here was measured as its target says; what was imported, as another target said.
    return table.target.multiprocess if table.source == "measured" else None


def describe_processes(multiprocess: bool | None) -> str:
    """Return how engines ran, in words."""
    return "whether in one process was not kept" if multiprocess is None else _PROCESSES[multiprocess]


def check_agreement(table: CostTable, target: Target, serving_version: str | None) -> tuple[str, ...]:
    """Compare the engine that measured a table with the one that serves; log what differs, and return it.

    Args:
        table: the costs; estimated ones rest on no engine, and nothing is compared.
        target: how it is served.
        serving_version: the engine that serves, e.g. "vllm 0.32.0" or "0.32.0"; None where it is not known, and not compared.

    Raises:
        EngineVersionError: a version that is none.
        EngineDisagreementError: something differs and the target is strict.
    """
    if table.source == "analytic":
        return ()
    first, differing = table.rows[0], []
    if serving_version is not None and not same_version(first.engine_version, serving_version, f"target {target.name!r}"):
        differing.append(f"measured with {first.engine_version}, served by {serving_version}")
    if first.mode != target.mode:
        differing.append(f"measured {first.mode}, served {target.mode}")
    multiprocess = find_multiprocess(table)
    if multiprocess is None:
        log.info("target %r: it was not kept whether its costs were measured with the engine core in a process of its own", target.name)
    elif multiprocess != target.multiprocess:
        differing.append(f"measured {_PROCESSES[multiprocess]}, served {_PROCESSES[target.multiprocess]}")
    if not differing:
        return ()
    message = f"target {target.name!r}: its costs were {'; and '.join(differing)}"
    if target.strict:
        raise EngineDisagreementError(f"{message}; measure it again with what serves, or drop `strict` from the target")
    log.warning("%s; what is predicted may be off by as much as the two differ", message)
    return tuple(differing)
