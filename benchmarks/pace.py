"""How much of what the same engine's times differ by is the machine's own pace?

    python -m benchmarks.pace --seconds 150

Keeps one engine of the parent, and then no other, alive for as long on this machine, and prints what medians over windows of 4 and of 8
repeats differ by (relative standard deviation), as measured and levelled by the pace (puzzle_dag/engine/pace.py), side by side.
"""

import argparse
import statistics
from dataclasses import replace
from pathlib import Path

from puzzle_dag.architecture import Block
from puzzle_dag.config import read_profile, read_target
from puzzle_dag.costs.measure import plain_config
from puzzle_dag.engine.client import run_engines
from puzzle_dag.engine.jobs import BatchTimes, EngineJob, EngineSettings, Workload
from puzzle_dag.lease import lease_device
from puzzle_dag.model.parent import read_parent_shape
from puzzle_dag.report.tables import text_table

PHASES = ("prefill", "decode", "total")
WINDOWS = (4, 8)
_FEWEST_WINDOWS = 2
_TRIAL_REPEATS = 3


def split(times: BatchTimes, size: int) -> list[BatchTimes]:
    """Return consecutive windows of `size` repeats; what is left over at the end is left out."""
    starts = range(0, len(times.total_s) - size + 1, size)
    fields = (times.prefill_s, times.total_s, times.reference_s)
    return [BatchTimes(times.batch, *(values[start : start + size] for values in fields)) for start in starts]


def measure_spread(times: BatchTimes, phase: str, size: int) -> tuple[float, float]:
    """Return the relative standard deviation over windows of their medians: as measured, and in multiples of the reference.

    Raises:
        ValueError: the repeats make fewer than two windows.
    """
    windows = split(times, size)
    if len(windows) < _FEWEST_WINDOWS:
        raise ValueError(f"{len(times.total_s)} repeats make {len(windows)} windows of {size}; keep the engine alive longer (`--seconds`)")
    raw, paces = [w.median_s(phase) for w in windows], [w.median_pace(phase) for w in windows]
    levelled = [p for p in paces if p is not None]
    assert len(levelled) == len(raw), "measured just now, so there are references"
    spread, levelled_spread = (statistics.stdev(values) / statistics.fmean(values) for values in (raw, levelled))
    return spread, levelled_spread


def count_repeats(trial: tuple[BatchTimes, ...], seconds: float) -> int:
    """Return how many repeats of all batch sizes take so long, references included, by a short trial."""
    round_s = sum(statistics.fmean(t.total_s) + statistics.fmean(t.reference_s) for t in trial)
    return max(_FEWEST_WINDOWS * max(WINDOWS), round(seconds / round_s))


def main(arguments: list[str] | None = None) -> None:
    """Run the engine and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path(), help="the project's root")
    parser.add_argument("--profile", default="quality")
    parser.add_argument("--target", default="cpu-prefill")
    parser.add_argument("--seconds", type=float, default=150.0, help="how long the engine is kept alive, about (default: %(default)s)")
    args = parser.parse_args(arguments)
    profile, target = read_profile(args.root / "conf", args.profile), read_target(args.root / "conf", args.target)
    shape = read_parent_shape(profile.parent, args.root)
    parent = (Block.parse(f"kv{shape.num_key_value_heads}/w{shape.intermediate_size}"),) * shape.num_hidden_layers
    config = plain_config(shape, parent)
    workload = replace(Workload.of(target), repeats=_TRIAL_REPEATS)
    job = EngineJob(name="trial", config=config, settings=EngineSettings.of(target), workload=workload)
    with lease_device(args.root):
        (trial,) = run_engines([job])
        repeats = count_repeats(trial.times, args.seconds)
        (result,) = run_engines([replace(job, name="parent", workload=replace(workload, repeats=repeats))])
    rows = []
    for times in result.times:
        for phase in PHASES:
            spreads = [spread for size in WINDOWS for spread in measure_spread(times, phase, size)]
            rows.append((str(times.batch), phase, *(f"{spread:.1%}" for spread in spreads)))
    kinds = [f"{kind}, {size} repeats" for size in WINDOWS for kind in ("as measured", "levelled")]
    print(f"{repeats} repeats of each batch size in one engine; relative standard deviation of the medians:")
    print(text_table(("batch", "phase", *kinds), rows))


if __name__ == "__main__":
    main()
