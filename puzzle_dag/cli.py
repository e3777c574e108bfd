"""The command `puzzle-dag`: what works without the orchestrator. A user's mistake ends it with one line and status 2."""

import argparse
import dataclasses
import json
import logging
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from puzzle_dag.cli_children import add_commands
from puzzle_dag.console import say
from puzzle_dag.costs.commands import add_cost_commands
from puzzle_dag.report.loosened import LoosenedFact, loosened_rows
from puzzle_dag.report.tables import format_bytes, format_seconds, text_table


def _doctor(args: argparse.Namespace) -> int:
    from puzzle_dag.doctor import examine

    findings = examine(args.root, quick=args.quick)
    if args.json:
        say(json.dumps([dataclasses.asdict(f) for f in findings], indent=1))
    else:
        say(text_table(("what", "state", "found", "what to do"), [(f.name, f.state, f.text, f.fix) for f in findings]))
    return int(any(f.state == "problem" for f in findings))


def _gc(args: argparse.Namespace) -> int:
    from puzzle_dag.sweep import sweep

    found = sweep(args.root / "var", unused_days=args.unused_days, dry=args.dry_run)
    for folder in found.removed:
        say(str(folder.relative_to(args.root)))
    say(f"{'would go' if args.dry_run else 'removed'}: {len(found.removed)} folders, {format_bytes(found.removed_bytes)}")
    say(f"kept: {found.num_kept} folders, {format_bytes(found.kept_bytes)}")
    return 0


def _estimate(args: argparse.Namespace) -> int:
    from puzzle_dag.architecture import FFN, Attention, Block
    from puzzle_dag.config import profile_file, read_profile, read_target
    from puzzle_dag.costs.accelerators import ACCELERATORS
    from puzzle_dag.costs.roofline import estimate_table
    from puzzle_dag.model.parent import read_parent_shape
    from puzzle_dag.preflight import check_lengths, list_cost_variants

    conf = args.root / "conf"
    profile, target = read_profile(conf, args.profile), read_target(conf, args.target)
    shape = read_parent_shape(profile.parent, args.root)
    check_lengths(conf, profile, {target.name: target}, shape)
    parent = Block(Attention("gqa", shape.num_key_value_heads), FFN("swiglu", shape.intermediate_size))
    variants = list_cost_variants(profile, shape, file=profile_file(conf, profile.name))
    table = estimate_table(shape, parent, target, *variants)
    rows = [(r.batch, r.phase, r.place, r.variant, format_seconds(r.seconds), r.source) for r in table.rows]
    say(text_table(("batch", "phase", "place", "variant", "time a layer", "source"), rows))
    say(f"analytic: from published peaks of {table.rows[0].hardware}; nothing was measured")
    say(f"peaks: {ACCELERATORS[target.hardware].source}")
    if args.out is not None:
        table.write(args.out)
        say(f"written: {args.out}")
    return 0


def _solve(args: argparse.Namespace) -> int:
    from puzzle_dag.search.foreign import read_foreign_library, solve_foreign_library

    answer = solve_foreign_library(
        read_foreign_library(args.library),
        minimize=args.minimize,
        at_most=_bounds("--at-most", args.at_most),
        at_least=_bounds("--at-least", args.at_least),
        num_solutions=args.num_solutions,
        min_different_layers=args.min_different_layers,
        loosen=args.loosen,
    )
    solutions = [found for found in answer.get("solutions", [answer]) if found["choices"]]
    if args.json:
        say(json.dumps(answer, indent=1))
    elif not solutions:
        say(f"{answer['status']}: no choice was found in {answer['seconds']:.3g} s")
        if answer.get("conflicting"):
            say(f"conflicting are {'; '.join(answer['conflicting'])}")
        for name, nearest in answer.get("nearest", {}).items():
            say(f"{name}: {nearest['value']:.6g} can be met together with {', '.join(nearest['while_met']) or 'nothing else'}")
    else:
        for solution in solutions:
            numbers = {k: f"{solution[k]:.6g}" for k in ("objective", "bound", "gap", "seconds")}
            numbers |= {k: f"{v:.6g}" for k, v in solution["costs"].items()}
            say(f"{solution['status']}: " + ", ".join(f"{k} {v}" for k, v in numbers.items()))
            say(text_table(("layer", "variant"), list(solution["choices"].items())))
        if loosened := loosened_rows([LoosenedFact.of(entry) for entry in solutions[0].get("loosening", ())], args.minimize):
            say(text_table(tuple(loosened[0]), [tuple(row.values()) for row in loosened]))
    return 0 if solutions else 1


def _bound(text: str) -> tuple[str, float]:
    """Parse NAME=VALUE."""
    name, sign, value = text.partition("=")
    if not (name and sign):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE, e.g. stats.memory_mib=70000")
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{text!r}: {value!r} is no finite number, e.g. stats.memory_mib=70000")
    return name, number


def _bounds(option: str, bounds: Sequence[tuple[str, float]]) -> dict[str, float]:
    """Return the bounds by name. Raises ValueError where a number is bounded twice from the same side."""
    found = dict(bounds)
    if len(found) < len(bounds):
        names = [name for name, _ in bounds]
        twice = next(n for n in names if names.count(n) > 1)
        raise ValueError(f"{option} is there twice for {twice}; give it once")
    return found


def _not_negative(text: str) -> float:
    value = float(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return value


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = argparse.ArgumentParser(prog="puzzle-dag", description="Smaller children of a large language model, measured and graded.")
    parser.add_argument("--root", type=Path, default=Path(), help="project folder, with conf/ and var/ (default: the current folder)")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    doctor = commands.add_parser("doctor", help="what is installed, what machine this is, whether the engine works, what to do")
    doctor.add_argument("--quick", action="store_true", help="leave out what takes seconds")
    doctor.add_argument("--json", action="store_true", help="findings as JSON")
    doctor.set_defaults(run=_doctor)

    gc = commands.add_parser("gc", help="remove what a crash left half written and what nothing has used for long")
    gc.add_argument("--unused-days", type=_not_negative, default=30.0, help="days without use (default: %(default)s)")
    gc.add_argument("--dry-run", action="store_true", help="only say what would go")
    gc.set_defaults(run=_gc)

    solve = commands.add_parser("solve", help="search a library that someone else measured: layer -> variant -> numbers")
    solve.add_argument("--library", type=Path, required=True, help="JSON; or CSV or Parquet with layer, variant, metric, value")
    solve.add_argument("--minimize", required=True, metavar="NAME", help="number whose sum is minimised, by dotted path: metrics.kl_div")
    for side in ("most", "least"):
        solve.add_argument(f"--at-{side}", type=_bound, action="append", default=[], metavar="NAME=VALUE", help="bound of a number's sum")
    solve.add_argument("--num-solutions", type=int, default=1, help="how many answers (default: %(default)s)")
    solve.add_argument("--min-different-layers", type=int, default=1, help="layers in which any two answers differ at least")
    solve.add_argument("--loosen", action="store_true", help="also say what each bound 5 %% looser would buy; a solve for each")
    solve.add_argument("--json", action="store_true", help="the answer as JSON, and nothing else")
    solve.set_defaults(run=_solve)

    estimate = commands.add_parser("estimate", help="estimate from published peaks what every variant costs on a target nobody measured")
    estimate.add_argument("--profile", required=True, help="name of a file in conf/profiles")
    estimate.add_argument("--target", required=True, help="name of a file in conf/targets")
    estimate.add_argument("--out", type=Path, help="Parquet file for the table")
    estimate.set_defaults(run=_estimate)
    add_commands(commands)
    add_cost_commands(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return 0, 1 where something is wrong with what was looked at, or 2 for a mistake of the user's."""
    args = build_parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    try:
        code: int = args.run(args)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except KeyboardInterrupt:
        return 130
    return code


if __name__ == "__main__":
    sys.exit(main())
