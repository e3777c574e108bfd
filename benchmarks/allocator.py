"""What does it cost when glibc gives freed memory back, for models of like and of unlike layers?

    python -m benchmarks.allocator

Starts engines on this machine's CPU with glibc's own settings and with ours (puzzle_dag/engine/environment.py), by turns,
and prints the seconds of both and their ratio: for the bundled parent, and for heterogeneous models of its shape.
"""

import argparse
import json
import random
import statistics
from pathlib import Path
from unittest import mock

from puzzle_dag.architecture import Block
from puzzle_dag.config import read_profile, read_target
from puzzle_dag.costs.heldout import draw_models
from puzzle_dag.costs.probes import serving_config
from puzzle_dag.engine import environment
from puzzle_dag.engine.client import run_engines
from puzzle_dag.engine.jobs import EngineJob, EngineResult, EngineSettings, Workload
from puzzle_dag.lease import lease_device
from puzzle_dag.model.parent import read_parent_shape
from puzzle_dag.preflight import resolve_spaces
from puzzle_dag.report.tables import text_table


def main() -> None:
    """Run the engines and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path(), help="the project's root")
    parser.add_argument("--profile", default="quality")
    parser.add_argument("--target", default="cpu-prefill")
    parser.add_argument("--turns", type=int, default=4, help="engines of each model and setting (default: %(default)s)")
    args = parser.parse_args()
    profile, target = read_profile(args.root / "conf", args.profile), read_target(args.root / "conf", args.target)
    shape = read_parent_shape(profile.parent, args.root)
    parent = (Block.parse(f"kv{shape.num_key_value_heads}/w{shape.intermediate_size}"),) * shape.num_hidden_layers
    drawn = draw_models([s.blocks for s in resolve_spaces(profile, shape)], 3, known=[parent], seed=0)
    models = {"parent": parent} | {" ".join(b.name for b in m): m for m in drawn}
    workload = Workload(input_length=target.input_length, output_length=target.output_length, batch_sizes=target.batch_sizes, repeats=3)
    configs = {name: json.loads(json.dumps(serving_config(shape, model))) for name, model in models.items()}
    found: dict[tuple[str, bool], list[EngineResult]] = {}
    for turn in range(args.turns):
        for kept in random.Random(turn).sample([False, True], 2):
            jobs = [EngineJob(name=n, config=c, settings=EngineSettings(), workload=workload) for n, c in configs.items()]
            with lease_device(args.root), mock.patch.dict(environment.KEEP_MEMORY, clear=not kept):
                for result in run_engines(jobs):
                    found.setdefault((result.name, kept), []).append(result)
    rows = []
    for name in models:
        for batch in target.batch_sizes:
            for phase in ("prefill", "total"):
                plain, ours = (statistics.median(r.at(batch).median_s(phase) for r in found[name, kept]) for kept in (False, True))
                rows.append((name, str(batch), phase, f"{1e3 * plain:.1f} ms", f"{1e3 * ours:.1f} ms", f"{plain / ours:.2f}"))
    print(text_table(("model", "batch", "phase", "glibc's settings", "memory kept", "ratio"), rows))


if __name__ == "__main__":
    main()
