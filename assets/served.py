"""What was asked for against what was measured: each constraint of a scenario, from the serving of parent and child."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from puzzle_dag.config import Bound, Scenario, Target
from puzzle_dag.config.scenario import TIMED

TOLERANCE = 0.05
"""A measurement may miss its constraint by this share."""
Verdict = Literal["met", "missed", "unclear"]
"""What a measurement, whose interval may straddle a bound, can say of it."""


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
    verdict: Verdict
    """"missed": the whole interval is more than the tolerance short; "met": no part of it is; "unclear": only a part is."""


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


def _half_width(models: list[Mapping[str, Any]]) -> float:
    """Return the relative half width of the 95 % interval of a product of measurements, from the engines' noise.

    Student's t, with Welch and Satterthwaite's degrees of freedom: three engines say little of their own spread.
    """
    from scipy.stats import t as student_t

    parts = [m["engine_noise"] ** 2 / m["num_engines"] for m in models]
    if sum(parts) == 0:
        return 0.0
    freedom = sum(parts) ** 2 / sum(p**2 / (m["num_engines"] - 1) for p, m in zip(parts, models, strict=True))
    return float(student_t.ppf(0.975, freedom)) * math.sqrt(sum(parts))


def _paired(name: str, report: Mapping[str, Any], child: str, batch: int) -> tuple[float, float, float] | None:
    """Return a multiple of the parent's value with its interval as measured in turns, which cancels the machine's slow minutes."""
    turns = next((s for s in report["speedups"] if (s["child"], s["batch"]) == (child, batch)), None)
    if turns is None or name not in ("throughput_tokens_per_s", "latency_s"):
        return None
    if name == "latency_s":
        return 1 / turns["speedup"], 1 / turns["high"], 1 / turns["low"]
    return turns["speedup"], turns["low"], turns["high"]


def _relative(
    name: str, bound: Bound, target: Target, report: Mapping[str, Any], child: str, batch: int
) -> tuple[float, float, float] | None:
    """Return the child's multiple of the parent's value, with its interval; None for what no engine is needed for."""
    own, parents = _models(report, child)[batch], _models(report, "parent")
    value, timed = _value(name, own, bound, target), name in TIMED
    if value is None:
        return None
    # The parent's throughput is its best over the batch sizes; everything else compares at one batch size.
    at = [b for b in parents if b == batch or name == "throughput_tokens_per_s"]
    values = {b: v for b in at if (v := _value(name, parents[b], bound, target))}
    best = max(values, key=lambda b: values[b])
    if best == batch and (paired := _paired(name, report, child, batch)) is not None:
        return paired
    ratio, half = value / values[best], _half_width([own, parents[best]]) if timed else 0.0
    return ratio, ratio * (1 - half), ratio * (1 + half)


def _absolute(
    name: str, bound: Bound, target: Target, report: Mapping[str, Any], child: str, batch: int
) -> tuple[float, float, float] | None:
    """Return the child's value with its interval; None for what no engine is needed for."""
    own = _models(report, child)[batch]
    value = _value(name, own, bound, target)
    if value is None:
        return None
    half = _half_width([own]) if name in TIMED else 0.0
    return value, value * (1 - half), value * (1 + half)


def _judge(bound: Bound, low: float, high: float) -> Verdict:
    least = -math.inf if bound.lowest is None else bound.lowest * (1 - TOLERANCE)
    most = math.inf if bound.highest is None else bound.highest * (1 + TOLERANCE)
    if high < least or low > most:
        return "missed"
    return "met" if low >= least and high <= most else "unclear"


def _own_timed_bounds(scenario: Scenario) -> list[tuple[str, Bound]]:
    """Return the bounds that serving on the scenario's own target speaks of."""
    return [(name, bound) for name, bound in scenario.bounds if name in TIMED and bound.target in (None, scenario.target)]


def bounds_time(scenario: Scenario) -> bool:
    """Say whether a scenario bounds anything that serving on its own target has to time."""
    return bool(_own_timed_bounds(scenario))


def asked_batches(scenario: Scenario) -> list[int]:
    """Return the batch sizes that a scenario's timed bounds on its own target name, increasing."""
    return sorted({bound.at.batch for _, bound in _own_timed_bounds(scenario) if bound.at})


def _asks_for_best(scenario: Scenario) -> bool:
    """Say whether a throughput is asked for as a multiple of the parent's, which is the parent's at its best batch size."""
    return any(name == "throughput_tokens_per_s" and bound.relative_to for name, bound in _own_timed_bounds(scenario))


def asked_serving(scenario: Scenario) -> dict[str, Any]:
    """Return all of a scenario's bounds that decides at which batch sizes a child is served, and in how many turns."""
    return {"batches": asked_batches(scenario), "times": bounds_time(scenario), "best": _asks_for_best(scenario)}


def serving_batches(scenario: Scenario, target: Target, kept: int, parent: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the batch sizes at which a scenario's child has to be served to say whether it does what was asked.

    Args:
        scenario: what was asked for.
        target: its target.
        kept: the batch size that its solution keeps.
        parent: the parent's ServingReport as JSON; a throughput may be asked for as a multiple of the parent's best.
    """
    batches = {kept, *asked_batches(scenario)}
    if _asks_for_best(scenario):
        batches.add(max(parent["models"], key=lambda m: m["throughput_tokens_per_s"])["batch"])
    return tuple(sorted(batches & {*target.batch_sizes}))


def measured_constraints(scenario: Scenario, target: Target, report: Mapping[str, Any], child: str, batch: int) -> list[MeasuredConstraint]:
    """Return the constraints that the engine's measurement speaks of.

    Args:
        scenario: what was asked for.
        target: its target.
        report: a ServingReport as JSON.
        child: the child's name in it.
        batch: the batch size that the solution keeps.
    """
    children, rows = _models(report, child), []
    for name, bound in scenario.bounds:
        if bound.target not in (None, scenario.target):
            continue  # the child is served on its scenario's own target
        at = bound.at.batch if bound.at and bound.at.batch in children else batch
        measured = (_relative if bound.relative_to else _absolute)(name, bound, target, report, child, at)
        if measured is not None:
            rows.append(MeasuredConstraint(name, at, bound.words, *measured, _judge(bound, measured[1], measured[2])))
    return rows


def overall_verdict(rows: Sequence[Mapping[str, Any]]) -> Verdict:
    """Return "missed" where any constraint is, else "unclear" where any is, else "met" (also of none: then nothing can be missed)."""
    verdicts = {r["verdict"] for r in rows}
    return "missed" if "missed" in verdicts else "unclear" if "unclear" in verdicts else "met"


def constraint_rows(constraints: list[MeasuredConstraint]) -> list[dict[str, Any]]:
    """Return constraints as flat rows."""
    return [asdict(c) for c in constraints]
