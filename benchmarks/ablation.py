"""What each part of the method buys: one row a scenario, seed and arm, all children of a scenario under the same constraints.

Arms, each with and without global distillation (GKD): the integer program (MIP) on the trained library, started in
closed form; greedy, largest-parameters and random choices from that same library (Puzzle, appendix F.2); the MIP on
a library without block-wise distillation (BLD); both again from the paper's initialisations; and the MIP's solutions of all
four libraries refined with scores taken inside the child. Everything else is equal: the cost table,
the tokens, the settings. A seed changes the tokens of every stage and the order of training. By default one scenario and
the arms without refinement run, 21 children; an arm takes some two minutes a scenario and seed on two cores.

    python benchmarks/ablation.py --profile quality --scenarios throughput-1.5x-quality throughput-2x-quality

Resumable: finished rows in OUT/rows.jsonl are not computed again. Needs the target's costs, which it measures (or
finds in the store of earlier runs). Prints a table a scenario, of means over the seeds and each arm's ratio to the first
arm, and one of what each library's variants cost alone: there one sees what initialisation and BLD do before any search.
"""

import argparse
import json
import logging
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from puzzle_dag.architecture import Block, LayerSpace, variant_union
from puzzle_dag.children.assemble import assemble_child, num_parameters
from puzzle_dag.children.divergence import measure_divergence
from puzzle_dag.children.evaluate import TaskResult, evaluate_checkpoint, evaluate_model
from puzzle_dag.children.retention import mean_retention, retention
from puzzle_dag.children.uptrain import uptrain_child
from puzzle_dag.config import Profile, Scenario, read_profile, read_scenario, read_target
from puzzle_dag.corpus.tokens import build_tokens
from puzzle_dag.costs.measure import measure_target
from puzzle_dag.library.activations import ActivationCache, collect_activations
from puzzle_dag.library.build import build_layer
from puzzle_dag.model.checkpoint import load_checkpoint
from puzzle_dag.model.parent import Parent, load_parent
from puzzle_dag.piece_costs import PieceCosts
from puzzle_dag.pieces import LayerPieces
from puzzle_dag.preflight import resolve_spaces
from puzzle_dag.search.baselines import greedy_solution, largest_parameters_solution, random_solution
from puzzle_dag.search.context import Context
from puzzle_dag.search.refine import refine_solution
from puzzle_dag.search.score import BlockScore, score_layer
from puzzle_dag.search.solution import Solution
from puzzle_dag.search.solve import solve_scenario
from puzzle_dag.store import ArtifactStore

log = logging.getLogger("ablation")

_HELDOUT_TOKENS = 32_768


@dataclass(frozen=True)
class Arm:
    """One way to get a child: how the library is made, and how the child is picked from it."""

    name: str
    initialisation: str
    with_bld: bool
    selection: str
    num_rounds: int = 0
    """Rounds of refinement."""


_MIP_ARMS = (
    Arm("MIP, closed form, BLD", "closed_form", True, "mip"),
    Arm("MIP, closed form, no BLD", "closed_form", False, "mip"),
    Arm("MIP, paper's initialisation, BLD", "paper", True, "mip"),
    Arm("MIP, paper's initialisation, no BLD", "paper", False, "mip"),
)
ARMS = (
    _MIP_ARMS[0],
    Arm("greedy", "closed_form", True, "greedy"),
    Arm("largest parameters", "closed_form", True, "largest"),
    Arm("random", "closed_form", True, "random"),
    *_MIP_ARMS[1:],
    *(replace(arm, name=f"{arm.name}, refined", num_rounds=3) for arm in _MIP_ARMS),
)


@dataclass
class Bench:
    """What all seeds and arms share."""

    profile: Profile
    scenarios: list[Scenario]
    parent: Parent
    spaces: list[LayerSpace]
    costs: dict[str, PieceCosts]
    store: ArtifactStore
    out: Path
    uptrain_tokens: int
    parent_results: list[TaskResult]

    def tokens(self, purpose: Any, num_tokens: int, seed: int) -> torch.Tensor:
        """Return rows for one purpose, of the seed's own random stream."""
        length = self.profile.tokens.row_length
        return build_tokens(
            self.profile.corpus, self.parent.tokenizer, num_tokens=num_tokens, row_length=length, purpose=purpose, seed=seed, root=Path()
        )

    @property
    def skills(self) -> list[str]:
        """Names of the skill tasks: what retention is the mean of."""
        return [t for t in self.profile.accuracy.tasks if t.startswith("skill_")]


def collect(bench: Bench, seed: int) -> ActivationCache:
    """Return the seed's activations."""
    folder = bench.out / f"activations-{seed}"
    train = bench.tokens("train", bench.profile.tokens.activations, seed)
    collect_activations(bench.parent, train, bench.tokens("score", bench.profile.tokens.scores, seed), folder, dtype=bench.profile.dtype)
    return ActivationCache(folder)


def build_library(bench: Bench, cache: ActivationCache, arm: Arm, seed: int) -> tuple[list[LayerPieces], list[list[BlockScore]]]:
    """Return pieces and scores of the arm's library; the store keeps both, so that arms share them."""
    tokens = bench.profile.library.num_tokens if arm.with_bld else 0
    settings = bench.profile.library.model_copy(update={"initialisation": arm.initialisation, "num_tokens": tokens, "seed": seed})
    pieces, scores = [], []
    for layer, space in enumerate(bench.spaces):
        keys = {"activations_digest": cache.digest, "compute_dtype": bench.profile.dtype}
        made, _ = build_layer(bench.parent, layer, space, cache, settings, bench.store, **keys)
        pieces.append(made)
        scores.append(score_layer(bench.parent, layer, space, made, cache, bench.store, **keys))
        log.info("seed %d, %s: layer %d of %d", seed, arm.name, layer + 1, len(bench.spaces))
    return pieces, scores


def select(
    bench: Bench, scenario: Scenario, arm: Arm, cache: ActivationCache, library: tuple[list[LayerPieces], list[list[BlockScore]]], seed: int
) -> tuple[Solution, Solution]:
    """Pick the arm's architecture; every selection meets the scenario's constraints. Return what was found, and refined if so asked."""
    choosers: dict[str, Callable[..., Solution]] = {
        "mip": solve_scenario,
        "greedy": greedy_solution,
        "largest": largest_parameters_solution,
        "random": partial(random_solution, seed=seed),
    }
    pieces, scores = library
    found = choosers[arm.selection](scores, bench.costs, scenario, bench.parent.block)
    if not arm.num_rounds:
        return found, found
    context = Context(bench.parent, bench.spaces, pieces, cache, bench.profile.dtype)
    return found, refine_solution(found, scores, bench.costs, scenario, context, bench.store, num_rounds=arm.num_rounds).solution


def single_kl(bench: Bench, scores: list[list[BlockScore]]) -> dict[str, float]:
    """Return, for each variant, the mean over the layers of the KL where it alone is exchanged, the layer's other place kept."""
    own, values = bench.parent.block, dict[str, list[float]]()
    for layer in scores:
        for score in layer:
            block = Block.parse(score.block)
            if (block.attention == own.attention) != (block.ffn == own.ffn):
                name = f"FFN {block.ffn.name}" if block.attention == own.attention else f"attention {block.attention.name}"
                values.setdefault(name, []).append(score.kl)
    return {name: statistics.mean(found) for name, found in values.items()}


def grade(bench: Bench, folder: Path, seed: int) -> dict[str, float | None]:
    """Return KL divergence and mean chance-corrected retention of a checkpoint."""
    child = load_checkpoint(folder)
    divergence = measure_divergence(bench.parent.model, child, bench.tokens("heldout", _HELDOUT_TOKENS, seed))
    results = evaluate_checkpoint(folder, bench.skills, bench.profile.accuracy, bench.profile.corpus, bench.out / "tasks")
    kept = mean_retention(retention(bench.parent_results, results))
    return {"kl": divergence.kl.mean, "kl_stderr": divergence.kl.stderr, "retention": kept.value, "retention_stderr": kept.stderr}


def run_arm(bench: Bench, scenario: Scenario, cache: ActivationCache, arm: Arm, seed: int) -> dict[str, Any]:
    """Return the arm's row: what it picked, what that scores before and after GKD."""
    started = time.perf_counter()
    pieces, scores = build_library(bench, cache, arm, seed)
    found, solution = select(bench, scenario, arm, cache, (pieces, scores), seed)
    folder = bench.out / f"child-{scenario.name}-{seed}-{ARMS.index(arm)}"
    assemble_child(bench.parent, solution.architecture, pieces, folder)
    rows = bench.tokens("uptrain", bench.uptrain_tokens, seed)
    healed = folder.with_name(folder.name + "-gkd")
    uptrain_child(
        bench.parent, folder, rows, bench.profile.uptrain, healed, compute_dtype=bench.profile.dtype, work_folder=bench.out / "work"
    )
    return {
        "scenario": scenario.name,
        "seed": seed,
        "arm": arm.name,
        "blocks": [b.name for b in solution.architecture],
        "batch": solution.batch,
        "summed_score": found.objective,
        "single_kl": single_kl(bench, scores),
        "predicted": solution.predicted,
        "parameters": num_parameters(load_checkpoint(folder)),
        "before_gkd": grade(bench, folder, seed),
        "after_gkd": grade(bench, healed, seed),
        "seconds": time.perf_counter() - started,
    }


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print a Markdown table of means and standard deviations over the seeds, and ratios to the first arm."""

    def cell(arm: str, stage: str, key: str, percent: bool) -> tuple[str, float]:
        values = [r[stage][key] for r in rows if r["arm"] == arm]
        mean, spread = statistics.mean(values), statistics.stdev(values) if len(values) > 1 else math.nan
        return (f"{mean:.1%} ± {spread:.1%}" if percent else f"{mean:.3f} ± {spread:.3f}"), mean

    print("| arm | KL, no GKD | KL, GKD | KL, ratio to the first | retention, no GKD | retention, GKD | seeds |")
    print("|---|---|---|---|---|---|---|")
    first = cell(next(arm.name for arm in ARMS if any(r["arm"] == arm.name for r in rows)), "after_gkd", "kl", False)[1]
    for arm in ARMS:
        num_seeds = sum(r["arm"] == arm.name for r in rows)
        if num_seeds:
            kl, healed_kl = cell(arm.name, "before_gkd", "kl", False)[0], cell(arm.name, "after_gkd", "kl", False)
            kept, healed = cell(arm.name, "before_gkd", "retention", True)[0], cell(arm.name, "after_gkd", "retention", True)[0]
            print(f"| {arm.name} | {kl} | {healed_kl[0]} | {healed_kl[1] / first:.2f} | {kept} | {healed} | {num_seeds} |")


def print_library_table(rows: list[dict[str, Any]]) -> None:
    """Print what each variant alone costs in KL, by how the library was made: mean over layers and seeds."""
    arms = [arm for arm in _MIP_ARMS if any(r["arm"] == arm.name for r in rows)]
    by_arm = {arm.name: [r["single_kl"] for r in rows if r["arm"] == arm.name] for arm in arms}
    print("| variant | " + " | ".join(arm.name.removeprefix("MIP, ") for arm in arms) + " |")
    print("|---|" + "---|" * len(arms))
    for variant in sorted(rows[0]["single_kl"]):
        print(f"| {variant} | " + " | ".join(f"{statistics.mean(r[variant] for r in by_arm[arm.name]):.4f}" for arm in arms) + " |")


def prepare(args: argparse.Namespace) -> Bench:
    """Load the parent, measure the target's costs, grade the parent."""
    conf = Path("conf")
    profile, scenarios = read_profile(conf, args.profile), [read_scenario(conf, name) for name in args.scenarios]
    budgets = {"activations": args.activation_tokens, "scores": args.score_tokens}
    profile = profile.model_copy(
        update={
            "tokens": profile.tokens.model_copy(update=budgets),
            "library": profile.library.model_copy(update={"num_tokens": args.activation_tokens}),
            "accuracy": profile.accuracy.model_copy(update={"num_items": args.items}),
        }
    )
    parent, store = load_parent(profile.parent, Path()), ArtifactStore(args.store)
    spaces = resolve_spaces(profile, parent.config)
    costs: dict[str, PieceCosts] = {}
    for target in [read_target(conf, name) for name in sorted({s.target for s in scenarios})]:
        table = measure_target(parent.config, parent.block, target, *variant_union(spaces), store)
        costs[target.name] = table.to_piece_costs(parent.config)
    bench = Bench(profile, scenarios, parent, spaces, costs, store, args.out, args.uptrain_tokens, [])
    tasks = args.out / "tasks"
    bench.parent_results = evaluate_model(parent.model, parent.tokenizer, bench.skills, profile.accuracy, profile.corpus, tasks)
    return bench


def main() -> None:
    """Run what is missing, then print the table."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default="quality")
    parser.add_argument("--scenarios", nargs="+", default=["throughput-1.5x-quality"], metavar="NAME", help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("var/ablation"))
    parser.add_argument("--store", type=Path, default=Path("var/store"), help="artifact store; the workflow's own by default")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--activation-tokens", type=int, default=65_536)
    parser.add_argument("--score-tokens", type=int, default=6_144)
    parser.add_argument("--uptrain-tokens", type=int, default=65_536)
    unrefined = [arm.name for arm in ARMS if not arm.num_rounds]
    parser.add_argument("--arms", nargs="+", default=unrefined, metavar="NAME", help="only these (default: all that aren't refined)")
    parser.add_argument("--items", type=int, default=500, help="items a skill")
    args = parser.parse_args()
    if unknown := set(args.arms) - {arm.name for arm in ARMS}:
        parser.error(f"--arms: there is no {', '.join(sorted(unknown))}; there are: {'; '.join(arm.name for arm in ARMS)}")
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "rows.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {(r["scenario"], r["seed"], r["arm"]) for r in rows}
    bench = prepare(args)
    for seed in range(args.seeds):
        wanted = [(s, arm) for s in bench.scenarios for arm in ARMS if arm.name in args.arms and (s.name, seed, arm.name) not in done]
        cache = collect(bench, seed) if wanted else None
        for scenario, arm in wanted:
            assert cache is not None
            rows.append(run_arm(bench, scenario, cache, arm, seed))
            with path.open("a") as f:
                f.write(json.dumps(rows[-1]) + "\n")
            log.info(
                "%s, seed %d, %s: after GKD %s, %.0f s", scenario.name, seed, arm.name, rows[-1]["after_gkd"], rows[-1]["seconds"]
            )
    for scenario in bench.scenarios:
        print(f"\n{scenario.name}\n")
        print_table([r for r in rows if r["scenario"] == scenario.name])
    print("\nKL of one variant alone\n")
    print_library_table(rows)


if __name__ == "__main__":
    main()
