"""How well do fitted costs predict models that were not measured? Held-out random architectures on a target, with dummy weights.

    python -m benchmarks.cost_model --target cpu-prefill --num-models 6 --store DIR

Prints, for each batch size, the median and largest error of prefill and of the whole generation beside the repeat
noise (what no model could predict), and writes the rows as JSON. Probes and held-out models are kept in the
store, so a second run measures nothing.
"""

import argparse
import json
import logging
import random
import statistics
from pathlib import Path

from puzzle_dag.architecture import Architecture, Block, variant_union
from puzzle_dag.config import Profile, Target, read_profile, read_target
from puzzle_dag.costs.measure import measure_models, measure_target
from puzzle_dag.costs.table import CostTable
from puzzle_dag.costs.tabulate import Measurement
from puzzle_dag.model.configuration_puzzle_dag import PuzzleDagConfig
from puzzle_dag.model.parent import read_parent_shape
from puzzle_dag.preflight import resolve_spaces
from puzzle_dag.progress import ProgressLog
from puzzle_dag.store import ArtifactStore, write_atomically

log = logging.getLogger(__name__)


def draw_architectures(spaces: list[tuple[Block, ...]], num_models: int, seed: int) -> list[Architecture]:
    """Draw models that keep attention somewhere, so that the engine serves them like any child."""
    rng, drawn = random.Random(seed), []
    while len(drawn) < num_models:
        architecture = tuple(rng.choice(blocks) for blocks in spaces)
        if any(b.attention.kind == "gqa" for b in architecture):
            drawn.append(architecture)
    return drawn


def compare(table: CostTable, measured: list[Measurement]) -> list[dict[str, object]]:
    """Return one row a (model, batch): predicted and measured seconds of prefill and of the whole generation."""
    rows: list[dict[str, object]] = []
    for architecture in dict.fromkeys(m.architecture for m in measured):
        engines = [m.result for m in measured if m.architecture == architecture]
        for batch in table.batch_sizes:
            prefill, decode = (table.seconds(architecture, batch, p) for p in ("prefill", "decode"))
            row: dict[str, object] = {"architecture": [b.name for b in architecture], "batch": batch}
            for phase, predicted_s in (("prefill", prefill), ("total", prefill + decode)):
                times = [e.at(batch).median_s(phase) for e in engines]
                measured_s = statistics.fmean(times)
                row |= {
                    f"{phase}_predicted_s": predicted_s,
                    f"{phase}_measured_s": measured_s,
                    f"{phase}_error": abs(predicted_s / measured_s - 1),
                    f"{phase}_noise": (max(times) - min(times)) / measured_s,
                }
            rows.append(row)
    return rows


def print_summary(rows: list[dict[str, object]], table: CostTable) -> None:
    """Print median and largest error and noise, in percent."""
    first = table.rows[0]
    print(f"target {table.target.name}, {first.mode}, {first.dtype}, {first.hardware}, {first.num_threads} threads, {first.engine_version}")
    print(f"{table.num_engines} engines measured; percent, median / largest over the held-out models")
    print("| batch | prefill: error | between engines | whole: error | between engines |\n|---|---|---|---|---|")
    for batch in table.batch_sizes:
        cells = []
        for name in ("prefill_error", "prefill_noise", "total_error", "total_noise"):
            values = [100 * float(str(r[name])) for r in rows if r["batch"] == batch]
            cells.append(f"{statistics.median(values):.1f} / {max(values):.1f}")
        print(f"| {batch} | {' | '.join(cells)} |")


def measure(
    profile: Profile, shape: PuzzleDagConfig, target: Target, store: ArtifactStore, num_models: int, seed: int
) -> tuple[CostTable, list[Measurement]]:
    """Measure the target's costs, then the held-out models."""
    parent = Block.parse(f"kv{shape.num_key_value_heads}/w{shape.intermediate_size}")
    spaces = resolve_spaces(profile, shape)
    attentions, ffns = variant_union(spaces)
    table = measure_target(shape, parent, target, attentions, ffns, store, progress=ProgressLog("probes"))
    models = [(parent,) * shape.num_hidden_layers, *draw_architectures([s.blocks for s in spaces], num_models, seed)]
    return table, measure_models(shape, models, target, store, progress=ProgressLog("held-out models"))


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path(), help="the project's root")
    parser.add_argument("--profile", default="tiny")
    parser.add_argument("--target", default="cpu-prefill")
    parser.add_argument("--num-models", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--probes-per-variant", type=int, default=None, help="by default the target's")
    parser.add_argument("--store", type=Path, required=True, help="artifact store that keeps the measurements")
    parser.add_argument("--output", type=Path, default=None, help="JSON file for the rows")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    profile, target = read_profile(arguments.root / "conf", arguments.profile), read_target(arguments.root / "conf", arguments.target)
    if arguments.probes_per_variant is not None:
        target = target.model_copy(update={"probes_per_variant": arguments.probes_per_variant})
    shape, store = read_parent_shape(profile.parent, arguments.root), ArtifactStore(arguments.store)
    table, measured = measure(profile, shape, target, store, arguments.num_models, arguments.seed)
    rows = compare(table, measured)
    print_summary(rows, table)
    if arguments.output is not None:
        write_atomically(arguments.output, json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
