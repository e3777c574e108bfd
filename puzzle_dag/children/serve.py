"""Serve parent and children with real weights, and compare: the speed-up as measured, beside what was predicted.

Engines of parent and children take turns in one worker, so that the machine's slow minutes hit all alike; the ratio
is taken within each turn, and its confidence interval over the turns. Where the machine's pace (`engine.pace`) explains what engines
of the same model differ by, the ratio is one of levelled times. All seconds and throughputs are as measured.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from puzzle_dag.config import Target
from puzzle_dag.engine.client import run_engines
from puzzle_dag.engine.hardware import check_hardware, detect_hardware
from puzzle_dag.engine.jobs import EngineJob, EngineResult, EngineSettings, Workload
from puzzle_dag.engine.levelling import Levelling, decide_levelling
from puzzle_dag.engine.turns import run_turns
from puzzle_dag.paired_ratio import estimate_ratio, turns_for
from puzzle_dag.progress import Progress, silent

VERSION = 4

PARENT = "parent"
"""Name of the parent among the served models."""
FEWEST_ENGINES = 3
"""Engines of each model, at the least: the interval over two is 12.7 standard errors to each side, over three 4.3."""
PRECISION = 0.05
"""Share that the 95 % interval of a speed-up reaches to each side where it is told well enough: what the check `as_asked` tolerates."""


class ServingError(ValueError):
    """What is to be served can't be: no checkpoint, a batch size that the target lacks, too few engines."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """One model at one batch size: medians over its engines."""

    model: str
    """"parent" or the child's name."""
    batch: int
    """Concurrent requests."""
    num_engines: int
    """Engines it was measured in."""
    prefill_s: float
    """Seconds to the last first token of the batch (`ttft_s` of the slowest request)."""
    decode_s: float
    """Seconds of the rest of the generation."""
    total_s: float
    """Seconds of the whole batch."""
    throughput_tokens_per_s: float
    """batch * (input + output tokens) / total_s."""
    engine_noise: float
    """Relative standard deviation of `total_s`, as measured, between the engines."""
    predicted_s: float | None
    """What the cost table predicted for `total_s`; None where no prediction was given."""
    weight_bytes: int
    """Bytes of the checkpoint's tensors."""
    kv_bytes_per_token: int
    """Bytes of KV cache a token, from the engine's own cache layout."""
    kv_capacity_tokens: int
    """Tokens that the engine's KV cache had room for."""
    peak_rss_bytes: int
    """Largest resident memory of an engine's process, vLLM's own code (some 600 MB) included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedUp:
    """How many times as fast as the parent a child serves a batch, with a confidence interval."""

    child: str
    """The child's name."""
    batch: int
    """Concurrent requests."""
    speedup: float
    """Geometric mean over the turns of parent's seconds / child's seconds."""
    low: float
    """Lower end of the 95 % confidence interval (Student's t on the logarithms)."""
    high: float
    """Upper end."""
    predicted: float | None
    """The cost table's; None where no prediction was given."""
    levelled: bool = False
    """Whether the seconds of the ratio were levelled by the machine's pace; as measured before this version of the package."""

    @property
    def reach(self) -> float:
        """How far the interval reaches to each side, as the logarithm of a factor."""
        return math.log(self.high / self.low) / 2


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingReport:
    """Parent and children as served."""

    target: str
    """Name of the target."""
    hardware: str
    """Processor or GPU."""
    engine_version: str
    """Distribution and version of the engine."""
    models: tuple[ServedModel, ...]
    """One entry a model and batch size, the parent's first."""
    speedups: tuple[SpeedUp, ...]
    """One entry a child and batch size."""

    def of(self, model: str, batch: int) -> ServedModel:
        """Return one entry. Raises KeyError where it was not served."""
        for served in self.models:
            if (served.model, served.batch) == (model, batch):
                return served
        raise KeyError(f"{model} was not served at batch {batch}")

    def speedup_of(self, child: str, batch: int) -> SpeedUp:
        """Return a child's speed-up. Raises KeyError where it was not served."""
        for speedup in self.speedups:
            if (speedup.child, speedup.batch) == (child, batch):
                return speedup
        raise KeyError(f"{child} was not served at batch {batch}")


def _summarise(model: str, batch: int, results: Sequence[EngineResult], target: Target, predicted_s: float | None) -> ServedModel:
    times = [r.at(batch) for r in results]
    totals = [t.median_s("total") for t in times]
    total_s = statistics.median(totals)
    weights = results[0].weight_bytes
    assert weights is not None
    return ServedModel(
        model=model,
        batch=batch,
        num_engines=len(results),
        prefill_s=statistics.median(t.median_s("prefill") for t in times),
        decode_s=statistics.median(t.median_s("decode") for t in times),
        total_s=total_s,
        throughput_tokens_per_s=batch * (target.input_length + target.output_length) / total_s,
        engine_noise=statistics.stdev(totals) / statistics.fmean(totals),
        predicted_s=predicted_s,
        weight_bytes=weights,
        kv_bytes_per_token=results[0].kv_bytes_per_token,
        kv_capacity_tokens=results[0].kv_capacity_tokens,
        peak_rss_bytes=max(r.peak_rss_bytes for r in results),
    )


def _compare(
    child: str, batch: int, results: Mapping[str, Sequence[EngineResult]], predicted: float | None, levelling: Levelling
) -> SpeedUp:
    totals = {name: [levelling.seconds(r.at(batch), "total") for r in results[name]] for name in (PARENT, child)}
    speedup, low, high = estimate_ratio(totals[PARENT], totals[child])
    return SpeedUp(child=child, batch=batch, speedup=speedup, low=low, high=high, predicted=predicted, levelled=levelling.is_used)


def _predict_speedup(predicted_s: Mapping[str, Mapping[int, float]], child: str, batch: int) -> float | None:
    parent, own = (predicted_s.get(name, {}).get(batch) for name in (PARENT, child))
    return parent / own if parent is not None and own else None


def _check(parent_folder: Path, children: Mapping[str, Path], target: Target, engines: int, batch_sizes: Sequence[int]) -> None:
    if engines < FEWEST_ENGINES:
        raise ServingError(f"engines is {engines}; a confidence interval that tells something needs {FEWEST_ENGINES} or more")
    if PARENT in children:
        raise ServingError(f"a child is named {PARENT!r}; give it another name")
    unknown = sorted(set(batch_sizes) - set(target.batch_sizes))
    if unknown or not batch_sizes:
        raise ServingError(f"target {target.name!r}: batch sizes {unknown} are none of its own, {list(target.batch_sizes)}")
    for name, folder in {PARENT: parent_folder, **children}.items():
        if not (folder / "config.json").is_file() or not list(folder.glob("*.safetensors")):
            raise ServingError(f"{name}: {folder} is no checkpoint (config.json and *.safetensors); assemble it first")


def measure_serving(
    parent_folder: Path,
    children: Mapping[str, Path],
    target: Target,
    *,
    engines: int = FEWEST_ENGINES,
    further_engines: int = 0,
    batch_sizes: Sequence[int] | None = None,
    predicted_s: Mapping[str, Mapping[int, float]] | None = None,
    progress: Progress = silent,
) -> ServingReport:
    """Serve the parent and children as a target does, in turns, and compare them.

    Args:
        parent_folder: the parent's checkpoint.
        children: name -> checkpoint folder; empty measures the parent alone.
        target: how they are served and what is timed.
        engines: turns, an engine of each model in each.
        further_engines: turns more at most, until the interval of every speed-up reaches `PRECISION` to each side, or less.
        batch_sizes: some of the target's; by default all of them.
        predicted_s: model name ("parent" too) -> batch -> predicted seconds of the whole batch, to stand beside the measured.
        progress: called after each engine.

    Raises:
        ServingError: a folder is no checkpoint, a batch size is none of the target's, or there are fewer than 3 engines.
        VllmMissingError: vLLM is not installed.
        HardwareMismatchError: the target is for other hardware.
        EngineFailedError: an engine of the first turns failed twice.
    """
    batches = tuple(sorted(set(target.batch_sizes if batch_sizes is None else batch_sizes)))
    _check(parent_folder, children, target, engines, batches)
    hardware = detect_hardware()
    check_hardware(target, hardware)
    folders = {PARENT: parent_folder, **children}
    settings, workload = EngineSettings.of(target), Workload.of(target.model_copy(update={"batch_sizes": batches}))
    predicted, results = predicted_s or {}, {name: list[EngineResult]() for name in folders}

    def serve(turns: range) -> list[SpeedUp]:
        jobs = {
            (name, turn): EngineJob(name=f"{name}/{turn}", folder=str(folder.resolve()), settings=settings, workload=workload, seed=turn)
            for turn in turns
            for name, folder in folders.items()
        }
        by_job = {r.name: r for r in run_engines(list(jobs.values()), progress=progress, hardware=hardware)}
        for (name, _), job in jobs.items():
            results[name].append(by_job[job.name])
        levelling = decide_levelling(results.values(), ("total",))
        return [_compare(c, b, results, _predict_speedup(predicted, c, b), levelling) for c in children for b in batches]

    def engines_wanted(speedups: Sequence[SpeedUp]) -> int:
        reach = max((s.reach for s in speedups), default=0.0)
        return turns_for(len(results[PARENT]), reach, math.log1p(PRECISION), engines + further_engines)

    speedups = run_turns(engines, serve, engines_wanted)
    return ServingReport(
        target=target.name,
        hardware=hardware.name,
        engine_version=results[PARENT][0].engine_version,
        models=tuple(_summarise(n, b, results[n], target, predicted.get(n, {}).get(b)) for n in folders for b in batches),
        speedups=tuple(speedups),
    )
