"""What was asked for against what was measured: each constraint of a scenario, from the serving of parent and child."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from puzzle_dag.config import Bound, Scenario, Target

TOLERANCE = 0.05
"""A measurement may miss its constraint by this share, beyond its confidence interval."""
_Z = 1.96


@dataclass(frozen=True, slots=True)
class MeasuredConstraint:
    """One constraint as measured; a relative one in multiples of the parent's own measured value."""

    constraint: str
    """Its name."""
    batch: int
    """Concurrent requests."""
    asked: str
    """The bound, in words."""
    measured: float
    """The child's value, or its multiple of the parent's."""
    low: float
    """Lower end of the 95 % confidence interval."""
    high: float
    """Upper end."""
    met: bool
    """Whether the bound lies within the interval widened by the tolerance."""


def _models(report: Mapping[str, Any], name: str) -> dict[int, Mapping[str, Any]]:
    return {m["batch"]: m for m in report["models"] if m["model"] == name}


def _value(name: str, model: Mapping[str, Any], bound: Bound, target: Target) -> float | None:
    """Return a measured quantity, or None for one that no engine is needed for."""
    if name == "memory_bytes":
        length = bound.at.length if bound.at and bound.at.length else target.input_length + target.output_length
        batch = bound.at.batch if bound.at else model["batch"]
        return float(model["weight_bytes"] + batch * length * model["kv_bytes_per_token"])
    values = {
        "throughput_tokens_per_s": model["throughput_tokens_per_s"],
        "latency_s": model["total_s"],
        "ttft_s": model["prefill_s"],
        "tpot_s": model["decode_s"] / max(1, target.output_length - 1),
        "kv_bytes_per_token": float(model["kv_bytes_per_token"]),
    }
    return values.get(name)


def _words(bound: Bound) -> str:
    sides = [f"at least {bound.at_least:g}" if bound.at_least else "", f"at most {bound.at_most:g}" if bound.at_most else ""]
    return " and ".join(s for s in sides if s) + (" x the parent's" if bound.relative_to else "")


def measured_constraints(scenario: Scenario, target: Target, report: Mapping[str, Any], child: str, batch: int) -> list[MeasuredConstraint]:
    """Return the constraints that the engine's measurement speaks of.

    Args:
        scenario: what was asked for.
        target: its target.
        report: a ServingReport as JSON.
        child: the child's name in it.
        batch: the batch size that the solution keeps.
    """
    children, parents, rows = _models(report, child), _models(report, "parent"), []
    for name, bound in scenario.constraints.items():
        at = bound.at.batch if bound.at and bound.at.batch in children else batch
        own = _value(name, children[at], bound, target)
        if own is None:
            continue
        timed = name in ("throughput_tokens_per_s", "latency_s", "ttft_s", "tpot_s")
        noise = children[at]["engine_noise"] ** 2 / children[at]["num_engines"] if timed else 0.0
        if bound.relative_to:
            # The parent's throughput is its best over the batch sizes; everything else compares at one batch size.
            theirs = [
                v for b, m in parents.items() if (v := _value(name, m, bound, target)) and (b == at or name == "throughput_tokens_per_s")
            ]
            own /= max(theirs)
            noise += parents[at]["engine_noise"] ** 2 / parents[at]["num_engines"] if timed else 0.0
        half = _Z * math.sqrt(noise) * own
        low, high = own - half, own + half
        met = (bound.at_least is None or high >= bound.at_least * (1 - TOLERANCE)) and (
            bound.at_most is None or low <= bound.at_most * (1 + TOLERANCE)
        )
        rows.append(MeasuredConstraint(name, at, _words(bound), own, low, high, met))
    return rows


def constraint_rows(constraints: list[MeasuredConstraint]) -> list[dict[str, Any]]:
    """Return constraints as flat rows."""
    return [asdict(c) for c in constraints]
