"""How well do fitted costs predict models that were not measured, beside the rival's way to cost a variant?

    python -m benchmarks.cost_model --store var/cost-model --output var/cost-model.json

Measures the target's probes, the rival's models (benchmarks/repeated_layer.py) in as many engine starts or more, and
random held-out models, all in the same rounds, so that a slow minute of the machine hits all alike. Prints for each
batch size and phase the median and worst error of both methods beside the repeat noise of the held-out models, the
limits that a table is held to, how many engines each method started, and the difference of the two errors within
the models with its 95 % interval. Every engine is kept in the store: a run that was stopped goes on where it was, and a second run
measures nothing. Ends with status 1 where ours misses its limits, or where that interval says that it is the worse one.
"""

import argparse
import json
import logging
import random
import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from scipy.stats import t  # type: ignore[import-untyped]

from benchmarks.repeated_layer import RepeatedLayers, as_llama
from puzzle_dag.architecture import Block, variant_union
from puzzle_dag.config import Profile, Target, read_profile, read_target
from puzzle_dag.costs.comparison import Comparison, compare
from puzzle_dag.costs.heldout import JUDGED, Verdict, draw_models, judge, judged_batches
from puzzle_dag.costs.measure import measure_models, measure_target, plan_target
from puzzle_dag.costs.table import CostTable
from puzzle_dag.lease import lease_device
from puzzle_dag.model.configuration_puzzle_dag import PuzzleDagConfig
from puzzle_dag.model.parent import read_parent_shape
from puzzle_dag.preflight import resolve_spaces
from puzzle_dag.progress import ProgressLog
from puzzle_dag.store import ArtifactStore, write_atomically

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SideBySide:
    """Both methods' tables and their predictions of the same held-out models."""

    ours: CostTable
    """Designed probes, robust regression."""
    rivals: CostTable
    """One against one and ten repeats."""
    our_starts: int
    """Engines that our table rests on."""
    rival_starts: int
    """Engines that the rival's rests on."""
    our_rows: list[Comparison]
    """Held-out models, predicted by ours."""
    rival_rows: list[Comparison]
    """The same, predicted by the rival's."""


def _with_engines(target: Target, engines: int) -> Target:
    return target.model_copy(update={"engines_per_probe": engines})


def measure_side_by_side(
    profile: Profile, shape: PuzzleDagConfig, target: Target, store: ArtifactStore, *, num_models: int, heldout_engines: int, seed: int
) -> SideBySide:
    """Measure probes, the rival's models and held-out models, and fit both tables."""
    parent = Block.parse(f"kv{shape.num_key_value_heads}/w{shape.intermediate_size}")
    spaces, llama = resolve_spaces(profile, shape), as_llama(shape)
    attentions, ffns = variant_union(spaces)
    probes = [p.architecture for p in plan_target(shape, parent, target, attentions, ffns)]
    rival = RepeatedLayers.plan(parent, attentions, ffns)
    our_starts = len(probes) * target.engines_per_probe
    rounds, base_engines = rival.plan_engines(our_starts)
    rival_starts = rounds * len(rival.models) + base_engines - rounds
    heldout = draw_models([s.blocks for s in spaces], num_models, known=[*probes, *rival.models], seed=seed)
    log.info("engines: ours %d, the rival's %d, held out %d", our_starts, rival_starts, len(heldout) * heldout_engines)

    counts = {"probes": target.engines_per_probe, "held out": heldout_engines, "rival": rounds}
    for number in range(1, max(counts.values()) + 1):
        due = {name for name, count in counts.items() if number <= count}
        groups = [(shape, [*probes * ("probes" in due), *heldout * ("held out" in due)]), (llama, rival.models * ("rival" in due))]
        if llama.to_dict() == shape.to_dict():  # one worker, and the two methods' engines mixed
            groups = [(shape, list(dict.fromkeys([*groups[0][1], *groups[1][1]])))]  # the single layer is a model of both
        for config, models in groups:
            random.Random(number).shuffle(models)
            say = ProgressLog(f"round {number} of {max(counts.values())}")
            measure_models(config, models, _with_engines(target, number), store, progress=say)
    of_heldout = measure_models(shape, heldout, _with_engines(target, heldout_engines), store)
    of_rival = measure_models(llama, rival.models[1:], _with_engines(target, rounds), store)
    of_rival += measure_models(llama, [rival.base], _with_engines(target, base_engines), store, progress=ProgressLog("the rival's base"))
    ours = measure_target(shape, parent, target, attentions, ffns, store)
    rivals = rival.tabulate(shape, target, parent, of_rival, ours.levelling)
    assert ours.num_engines == our_starts and rivals.num_engines == rival_starts >= our_starts
    return SideBySide(
        ours, rivals, our_starts, rival_starts, compare(ours, of_heldout, "held out"), compare(rivals, of_heldout, "held out")
    )


@dataclass(frozen=True, slots=True)
class Difference:
    """Our error less the rival's, as a share of the time: of each held-out model, over the judged batch sizes and phases."""

    mean: float
    """Mean over the models; negative where ours is the smaller error."""
    low: float
    """Lower end of its 95 % confidence interval (Student's t over the models)."""
    high: float
    """Upper end."""

    @property
    def is_worse(self) -> bool:
        """Whether the whole interval says that the rival predicts better."""
        return self.low > 0


def pair_errors(ours: list[Comparison], rivals: list[Comparison]) -> Difference:
    """Compare both methods' errors model by model: what a model's own measurement is off by is in both and falls out.

    Raises:
        ValueError: fewer than two models.
    """
    judged = judged_batches({r.batch for r in ours})
    differences: dict[str, list[float]] = {}
    for mine, other in zip(ours, rivals, strict=True):
        assert (mine.model, mine.batch, mine.phase) == (other.model, other.batch, other.phase)
        if mine.phase in JUDGED and mine.batch in judged:
            differences.setdefault(mine.model, []).append(abs(mine.error) - abs(other.error))
    means = [statistics.fmean(of_model) for of_model in differences.values()]
    if len(means) < 2:
        raise ValueError(f"{len(means)} held-out models; a comparison needs 2 or more")
    mean, half = statistics.fmean(means), float(t.ppf(0.975, len(means) - 1)) * statistics.stdev(means) / len(means) ** 0.5
    return Difference(mean, mean - half, mean + half)


def _ratio(ours: list[Comparison], rivals: list[Comparison]) -> float:
    """Return our median error over the rival's, over all judged batch sizes and phases."""
    judged = judged_batches({r.batch for r in ours})
    errors = [statistics.median(abs(r.error) for r in rows if r.phase in JUDGED and r.batch in judged) for rows in (ours, rivals)]
    return errors[0] / errors[1]


def _cells(rows: list[Comparison], batch: int, phase: str, field: str) -> str:
    values = [100 * abs(getattr(r, field) or 0.0) for r in rows if (r.batch, r.phase) == (batch, phase)]
    return f"{statistics.median(values):.1f} / {max(values):.1f}"


def print_report(found: SideBySide) -> tuple[list[Verdict], Difference]:
    """Print both errors beside the noise, the verdicts on ours, and the difference to the rival's; return both."""
    table, first = found.ours, found.ours.rows[0]
    print(f"target {table.target.name}, {first.mode}, {first.dtype}, {first.hardware}, {first.num_threads} threads, {first.engine_version}")
    models = len({r.model for r in found.our_rows})
    print(f"{models} held-out models, {found.our_rows[0].num_engines} engines each; percent, median / worst over the models")
    print("| batch | phase | ours | rival | repeat noise |\n|---|---|---|---|---|")
    for batch in table.batch_sizes:
        for phase in JUDGED:
            ours, rival = (_cells(rows, batch, phase, "error") for rows in (found.our_rows, found.rival_rows))
            print(f"| {batch} | {phase} | {ours} | {rival} | {_cells(found.our_rows, batch, phase, 'noise')} |")
    ratio = _ratio(found.our_rows, found.rival_rows)
    print(f"engine starts: ours {found.our_starts}, the rival's {found.rival_starts}; median error, ours / the rival's: {ratio:.2f}")
    verdicts = judge(found.our_rows)
    for v in verdicts:
        said = "within" if v.passed else "BEYOND"
        limits = f"{100 * v.median_limit:.1f} / {100 * v.worst_limit:.1f}"
        print(f"batch {v.batch}, {v.phase}: {100 * v.median_error:.1f} / {100 * v.worst_error:.1f} %, {said} the limits {limits} %")
    paired = pair_errors(found.our_rows, found.rival_rows)
    said = "WORSE than the rival's" if paired.is_worse else "no worse than the rival's"
    shown = f"{100 * paired.mean:+.2f} points ({100 * paired.low:+.2f} to {100 * paired.high:+.2f})"
    print(f"our error less the rival's, model by model: {shown}: {said}")
    return verdicts, paired


def main(arguments: list[str] | None = None) -> int:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path(), help="the project's root")
    parser.add_argument("--profile", default="tiny")
    parser.add_argument("--target", default="cpu-prefill")
    parser.add_argument("--num-models", type=int, default=8, help="held-out models (default: %(default)s)")
    parser.add_argument("--heldout-engines", type=int, default=3, help="engines each of them is measured in (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the held-out models")
    parser.add_argument("--probes-per-variant", type=int, default=None, help="by default the target's")
    parser.add_argument("--engines-per-probe", type=int, default=None, help="by default the target's")
    parser.add_argument("--store", type=Path, required=True, help="artifact store that keeps the measurements")
    parser.add_argument("--output", type=Path, default=None, help="JSON file for the numbers")
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    profile, target = read_profile(args.root / "conf", args.profile), read_target(args.root / "conf", args.target)
    wanted = {"probes_per_variant": args.probes_per_variant, "engines_per_probe": args.engines_per_probe}
    target = target.model_copy(update={k: v for k, v in wanted.items() if v is not None})
    shape, store = read_parent_shape(profile.parent, args.root), ArtifactStore(args.store)
    models = {"num_models": args.num_models, "heldout_engines": args.heldout_engines, "seed": args.seed}
    with lease_device(args.root):
        found = measure_side_by_side(profile, shape, target, store, **models)
    verdicts, paired = print_report(found)
    if args.output is not None:
        content = {
            "our_starts": found.our_starts,
            "rival_starts": found.rival_starts,
            "ratio": _ratio(found.our_rows, found.rival_rows),
            "difference": asdict(paired),
            "ours": [asdict(r) for r in found.our_rows],
            "rival": [asdict(r) for r in found.rival_rows],
            "verdicts": [asdict(v) | {"passed": v.passed} for v in verdicts],
        }
        write_atomically(args.output, json.dumps(content, indent=1) + "\n")
    return 0 if all(v.passed for v in verdicts) and not paired.is_worse else 1


if __name__ == "__main__":
    sys.exit(main())
