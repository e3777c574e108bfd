"""What a measurement says of a constraint: met, missed, or neither, as its confidence interval lies."""

from typing import Any

import pytest
from scipy.stats import t as student_t

from assets.served import asked_batches, measured_constraints, overall_verdict, serving_batches
from puzzle_dag.config import Scenario, Target

TARGET = Target(version=1, name="chat", hardware="local-cpu", input_length=64, output_length=11, batch_sizes=(1, 8))


def scenario(**constraints: Any) -> Scenario:
    return Scenario(version=1, name="fast", target="chat", constraints=constraints, uptrain={"tokens": 0})


def served(model: str, batch: int, total_s: float, noise: float = 0.0) -> dict[str, Any]:
    return {
        "model": model,
        "batch": batch,
        "num_engines": 3,
        "prefill_s": total_s / 4,
        "decode_s": total_s * 3 / 4,
        "total_s": total_s,
        "throughput_tokens_per_s": batch * 75 / total_s,
        "engine_noise": noise,
        "weight_bytes": 1000,
        "kv_bytes_per_token": 10,
    }


def report(low: float, speedup: float, high: float, *, noise: float = 0.0) -> dict[str, Any]:
    models = [served("parent", 1, 1.0), served("parent", 8, 2.0, noise), served("fast", 1, 0.9), served("fast", 8, 2.0 / speedup, noise)]
    return {"models": models, "speedups": [{"child": "fast", "batch": 8, "speedup": speedup, "low": low, "high": high}]}


def judge(constraints: dict[str, Any], found: dict[str, Any]) -> list[Any]:
    return measured_constraints(scenario(**constraints), TARGET, found, "fast", 8)


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (1.43, 1.60, "met"),  # 1.425 is 5 % short of 1.5
        (1.42, 1.60, "unclear"),
        (1.30, 1.43, "unclear"),
        (1.30, 1.42, "missed"),
    ],
)
def test_a_speed_up_is_judged_by_its_interval_in_turns(low: float, high: float, verdict: str) -> None:
    (row,) = judge({"throughput_tokens_per_s": {"at_least": 1.5, "relative_to": "parent"}}, report(low, 1.4, high))
    assert (row.measured, row.low, row.high, row.verdict) == (1.4, low, high, verdict)


def test_a_latency_is_the_speed_ups_inverse() -> None:
    (row,) = judge({"latency_s": {"at_most": 0.5, "relative_to": "parent"}}, report(1.6, 2.0, 2.5))
    assert (row.measured, row.low, row.high) == (0.5, 0.4, 1 / 1.6)
    assert row.verdict == "unclear"  # 1 / 1.6 = 0.625 is above 0.525


def test_without_turns_the_engines_own_noise_makes_the_interval() -> None:
    (row,) = judge({"ttft_s": {"at_most": 0.6, "relative_to": "parent"}}, report(1.9, 2.0, 2.1, noise=0.03))
    half = student_t.ppf(0.975, 4) * (2 * 0.03**2 / 3) ** 0.5  # equal noise of 3 and 3 engines: 4 degrees of freedom
    assert row.measured == pytest.approx(0.5) and row.high == pytest.approx(0.5 * (1 + half)) and row.verdict == "met"
    (alone,) = judge({"tpot_s": {"at_most": 0.08}}, report(1.9, 2.0, 2.1, noise=0.03))
    half = student_t.ppf(0.975, 2) * 0.03 / 3**0.5
    assert alone.measured == pytest.approx(0.075) and alone.low == pytest.approx(0.075 * (1 - half)) and alone.verdict == "met"


def test_throughput_is_compared_with_the_parents_best_batch() -> None:
    found = report(1.5, 1.6, 1.7)
    found["models"][0] = served("parent", 1, 0.2)  # 375 tokens/s against 300 at batch 8
    (row,) = judge({"throughput_tokens_per_s": {"at_least": 1.5, "relative_to": "parent"}}, found)
    assert row.measured == pytest.approx(8 * 75 / 1.25 / 375) and row.verdict == "missed"


def test_memory_is_exact_and_parameters_need_no_engine() -> None:
    rows = judge({"memory_bytes": {"at_most": 1800, "at": {"batch": 8, "length": 10}}, "parameters": {"at_most": 1}}, report(1, 1, 1))
    assert [(r.constraint, r.measured, r.low, r.high, r.verdict) for r in rows] == [("memory_bytes", 1800, 1800, 1800, "met")]


def test_one_missed_constraint_is_worse_than_an_unclear_one() -> None:
    assert overall_verdict([]) == "met"
    assert overall_verdict([{"verdict": "met"}, {"verdict": "unclear"}]) == "unclear"
    assert overall_verdict([{"verdict": "unclear"}, {"verdict": "missed"}, {"verdict": "met"}]) == "missed"


def test_a_child_is_served_where_its_scenario_speaks_of_speed() -> None:
    """At the kept batch size, at those that timed bounds name, and where a multiple of it is asked for at the parent's best."""
    latency = {"at_most": 0.7, "relative_to": "parent", "at": {"batch": 1}}
    memory = {"at_most": 0.6, "relative_to": "parent", "at": {"batch": 16, "length": 75}}
    faster = {"at_least": 1.5, "relative_to": "parent"}
    target = TARGET.model_copy(update={"batch_sizes": (1, 2, 4, 8, 16)})
    parent = {"models": [served("parent", batch, total_s) for batch, total_s in ((1, 1.0), (8, 2.0), (16, 4.1))]}

    def batches(kept: int, **constraints: Any) -> tuple[int, ...]:
        return serving_batches(scenario(**constraints), target, kept, parent)

    assert batches(4, latency_s=latency, memory_bytes=memory) == (1, 4)
    assert batches(4, throughput_tokens_per_s=faster) == (4, 8)
    assert batches(4, throughput_tokens_per_s={**faster, "target": "other"}) == batches(4, memory_bytes=memory) == (4,)
    assert batches(4, throughput_tokens_per_s={"at_least": 900}) == (4,)
    assert asked_batches(scenario(ttft_s={**latency, "target": "other"})) == []
