"""The commands around costs: measure a target, take a table along to another machine, and ask the engine what it can do."""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from puzzle_dag.console import say
from puzzle_dag.report.tables import format_bytes, format_seconds, text_table

if TYPE_CHECKING:
    from puzzle_dag.costs.heldout import Verdict
    from puzzle_dag.costs.table import CostTable
    from puzzle_dag.model.configuration_puzzle_dag import PuzzleDagConfig


def _read_shape(root: Path, profile_name: str) -> "tuple[Any, PuzzleDagConfig]":
    from puzzle_dag.config import read_profile
    from puzzle_dag.model.parent import read_parent_shape

    profile = read_profile(root / "conf", profile_name)
    return profile, read_parent_shape(profile.parent, root)


def measure(args: argparse.Namespace) -> int:
    """Measure what every variant of a profile costs on a target and how well that predicts; print both and, where asked, write them."""
    from puzzle_dag.architecture import FFN, Attention, Block
    from puzzle_dag.config import profile_file, read_target
    from puzzle_dag.costs.heldout import judge
    from puzzle_dag.costs.obtain import obtain_costs
    from puzzle_dag.engine.failures import EngineFailedError
    from puzzle_dag.lease import lease_device
    from puzzle_dag.preflight import check_lengths, list_cost_variants
    from puzzle_dag.progress import ProgressLog
    from puzzle_dag.store import ArtifactStore

    profile, shape = _read_shape(args.root, args.profile)
    conf = args.root / "conf"
    target = read_target(conf, args.target)
    check_lengths(conf, profile, {target.name: target}, shape)
    attentions, ffns = list_cost_variants(profile, shape, file=profile_file(conf, profile.name))
    parent = Block(Attention("gqa", shape.num_key_value_heads), FFN("swiglu", shape.intermediate_size))
    store, progress = ArtifactStore(args.root / "var" / "store"), ProgressLog(f"measuring {target.name}")
    options: dict[str, Any] = {"analytic": False, "remeasure": args.remeasure, "progress": progress}
    try:
        with lease_device(args.root):
            table, comparisons = obtain_costs(shape, parent, target, attentions, ffns, store, **options)
    except EngineFailedError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    rows = [(r.batch, r.phase, r.place, r.variant, format_seconds(r.seconds)) for r in table.rows]
    say(text_table(("batch", "phase", "place", "variant", "time a layer"), rows))
    _say_verdicts(judge(comparisons))
    if args.out is not None:
        table.write(args.out)
        say(f"written: {args.out}; take it to another machine with `puzzle-dag costs import {args.out.name}`")
    return 0


def _say_verdicts(verdicts: "list[Verdict]") -> None:
    if not verdicts:
        say("no model was held out, so nothing checks these costs; `heldout_models: 8` in the target has them checked")
        return
    rows = [
        (v.batch, v.phase, f"{v.median_error:.1%} of {v.median_limit:.1%}", f"{v.worst_error:.1%} of {v.worst_limit:.1%}", _word(v))
        for v in verdicts
    ]
    say(f"{verdicts[0].num_models} held-out models, predicted against measured:")
    say(text_table(("batch", "phase", "median error", "worst error", "verdict"), rows))


def _word(verdict: "Verdict") -> str:
    return "passed" if verdict.passed else "failed"


def describe_heldout(comparisons: tuple[dict[str, Any], ...]) -> str:
    """Return what held-out models said of costs, e.g. "8 models, worst median error 1.2 %, worst error 3.4 %: passed"."""
    from puzzle_dag.costs.comparison import Comparison
    from puzzle_dag.costs.heldout import judge

    verdicts = judge(Comparison(**c) for c in comparisons)
    if not verdicts:
        return "none"
    median, worst = max(v.median_error for v in verdicts), max(v.worst_error for v in verdicts)
    verdict = min(verdicts, key=lambda v: v.passed)
    return f"{verdict.num_models} models, worst median error {median:.1%}, worst error {worst:.1%}: {_word(verdict)}"


def list_facts(table: "CostTable") -> list[tuple[str, str]]:
    """Return what a table tells of itself, as pairs of words."""
    from puzzle_dag.costs.agreement import describe_processes, find_multiprocess

    row, target, origin = table.rows[0], table.target, table.provenance
    facts = [
        ("target", f"{target.name} ({target.hardware})"),
        ("hardware", row.hardware),
        ("engine", f"{row.engine_version}, {row.mode}, {describe_processes(find_multiprocess(table))}"),
        ("precision", f"{row.dtype}, weights {row.quantization}, KV cache {row.kv_cache_dtype}"),
        ("tensor-parallel size", str(row.tensor_parallel_size)),
        ("workload", f"{target.input_length} + {target.output_length} tokens, batch sizes {', '.join(map(str, table.batch_sizes))}"),
        ("seconds", table.source),
        ("largest residual", f"{max(table.residuals.values(), default=0.0):.1%}"),
    ]
    if table.source != "analytic":
        facts.append(("pace", table.levelling.words))
    if origin is None:
        return facts
    facts += [
        ("shape", ", ".join(f"{k} {v}" for k, v in origin.shape.items() if isinstance(v, int) and not isinstance(v, bool))),
        ("driver", origin.driver or "not kept"),
        ("package", origin.package or "not kept"),
        ("measured", f"{origin.first_measured_at or 'not kept'} to {origin.last_measured_at or 'not kept'}"),
        ("engines", f"{origin.num_engines} for {origin.num_probes} models"),
        ("engine's own memory", "not kept" if origin.engine_bytes is None else format_bytes(origin.engine_bytes)),
        ("KV cache, arithmetic against engine", describe_capacity(origin.capacity)),
        ("held-out models", describe_heldout(origin.comparisons)),
    ]
    if origin.imported_from is not None:
        facts.append(("imported", f"from {origin.imported_from} at {origin.imported_at}"))
    return facts


def describe_capacity(capacity: tuple[dict[str, Any], ...]) -> str:
    """Return whether arithmetic and engine agreed on what KV caches hold, e.g. "agree on 9 of 9 models"."""
    if not capacity:
        return "not kept"
    agreeing = [
        c for c in capacity if (c["kv_bytes_per_token"], c["predicted_tokens"]) == (c["engine_kv_bytes_per_token"], c["reported_tokens"])
    ]
    return f"agree on {len(agreeing)} of {len(capacity)} models"


def _import(args: argparse.Namespace) -> int:
    from puzzle_dag.costs.imports import import_table
    from puzzle_dag.store import ArtifactStore

    table = import_table(args.file, ArtifactStore(args.root / "var" / "store"))
    say(text_table(("what", "found"), list_facts(table)))
    say(f"imported; block_costs of targets like {table.target.name} use it where this machine can't measure them")
    return 0


def _show(args: argparse.Namespace) -> int:
    from puzzle_dag.costs.table import CostTable

    say(text_table(("what", "found"), list_facts(CostTable.read(args.file))))
    return 0


def _capacity(args: argparse.Namespace) -> int:
    """Hold the batch that we say fits against an engine of the parent that sizes its KV cache itself."""
    from puzzle_dag.architecture import Block
    from puzzle_dag.config import read_target
    from puzzle_dag.costs.sizing import check_sizing
    from puzzle_dag.lease import lease_device
    from puzzle_dag.progress import ProgressLog

    _, shape = _read_shape(args.root, args.profile)
    target = read_target(args.root / "conf", args.target)
    parent = (Block.parse(f"kv{shape.num_key_value_heads}/w{shape.intermediate_size}"),) * shape.num_hidden_layers
    with lease_device(args.root):
        found = check_sizing(shape, parent, target, args.memory_share, progress=ProgressLog("capacity"))
    say(f"{format_bytes(found.memory_bytes)} of memory, of which the engine itself takes {format_bytes(found.engine_bytes)}")
    say(f"requests of {target.input_length} + {target.output_length} tokens that fit: {found.predicted_batch} by arithmetic")
    say(f"the engine, sizing its KV cache itself: {found.reported_batch} ({found.reported_tokens} tokens)")
    return 0


def _precisions(args: argparse.Namespace) -> int:
    """Try every precision with the first two layers of the profile's parent, one attention and one FFN of them linear."""
    from puzzle_dag.architecture import Block
    from puzzle_dag.costs.probes import serving_config
    from puzzle_dag.engine.client import read_engine_version
    from puzzle_dag.engine.hardware import detect_hardware
    from puzzle_dag.engine.jobs import EngineSettings
    from puzzle_dag.engine.precision import list_precisions, name_precision, try_precisions
    from puzzle_dag.lease import lease_device
    from puzzle_dag.progress import ProgressLog

    _, shape = _read_shape(args.root, args.profile)
    width, heads = shape.intermediate_size, shape.num_key_value_heads
    blocks = (Block.parse(f"kv{heads}/w{width}"), Block.parse(f"linear/w{width}"), Block.parse(f"kv{heads}/linear"))
    config = json.loads(json.dumps(serving_config(shape, blocks)))
    settings, hardware = list_precisions(EngineSettings(mode=args.mode)), detect_hardware()
    with lease_device(args.root):
        trials = try_precisions(config, settings, hardware=hardware, progress=ProgressLog("precisions"))
    if args.json:
        say(json.dumps([dataclasses.asdict(t) for t in trials], indent=1))
        return 0
    rows = [
        (name_precision(s), "yes" if t.works else "no", format_seconds(t.prefill_s) if t.prefill_s is not None else t.words)
        for s, t in zip(settings, trials, strict=True)
    ]
    say(f"{read_engine_version()} on {hardware.name}")
    say(text_table(("precision", "works", "time of a small prefill, or the engine's words"), rows))
    return 0


def _quantize(args: argparse.Namespace) -> int:
    from puzzle_dag.engine.int8 import write_int8_checkpoint

    write_int8_checkpoint(args.checkpoint, args.out)
    say(f"written: {args.out}; serve it with `vllm serve {args.out}`")
    return 0


def add_cost_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `measure`, `costs`, `precisions`, `capacity` and `quantize` to the parser."""
    parser = commands.add_parser("measure", help="measure what every variant of a profile costs on a target; needs no weights")
    parser.add_argument("--profile", required=True, help="name of a file in conf/profiles")
    parser.add_argument("--target", required=True, help="name of a file in conf/targets")
    parser.add_argument("--remeasure", action="store_true", help="measure again what is stored, and replace it")
    parser.add_argument("--out", type=Path, help="Parquet file for the table, to be imported on another machine")
    parser.set_defaults(run=measure)

    costs = commands.add_parser("costs", help="cost tables as files: import one that another machine measured, or look at one")
    actions = costs.add_subparsers(required=True, metavar="ACTION")
    for name, text, run in (
        ("import", "check a table of another machine and use it", _import),
        ("show", "where a table comes from", _show),
    ):
        action = actions.add_parser(name, help=text)
        action.add_argument("file", type=Path, metavar="FILE", help="Parquet file that `puzzle-dag measure --out` wrote")
        action.set_defaults(run=run)

    precisions = commands.add_parser("precisions", help="which number types the engine does on this machine, by trying each")
    precisions.add_argument("--profile", required=True, help="name of a file in conf/profiles, whose parent's shape is tried")
    precisions.add_argument("--mode", choices=("eager", "compiled"), default="eager", help="how the engine runs (default: %(default)s)")
    precisions.add_argument("--json", action="store_true", help="as JSON")
    precisions.set_defaults(run=_precisions)

    capacity = commands.add_parser("capacity", help="the largest batch that fits, by arithmetic and by an engine that sizes its own cache")
    capacity.add_argument("--profile", required=True, help="name of a file in conf/profiles")
    capacity.add_argument("--target", required=True, help="name of a file in conf/targets")
    capacity.add_argument("--memory-share", type=float, default=0.2, help="of the memory, and free there (default: %(default)s)")
    capacity.set_defaults(run=_capacity)

    quantize = commands.add_parser("quantize", help="write a checkpoint's int8 W8A8 form, which vLLM serves")
    quantize.add_argument("checkpoint", type=Path, help="folder of a parent or a child")
    quantize.add_argument("out", type=Path, help="folder for the result")
    quantize.set_defaults(run=_quantize)
