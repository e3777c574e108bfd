"""Throughput against latency, parent and children: their servers by turns, each under the same loads.

A closed loop of c requests under way at any time is what the cost table knows as a batch of c: prompts that are read
together, then answers that are written together. So where c is one of the target's batch sizes, the table's seconds
stand beside the measured ones. Over HTTP a request also pays for the server's own work, which the table leaves out.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from puzzle_dag.config import LoadCurveSettings, Target
from puzzle_dag.engine.client import read_engine_version
from puzzle_dag.engine.hardware import Hardware, check_hardware, detect_hardware
from puzzle_dag.paired_ratio import estimate_ratio
from puzzle_dag.progress import Progress, silent
from puzzle_dag.serving.load import LoadPoint, put_under_load
from puzzle_dag.serving.server import serve

VERSION = 2

PARENT = "parent"
"""Name of the parent among the served models."""
Place = tuple[str, int, int]
"""Where a point belongs: model, turn, concurrency."""


class LoadCurveError(ValueError):
    """What is to be served can't be: a folder that is no checkpoint, or a name that is taken."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictedLoad:
    """What the cost table says of one model at one concurrency."""

    prefill_s: float
    """Seconds until the last first token of a batch."""
    decode_s: float
    """Seconds of the rest of the generation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadLevel:
    """One model at one concurrency: medians over the turns, with what the cost table predicted (None where it says nothing)."""

    model: str
    """"parent" or the child's name."""
    concurrency: int
    """Requests under way at any time."""
    num_turns: int
    """Servers it was measured on."""
    num_requests: int
    """Requests of a turn."""
    throughput_tokens_per_s: float
    """Input and output tokens a second."""
    predicted_throughput_tokens_per_s: float | None
    """The cost table's."""
    ttft_median_s: float
    """Time to the first token, the median request's."""
    ttft_p99_s: float
    """99th percentile of it."""
    predicted_ttft_s: float | None
    """The cost table's: the prefill of the whole batch."""
    tpot_median_s: float
    """Time of each token after the first, the median request's."""
    tpot_p99_s: float
    """99th percentile of it."""
    predicted_tpot_s: float | None
    """The cost table's."""
    latency_median_s: float
    """Whole answer, the median request's."""
    latency_p99_s: float
    """99th percentile of it."""
    turn_noise: float
    """Relative standard deviation of the throughput between the turns."""
    speedup: float | None
    """Throughput as a multiple of the parent's, geometric mean over the turns; None for the parent."""
    speedup_low: float | None
    """Lower end of its 95 % confidence interval."""
    speedup_high: float | None
    """Upper end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadCurve:
    """Parent and children under load."""

    target: str
    """Name of the target."""
    hardware: str
    """Processor or GPU."""
    engine_version: str
    """Distribution and version of the engine."""
    levels: tuple[LoadLevel, ...]
    """One entry a model and concurrency, the parent's first."""


def _level(
    model: str, concurrency: int, points: Mapping[Place, LoadPoint], turns: int, target: Target, predicted: PredictedLoad | None
) -> LoadLevel:
    own = [points[model, turn, concurrency] for turn in range(turns)]
    rates = [p.throughput_tokens_per_s for p in own]
    ratio: tuple[float | None, float | None, float | None] = (None, None, None)
    if model != PARENT:
        theirs = [points[PARENT, turn, concurrency].throughput_tokens_per_s for turn in range(turns)]
        ratio = estimate_ratio([1 / r for r in theirs], [1 / r for r in rates])
    num_tokens = concurrency * (target.input_length + target.output_length)
    total_s = predicted.prefill_s + predicted.decode_s if predicted else None
    names = ("ttft_median_s", "ttft_p99_s", "tpot_median_s", "tpot_p99_s", "latency_median_s", "latency_p99_s")
    latencies: dict[str, Any] = {name: statistics.median(getattr(p, name) for p in own) for name in names}
    return LoadLevel(
        model=model,
        concurrency=concurrency,
        num_turns=turns,
        num_requests=own[0].num_requests,
        throughput_tokens_per_s=statistics.median(rates),
        predicted_throughput_tokens_per_s=num_tokens / total_s if total_s else None,
        predicted_ttft_s=predicted.prefill_s if predicted else None,
        predicted_tpot_s=predicted.decode_s / max(1, target.output_length - 1) if predicted else None,
        turn_noise=statistics.stdev(rates) / statistics.fmean(rates),
        speedup=ratio[0],
        speedup_low=ratio[1],
        speedup_high=ratio[2],
        **latencies,
    )


def _check(folders: Mapping[str, Path], children: Mapping[str, Path]) -> None:
    if PARENT in children:
        raise LoadCurveError(f"a child is named {PARENT!r}; give it another name")
    for name, folder in folders.items():
        if not (folder / "config.json").is_file() or not list(folder.glob("*.safetensors")):
            raise LoadCurveError(f"{name}: {folder} is no checkpoint (config.json and *.safetensors); assemble it first")


def measure_load_curve(
    parent_folder: Path,
    children: Mapping[str, Path],
    target: Target,
    settings: LoadCurveSettings,
    *,
    known: Mapping[Place, LoadPoint] | None = None,
    on_point: Callable[[Place, LoadPoint], None] = lambda *_: None,
    predicted: Mapping[str, Mapping[int, PredictedLoad]] | None = None,
    progress: Progress = silent,
) -> LoadCurve:
    """Put parent and children under load, by turns, and compare them.

    Args:
        parent_folder: the parent's checkpoint.
        children: name -> checkpoint folder.
        target: how they are served; lengths of prompts and answers.
        settings: concurrencies, turns, and how many requests.
        known: points of an earlier, interrupted call; a server whose points are all known isn't started.
        on_point: called with each new point as soon as it is there, so that the caller can store it.
        predicted: model ("parent" too) -> concurrency -> the cost table's seconds.
        progress: called after each point ("loads").

    Raises:
        LoadCurveError: a folder is no checkpoint, or a child has the parent's name.
        VllmMissingError: vLLM is not installed.
        HardwareMismatchError: the target is for other hardware.
        ServerFailedError: a server didn't start.
        LoadFailedError: the benchmark or a server failed under load; the points before it were handed on.
    """
    folders = {PARENT: parent_folder, **children}
    _check(folders, children)
    version, hardware = read_engine_version(), detect_hardware()
    check_hardware(target, hardware)
    points: dict[Place, LoadPoint] = dict(known or {})
    places = [(model, turn, c) for turn in range(settings.turns) for model in folders for c in settings.concurrencies]

    def take(model: str, turn: int, point: LoadPoint) -> None:
        points[model, turn, point.concurrency] = point
        on_point((model, turn, point.concurrency), point)
        progress(sum(p in points for p in places), len(places), "loads")

    progress(sum(p in points for p in places), len(places), "loads")
    for turn in range(settings.turns):
        for model, folder in folders.items():
            missing = [c for c in settings.concurrencies if (model, turn, c) not in points]
            if missing:
                _measure_server(model, folder, target, settings, missing, turn, hardware, take)
    return _summarise(target, hardware.name, version, folders, points, settings, predicted or {})


def _measure_server(
    model: str,
    folder: Path,
    target: Target,
    settings: LoadCurveSettings,
    concurrencies: Sequence[int],
    turn: int,
    hardware: Hardware,
    take: Callable[[str, int, LoadPoint], None],
) -> None:
    """Start one server and hand on a point for each concurrency."""
    with serve(folder, model, target, max_concurrency=max(settings.concurrencies), hardware=hardware) as server:
        put_under_load(
            server,
            folder,
            target,
            concurrencies,
            rounds=settings.rounds,
            seed=turn,
            hardware=hardware,
            on_point=lambda point: take(model, turn, point),
        )


def _summarise(
    target: Target,
    hardware: str,
    engine_version: str,
    models: Mapping[str, Any],
    points: Mapping[Place, LoadPoint],
    settings: LoadCurveSettings,
    predicted: Mapping[str, Mapping[int, PredictedLoad]],
) -> LoadCurve:
    return LoadCurve(
        target=target.name,
        hardware=hardware,
        engine_version=engine_version,
        levels=tuple(
            _level(model, c, points, settings.turns, target, predicted.get(model, {}).get(c))
            for model in models
            for c in settings.concurrencies
        ),
    )
