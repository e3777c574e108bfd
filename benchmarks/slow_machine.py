"""How long would the demo take where products are slower? Runs it in float32, which is multiplied at a fraction of the rate.

    python -m benchmarks.slow_machine --folder /somewhere/empty [--cores 1]

Copies conf/ into the folder with every `dtype` set to float32, runs `python -m assets demo` there in a process of its own, and prints
the rates of both types, at a large square and at the shape of the parent's layers, beside the demo's own table and the time of the
whole. float32 also moves twice the bytes, so a machine of that rate in bfloat16 would rather be quicker. With fewer cores everything else
takes longer, too: an engine starts, and Python runs, on the core that multiplies.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from puzzle_dag.engine.hardware import measure_matmul_rate
from puzzle_dag.engine.pace import CPU_REFERENCE, time_products
from puzzle_dag.lease import lease_device
from puzzle_dag.report.tables import format_seconds

_TRIES = 20


def measure_rates(dtype: torch.dtype) -> tuple[float, float]:
    """Return the flop/s of products of 2048 x 2048 x 2048, and of the layers' shapes: the fastest of several."""
    shortest_s = min(time_products(CPU_REFERENCE, torch.device("cpu"), dtype) for _ in range(_TRIES))
    return measure_matmul_rate(dtype), CPU_REFERENCE.flops / shortest_s


def copy_in_float32(root: Path, folder: Path) -> int:
    """Copy what a demo reads into an empty folder, with float32 wherever conf/ says a dtype. Return how often it did."""
    shutil.copytree(root / "conf", folder / "conf")
    (folder / "parents").symlink_to((root / "parents").resolve())
    num_changed = 0
    for path in (folder / "conf").rglob("*.yaml"):
        text = path.read_text()
        num_changed += text.count("dtype: bfloat16")
        path.write_text(text.replace("dtype: bfloat16", "dtype: float32"))
    return num_changed


def main(arguments: list[str] | None = None) -> int:
    """Print the rates, run the demo, print how long it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path(), help="the project's root")
    parser.add_argument("--folder", type=Path, required=True, help="an empty or new folder for what the demo makes, some GB")
    parser.add_argument("--profile", default="tiny")
    parser.add_argument("--cores", type=int, help="how many of this machine's cores it may use; all where left out")
    args = parser.parse_args(arguments)
    root, folder = args.root.resolve(), args.folder.resolve()
    if folder.exists() and any(folder.iterdir()):
        parser.error(f"--folder {folder} is not empty: what was made before would be fresh; name another")
    cores = sorted(os.sched_getaffinity(0))
    if args.cores is not None:
        if not 0 < args.cores <= len(cores):
            parser.error(f"--cores {args.cores}: this machine has {len(cores)}; name 1 to {len(cores)}")
        # Whatever is started from here on inherits it, engines included.
        os.sched_setaffinity(0, cores[: args.cores])
        torch.set_num_threads(args.cores)
    folder.mkdir(parents=True, exist_ok=True)
    with lease_device(root):
        for dtype in (torch.bfloat16, torch.float32):
            square, layers = measure_rates(dtype)
            print(f"{dtype}: {square / 1e9:.0f} GFLOP/s of 2048 x 2048 x 2048, {layers / 1e9:.0f} of the layers' shapes")
        print(f"{copy_in_float32(root, folder)} times float32", flush=True)
        threads = {} if args.cores is None else {"OMP_NUM_THREADS": str(args.cores)}
        environment = {**os.environ, **threads, "PUZZLE_DAG_ROOT": str(folder)}
        start = time.perf_counter()
        # It takes the lease of its own folder, so this one goes on: nothing else is to measure here meanwhile.
        code = subprocess.call([sys.executable, "-m", "assets", "demo", "--profile", args.profile], cwd=root, env=environment)
    print(f"the demo in float32, all of it: {format_seconds(time.perf_counter() - start)}")
    return code


if __name__ == "__main__":
    sys.exit(main())
