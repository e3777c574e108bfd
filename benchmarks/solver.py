"""How fast the search is, on libraries that look like real ones: python benchmarks/solver.py [--compare].

Each instance is a library of 54 blocks a layer (attention kv8, 4, 2, 1, linear, no-op; FFN 100 to 10 %, linear, no-op) on a
70B-like shape: scores grow with what is taken away, differ by layer over orders of magnitude, and are noisy; costs
follow the shape. Three constraints: throughput, memory, KV bytes. `--compare` also solves the same programs with
PuLP/CBC and python-mip/CBC, where they are installed: pip install -e '.[benchmark]'. One thread, one process.
"""

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np

from puzzle_dag.architecture import FFN, Attention, Block, LayerSpace
from puzzle_dag.config import Scenario
from puzzle_dag.piece_costs import Phase, PieceCost, PieceCosts
from puzzle_dag.search.candidates import Candidates
from puzzle_dag.search.frontier import sweep
from puzzle_dag.search.points import scenario_limits
from puzzle_dag.search.program import Program
from puzzle_dag.search.score import BlockScore
from puzzle_dag.search.solve import solve_scenario
from puzzle_dag.search.solver import minimise

HIDDEN, WIDTH, HEADS, HEAD_DIM = 8192, 28672, 64, 128
PARENT = Block(Attention("gqa", 8), FFN("swiglu", WIDTH))
WIDTHS = tuple(round(share * WIDTH / 256) * 256 for share in (1.0, 0.87, 0.75, 0.5, 0.25, 0.2, 0.1))
SPACE = LayerSpace(
    (*(Attention("gqa", n) for n in (8, 4, 2, 1)), Attention("linear"), Attention("noop")),
    (*(FFN("swiglu", w) for w in WIDTHS), FFN("linear"), FFN("noop")),
)
BATCHES = (1, 8, 32, 64, 128, 256)
INPUT_LENGTH, OUTPUT_LENGTH = 2048, 1024


def make_scores(num_layers: int, seed: int) -> list[list[BlockScore]]:
    """Scores of a library: sensitivities of layers and places are log-normal, pairs add up to within a quarter."""
    rng = np.random.default_rng(seed)
    table = []
    for layer in range(num_layers):
        sensitivity = np.exp(rng.normal(0, 1)) * (4.0 if layer in (0, num_layers - 1) else 1.0)
        of_attention, of_ffn = np.exp(rng.normal(0, 0.7, 2))
        row = []
        for block in SPACE.blocks:
            heads = block.attention.kv_heads if block.attention.kind == "gqa" else -1 - (block.attention.kind == "noop")
            share = block.ffn.intermediate_size / WIDTH if block.ffn.kind == "swiglu" else -0.05 - 0.1 * (block.ffn.kind == "noop")
            damage = 0.002 * of_attention * (8 - heads) ** 1.5 / 22 + 0.003 * of_ffn * (1 - share) ** 1.7
            kl = 0.0 if block == PARENT else float(sensitivity * damage * np.exp(rng.normal(0, 0.25)))
            row.append(BlockScore(layer, block.name, kl, 2.0 + kl, max(0.0, 1 - kl), 65536, f"{layer}:{block.name}"))
        table.append(row)
    return table


def make_costs(num_layers: int, seed: int) -> PieceCosts:
    """Costs of a 70B-like shape on a machine with 1e15 operations and 3e12 bytes a second, with one percent of noise."""
    rng = np.random.default_rng(seed)

    def piece(parameters: int, kv_bytes: int) -> PieceCost:
        seconds: dict[int, dict[Phase, float]] = {}
        for batch in BATCHES:
            tokens, context = batch * INPUT_LENGTH, INPUT_LENGTH + OUTPUT_LENGTH / 2
            prefill = 2 * parameters * tokens / 6e14
            step = max(2 * parameters / 3e12, 2 * parameters * batch / 6e14) + batch * context * kv_bytes / 2.5e12
            noise = 1 + rng.normal(0, 0.01, 2)
            seconds[batch] = {"prefill": float(prefill * noise[0]), "decode": float(step * OUTPUT_LENGTH * noise[1])}
        return PieceCost(parameters, 2 * parameters, kv_bytes, seconds)

    pieces = {}
    for attention in SPACE.attentions:
        kv_size = attention.kv_heads * HEAD_DIM
        parameters = {"gqa": 2 * HIDDEN * (HEADS * HEAD_DIM + kv_size), "linear": HIDDEN * HIDDEN, "noop": 0}[attention.kind]
        pieces["attention", attention.name] = piece(parameters, 4 * kv_size)
    for ffn in SPACE.ffns:
        parameters = {"swiglu": 3 * HIDDEN * ffn.intermediate_size, "linear": HIDDEN * HIDDEN, "noop": 0}[ffn.kind]
        pieces["ffn", ffn.name] = piece(parameters, 0)
    each = PieceCosts.same_in_every_layer(pieces, num_layers=num_layers)
    return PieceCosts("bench", INPUT_LENGTH, OUTPUT_LENGTH, BATCHES, each, piece(2 * 128256 * HIDDEN, 0), "bench")


def make_scenario(*, batch_sizes: Sequence[int] = (64,)) -> Scenario:
    """Three constraints: throughput, which each batch size meets with another program, memory, KV bytes a token."""
    constraints = {
        "throughput_tokens_per_s": {"at_least": 1.6, "relative_to": "parent"},
        "memory_bytes": {"at_most": 0.65, "relative_to": "parent", "at": {"batch": 64, "length": 3072}},
        "kv_bytes_per_token": {"at_most": 0.55, "relative_to": "parent"},
    }
    content = {"version": 1, "name": "bench", "target": "bench", "constraints": constraints, "uptrain": {"tokens": 0}}
    return Scenario.model_validate({**content, "batch_sizes": tuple(batch_sizes)})


def make_program(num_layers: int, seed: int) -> tuple[Program, np.ndarray]:
    """Return the integer program of an instance and its costs."""
    candidates, scenario = Candidates.of(make_scores(num_layers, seed), PARENT), make_scenario()
    limits = scenario_limits(scenario, {"bench": make_costs(num_layers, seed)}, {"bench": 64}, candidates.parent)
    return candidates.program(limits), candidates.costs(scenario.objective)


def solve_with_pulp(program: Program, costs: np.ndarray) -> float:
    """Solve with PuLP and the CBC that it ships, plainly written, to the same gap."""
    import pulp

    problem = pulp.LpProblem("bench", pulp.LpMinimize)
    chosen = [pulp.LpVariable(f"x{i}", cat="Binary") for i in range(len(costs))]
    problem += pulp.lpSum(c * x for c, x in zip(costs, chosen, strict=True))
    for layer in range(program.num_layers):
        problem += pulp.lpSum(x for x, item in zip(chosen, program.items, strict=True) if layer in item.layers) == 1
    for row in program.rows:
        scale = abs(row.upper)
        problem += pulp.lpSum(float(a / scale) * x for a, x in zip(row.coefficients, chosen, strict=True)) <= 1
    problem.solve(pulp.PULP_CBC_CMD(msg=False, gapRel=1e-6, threads=1))
    return float(pulp.value(problem.objective))


def solve_with_mip(program: Program, costs: np.ndarray) -> float:
    """Solve with python-mip and the CBC that it ships, plainly written, to the same gap."""
    import mip

    model = mip.Model(solver_name=mip.CBC)
    model.verbose, model.threads, model.max_mip_gap = 0, 1, 1e-6
    chosen = [model.add_var(var_type=mip.BINARY) for _ in costs]
    model.objective = mip.minimize(mip.xsum(float(c) * x for c, x in zip(costs, chosen, strict=True)))
    for layer in range(program.num_layers):
        model += mip.xsum(x for x, item in zip(chosen, program.items, strict=True) if layer in item.layers) == 1
    for row in program.rows:
        scale = abs(row.upper)
        model += mip.xsum(float(a / scale) * x for a, x in zip(row.coefficients, chosen, strict=True)) <= 1
    model.optimize()
    return float(model.objective_value)


def time_call(call: Callable[[], object]) -> tuple[float, float, object]:
    """Return the seconds and the processor seconds that a call took, and what it returned."""
    start, start_cpu = time.perf_counter(), time.process_time()
    result = call()
    return time.perf_counter() - start, time.process_time() - start_cpu, result


def show_scaling(num_instances: int) -> None:
    """One batch size, from scores and costs to the checked solution, over the number of layers."""
    print("layers  blocks  constraints  median_s  worst_s  median_cpu_s  worst_cpu_s  largest_gap")
    for num_layers in (32, 80, 126):
        timed = []
        for seed in range(num_instances):
            scores, costs = make_scores(num_layers, seed), {"bench": make_costs(num_layers, seed)}
            timed.append(time_call(lambda s=scores, c=costs: solve_scenario(s, c, make_scenario(), PARENT)))
        wall, cpu, solutions = zip(*timed, strict=True)
        gap = max(solution.gap for solution in solutions)
        timings = f"{statistics.median(wall):8.3f}  {max(wall):7.3f}  {statistics.median(cpu):12.3f}  {max(cpu):11.3f}"
        print(f"{num_layers:6d}  {54:6d}  {3:11d}  {timings}  {gap:11.1e}")


def show_frontier() -> None:
    """A frontier of 20 points over 6 batch sizes, 80 layers."""
    scores, costs = make_scores(80, 0), {"bench": make_costs(80, 0)}
    values = [float(v) for v in np.linspace(1.0, 2.6, 20).round(3)]
    scenario = make_scenario(batch_sizes=BATCHES)
    seconds, cpu, points = time_call(lambda: sweep(scores, costs, scenario, PARENT, constraint="throughput_tokens_per_s", values=values))
    work = f"20 bounds x {len(BATCHES)} batch sizes, {len(points) - 1} points can be met"
    print(f"frontier: {work}, in {seconds:.1f} s ({cpu:.1f} s of processor)")


def show_comparison(num_instances: int) -> None:
    """The same programs with other solvers, each instance solved by all in turn; model building is in every time."""
    known = {"pulp": ("PuLP/CBC", solve_with_pulp), "mip": ("python-mip/CBC", solve_with_mip)}
    others = {name: solve for module, (name, solve) in known.items() if importlib.util.find_spec(module) is not None}
    for module, (name, _) in known.items():
        if name not in others:
            print(f"{name}: left out, because {module} is not installed; `pip install -e '.[benchmark]'` adds it")
    ours, theirs = list[tuple[float, float, object]](), {name: list[tuple[float, float, object]]() for name in others}
    for seed in range(num_instances):
        program, costs = make_program(80, seed)
        ours.append(time_call(lambda p=program, c=costs: minimise(p, c).objective))
        for name, solve in others.items():
            theirs[name].append(time_call(lambda p=program, c=costs, s=solve: s(p, c)))
    wall, cpu, objectives = zip(*ours, strict=True)
    own_seconds = f"{statistics.median(wall):.3f} s ({statistics.median(cpu):.3f} s of processor)"
    print(f"ours: median {own_seconds}, worst {max(wall):.3f} s, {num_instances} instances")
    for name, timed in theirs.items():
        ratios = [other / own for (own, _, _), (other, _, _) in zip(ours, timed, strict=True)]
        worst = max((own - other) / other for own, (_, _, other) in zip(objectives, timed, strict=True))
        seconds = statistics.median(t for t, _, _ in timed)
        num_slower = sum(ratio < 1 for ratio in ratios)
        print(
            f"{name}: median {seconds:.3f} s; ours is {statistics.median(ratios):.1f} times as fast in the median of the instances "
            f"({min(ratios):.1f} to {max(ratios):.1f}), slower on {num_slower}; our objective is above theirs by {worst:.1e} at most"
        )


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compare", action="store_true", help="also solve with PuLP/CBC and python-mip/CBC")
    parser.add_argument("--instances", type=int, default=20, help="random libraries (default: 20)")
    parser.add_argument("--only", choices=("scaling", "frontier", "comparison"), help="only this part")
    arguments = parser.parse_args()
    if arguments.only in (None, "scaling"):
        show_scaling(arguments.instances)
    if arguments.only in (None, "frontier"):
        show_frontier()
    if arguments.only == "comparison" or (arguments.only is None and arguments.compare):
        show_comparison(arguments.instances)


if __name__ == "__main__":
    main()
