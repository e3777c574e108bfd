"""A child that was not trained yet, run on the engine beside its parent: what it takes needs only its shape.

Both have dummy weights, as probes do. Engines of parent and child take turns, so that the machine's slow minutes hit both alike;
where the machine's pace explains what engines of the same model differ by, their seconds are levelled by it.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from puzzle_dag.architecture import Architecture
from puzzle_dag.config import Target
from puzzle_dag.costs.agreement import check_installed
from puzzle_dag.costs.measure import describe_engine, find_engine, plain_config, run_and_keep
from puzzle_dag.engine.client import read_engine_version
from puzzle_dag.engine.hardware import Hardware, check_hardware, detect_hardware
from puzzle_dag.engine.jobs import EngineJob, EngineResult, EngineSettings, Workload
from puzzle_dag.engine.levelling import Levelling, decide_levelling
from puzzle_dag.engine.turns import run_turns
from puzzle_dag.model.configuration_puzzle_dag import PuzzleDagConfig
from puzzle_dag.progress import Progress, silent
from puzzle_dag.store import ArtifactStore, fingerprint

log = logging.getLogger(__name__)

VERSION = 1
TRIAL_KIND = "trial"
"""Kind of one engine's measurement in the artifact store."""

Role = Literal["parent", "child"]
_ROLES: tuple[Role, ...] = get_args(Role)  # in the order of running
TrialPhase = Literal["prefill", "decode", "total"]
_PHASES: tuple[TrialPhase, ...] = get_args(TrialPhase)


@dataclass(frozen=True, slots=True)
class Timed:
    """A model, and what it is timed at."""

    architecture: Architecture
    """Its blocks."""
    batches: Sequence[int]
    """Batch sizes, one at least."""


@dataclass(frozen=True, slots=True)
class Turns:
    """What parent and child took, an engine of each a turn."""

    child: tuple[EngineResult, ...]
    """The child's engines."""
    parent: tuple[EngineResult, ...]
    """The parent's, of the same turns; none where nothing is relative to it."""
    levelling: Levelling
    """Whether their seconds are levelled by the machine's pace."""

    def child_s(self, batch: int, phase: TrialPhase) -> list[float]:
        """Return the child's seconds, one a turn."""
        return [self.levelling.seconds(r.at(batch), phase) for r in self.child]

    def parent_s(self, batch: int, phase: TrialPhase) -> list[float]:
        """Return the parent's seconds, one a turn."""
        return [self.levelling.seconds(r.at(batch), phase) for r in self.parent]

    @property
    def peak_rss_bytes(self) -> int:
        """Largest resident memory of an engine's process."""
        return max(r.peak_rss_bytes for r in (*self.child, *self.parent))


@dataclass(frozen=True, slots=True)
class _Models:
    """The configurations to run and the batch sizes to time each at."""

    configs: dict[Role, dict[str, Any]]
    workloads: dict[Role, Workload]

    def plan(
        self, turns: range, settings: EngineSettings, hardware: Hardware, engine_version: str
    ) -> tuple[dict[tuple[Role, int], EngineJob], dict[str, dict[str, Any]]]:
        """Return the job of each model and turn in the order of running, and what each job's name, its store key, was made from."""
        jobs: dict[tuple[Role, int], EngineJob] = {}
        inputs = {}
        for turn in turns:
            described = {
                role: describe_engine(config, settings, self.workloads[role], turn, hardware, engine_version)
                for role, config in self.configs.items()
            }
            # A parent's engine counts beside the child that it took turns with, and beside no other.
            turn_of = fingerprint(described)
            for role, config in self.configs.items():
                found = {**described[role], "trial": VERSION, "role": role, "turn_of": turn_of}
                job = EngineJob(name=fingerprint(found), config=config, settings=settings, workload=self.workloads[role], seed=turn)
                jobs[role, turn], inputs[job.name] = job, found
        return jobs, inputs


def measure_in_turns(
    shape: PuzzleDagConfig,
    models: Mapping[Role, Timed],
    target: Target,
    store: ArtifactStore,
    *,
    turns: int,
    repeats: int,
    turns_wanted: Callable[[Turns], int] = lambda _: 0,
    remeasure: bool = False,
    progress: Progress = silent,
) -> Turns:
    """Time a child and its parent with dummy weights as a target serves, by turns; what the store holds is not run again.

    Every engine's result is stored the moment it is there, so a trial that was interrupted goes on.

    Args:
        shape: the parent's configuration.
        models: the child, and the parent where anything is relative to it.
        target: how they are served.
        store: where measurements are kept, one an engine.
        turns: engines of each.
        repeats: timed repeats an engine.
        turns_wanted: asked after they ran how many it should be in all, and again until that is no more than there are.
        remeasure: run everything again, and replace what is stored; further turns of before that aren't wanted now stay there.
        progress: called after each engine; counts anew where further turns are wanted.

    Raises:
        VllmMissingError: vLLM is not installed.
        EngineVersionError: it is another version than the target names.
        HardwareMismatchError: the target is for other hardware.
        EngineRefusedError: the engine can't run models of this shape.
        UnsupportedPrecisionError: the engine doesn't do the target's precision on this hardware; in its own words.
        EngineFailedError: engines of the first turns failed twice; all others were run and kept first.
    """
    hardware, engine_version = detect_hardware(), read_engine_version()
    check_hardware(target, hardware)
    check_installed(target, engine_version)
    timed = _Models(
        {role: plain_config(shape, models[role].architecture) for role in _ROLES if role in models},
        {role: _workload(target, model.batches, repeats) for role, model in models.items()},
    )
    settings, measured = EngineSettings.of(target), {role: list[EngineResult]() for role in timed.configs}

    def run(span: range) -> Turns:
        jobs, inputs = timed.plan(span, settings, hardware, engine_version)
        results = {} if remeasure else {key: found for key in inputs if (found := find_engine(TRIAL_KIND, key, store)) is not None}
        missing = [job for job in jobs.values() if job.name not in results]
        log.info("target %s: %d engines of a trial measured before, %d to run", target.name, len(results), len(missing))
        results |= run_and_keep(TRIAL_KIND, missing, inputs, target, hardware, store, progress=progress)
        for (role, _), job in jobs.items():
            measured[role].append(results[job.name])
        return Turns(tuple(measured["child"]), tuple(measured.get("parent", ())), decide_levelling(measured.values(), _PHASES))

    return run_turns(turns, run, turns_wanted)


def _workload(target: Target, batches: Sequence[int], repeats: int) -> Workload:
    wanted = tuple(sorted(set(batches)))
    return Workload(input_length=target.input_length, output_length=target.output_length, batch_sizes=wanted, repeats=repeats)
