"""The commands on a child's checkpoint: `puzzle-dag fuse` and `puzzle-dag export`."""

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING

from puzzle_dag.architecture import Architecture
from puzzle_dag.console import say
from puzzle_dag.report.tables import text_table

if TYPE_CHECKING:
    from torch import Tensor

_LAYERS = re.compile(r"([0-9]+)-([0-9]+)")


def _layers(text: str) -> range:
    """Parse FIRST-LAST, both included."""
    match = _LAYERS.fullmatch(text)
    if match is None or int(match[1]) > int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not FIRST-LAST, e.g. 3-5")
    return range(int(match[1]), int(match[2]) + 1)


def _at_least_two(text: str) -> int:
    if int(text) < 2:
        raise argparse.ArgumentTypeError(f"{text} is less than 2")
    return int(text)


def _distance(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 2:
        raise argparse.ArgumentTypeError(f"{text} is no cosine distance, 0 to 2")
    return value


def _read_rows(args: argparse.Namespace) -> "Tensor":
    """Return the first token rows of a text file, int64 [rows, row_length]."""
    import torch

    from puzzle_dag.children.fuse import load_tokenizer

    ids = load_tokenizer(args.child)(args.text.read_text(encoding="utf-8"), add_special_tokens=False, verbose=False)["input_ids"]
    num_rows = min(args.num_rows, len(ids) // args.row_length)
    if num_rows == 0:
        raise ValueError(f"--text: {args.text} holds {len(ids)} tokens, less than one row of {args.row_length}; give more text")
    return torch.tensor(ids[: num_rows * args.row_length]).view(num_rows, args.row_length)


def _propose(args: argparse.Namespace) -> int:
    """Say which runs there are, how much their FFNs depend on each other, and which to fuse."""
    from puzzle_dag.children.dependency import largest_dependency, measure_dependency, propose_runs
    from puzzle_dag.children.fuse import find_runs
    from puzzle_dag.model.checkpoint import architecture_of, load_checkpoint
    from puzzle_dag.progress import ProgressLog

    rows = _read_rows(args)
    model = load_checkpoint(args.child)
    architecture = architecture_of(model.config)
    runs = find_runs(architecture)
    if not runs:
        say("no two FFNs follow each other without attention between them: there is nothing to fuse")
        return 1
    dependency = measure_dependency(model, rows, progress=ProgressLog("dependency"))
    for run in runs:
        layers = [layer for layer in run if architecture[layer].ffn.kind == "swiglu"]
        worst = largest_dependency(dependency, layers)
        say(f"layers {run.start}-{run.stop - 1}: largest dependency {worst:.3f} (measured, cosine distance)")
        header = ("dropped FFN", *(f"in layer {j}" for j in layers[1:]))
        say(text_table(header, [(f"layer {i}", *(f"{dependency[i, j]:.3f}" if j > i else "" for j in layers[1:])) for i in layers[:-1]]))
    proposed = propose_runs(architecture, dependency, args.max_dependency)
    options = " ".join(f"--layers {run.start}-{run.stop - 1}" for run in proposed)
    say(f"dependency at most {args.max_dependency:g}: {options or 'no run'}")
    return 0


def _describe(architecture: Architecture, layers: range) -> str:
    from puzzle_dag.children.fuse import list_fused_layers

    fused = list_fused_layers(architecture, layers)
    widths = [architecture[layer].ffn.intermediate_size for layer in fused]
    parts = " + ".join(map(str, widths))
    return f"layers {', '.join(map(str, fused))}: FFNs of {parts} channels are one of {sum(widths)}, in layer {fused[0]}"


def _fuse(args: argparse.Namespace) -> int:
    if not args.layers:
        if args.text is None or args.out is not None:
            raise ValueError("--layers: not given; say which layers to fuse, or give --text alone to learn which can be")
        return _propose(args)
    if args.out is None:
        raise ValueError("--out: not given; name the folder for the fused child")
    from puzzle_dag.children.divergence import measure_divergence
    from puzzle_dag.children.fuse import fuse_checkpoint
    from puzzle_dag.model.checkpoint import architecture_of
    from puzzle_dag.progress import ProgressLog

    rows = None if args.text is None else _read_rows(args)
    sequential, fused = fuse_checkpoint(args.child, args.layers, args.out)
    architecture = architecture_of(sequential.config)
    for layers in args.layers:
        say(_describe(architecture, layers))
    say(f"written: {args.out}")
    if rows is not None:
        cost = measure_divergence(sequential, fused, rows, progress=ProgressLog("divergence"))
        kl = f"KL from the child as it was: {cost.kl.mean:.4g} ± {cost.kl.stderr:.2g} nats a token"
        say(f"{kl}, top-1 agreement {cost.top1_agreement.mean:.1%} (measured, {cost.num_tokens} tokens)")
    return 0


def _export(args: argparse.Namespace) -> int:
    from puzzle_dag.children.export import export_deci

    export_deci(args.child, args.out, as_ffn_mult=args.ffn_mult)
    say(f"written: {args.out}")
    say(f"serve it with: vllm serve {args.out}   (without this package installed: add --trust-remote-code)")
    return 0


def add_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the commands to the parser of `puzzle-dag`."""
    fuse = commands.add_parser("fuse", help="FFN Fusion: make FFNs without attention between them one wide FFN")
    fuse.add_argument("child", type=Path, help="folder of a child's checkpoint")
    fuse.add_argument("--layers", type=_layers, action="append", default=[], metavar="FIRST-LAST", help="a run to fuse; may be repeated")
    fuse.add_argument("--out", type=Path, help="folder for the fused child; must not exist")
    fuse.add_argument("--text", type=Path, help="text to measure on: the divergence, or without --layers, which runs there are")
    fuse.add_argument("--num-rows", type=_at_least_two, default=32, help="rows of the text at most (default: %(default)s)")
    fuse.add_argument("--row-length", type=_at_least_two, default=256, help="tokens a row (default: %(default)s)")
    fuse.add_argument("--max-dependency", type=_distance, default=0.1, help="of a proposed run, cosine distance (default: %(default)s)")
    fuse.set_defaults(run=_fuse)

    export = commands.add_parser("export", help="write a child in another schema, for engines without our plugin")
    export.add_argument("child", type=Path, help="folder of a child's checkpoint")
    export.add_argument("--format", choices=("deci",), required=True, help="deci: Deci / Nemotron-NAS, stock vLLM's DeciLMForCausalLM")
    export.add_argument("--out", type=Path, required=True, help="folder for the export; must not exist")
    export.add_argument("--ffn-mult", action="store_true", help="give FFN widths as ffn_mult, which older readers know alone")
    export.set_defaults(run=_export)
