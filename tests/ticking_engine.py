"""An engine whose times are arithmetic, for tests of what is measured and what is not; the real one has its own tests."""

import fcntl
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from puzzle_dag.engine.jobs import BatchTimes, EngineJob, EngineResult


def _layer_seconds(config: dict[str, Any]) -> float:
    """A microsecond a channel, ten a KV head; linear places cost five."""
    # From ten layers on transformers writes the keys with leading zeros.
    layers = {int(k): v for k, v in (config.get("per_layer_config") or {}).items()}
    total = 0.0
    for index in range(config["num_hidden_layers"]):
        layer = layers.get(index, {})
        skip, linear = layer.get("skip") or [], layer.get("replace_with_linear") or []
        heads = layer.get("num_key_value_heads", config["num_key_value_heads"])
        width = layer.get("intermediate_size", config["intermediate_size"])
        total += 0 if "attention" in skip else 5e-6 if "attention" in linear else heads * 1e-5
        total += 0 if "mlp" in skip else 5e-6 if "mlp" in linear else width * 1e-6
    return total


def is_leased(root: Path) -> bool:
    """Say whether somebody holds the device of a project."""
    lock = root / "var" / "device.lock"
    if not lock.exists():
        return False
    with lock.open() as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


@dataclass
class TickingEngine:
    """Takes the place of `run_engines` where it is called; `jobs` lists what was run, all under the lease of `leased_root`'s device."""

    jobs: list[EngineJob] = field(default_factory=list)
    leased_root: Path | None = None
    slowdown: float = 1.0
    """How many times as long models take of which a layer differs from the parent's."""
    unsteadiness: float = 0.0
    """Share by which engines of such models are slower and faster by turns."""
    dies_after: int | None = None
    """Engines that run until one fails, as if the machine had been switched off; None where none fails."""
    dies_of: Exception = field(default_factory=lambda: RuntimeError("switched off"))
    """What is raised then."""

    @property
    def probes(self) -> list[str]:
        return [j.name for j in self.jobs if j.config is not None]

    def slowness(self, job: EngineJob, config: dict[str, Any]) -> float:
        """Return how many times as long a job takes as its model's layers say."""
        return self.slowdown * (1 + (-1) ** job.seed * self.unsteadiness) if config.get("per_layer_config") else 1.0

    def run(
        self,
        jobs: Sequence[EngineJob],
        *,
        on_result: Callable[[EngineJob, EngineResult], None] | None = None,
        progress: Callable[[int, int, str], None] = lambda *_: None,
        **_: Any,
    ) -> list[EngineResult]:
        assert not jobs or self.leased_root is None or is_leased(self.leased_root), "nothing else of ours may run meanwhile"
        results = []
        for job in jobs:
            config = job.config or json.loads((Path(job.folder or "") / "config.json").read_text())
            if self.dies_after is not None and len(self.jobs) >= self.dies_after:
                raise self.dies_of
            seconds, self.jobs = _layer_seconds(config), [*self.jobs, job]
            slow = self.slowness(job, config)
            times = tuple(
                BatchTimes(b, (slow * (0.001 + seconds),) * 2, (slow * (0.002 + (2 + 0.1 * b + 0.001 * job.seed) * seconds),) * 2)
                for b in job.workload.batch_sizes
            )
            result = EngineResult(
                name=job.name,
                times=times,
                weight_bytes=None if job.folder is None else 1000,
                kv_bytes_per_token=100,
                kv_capacity_tokens=1000,
                peak_rss_bytes=3 * 2**28,
                start_s=0.0,
                engine_version="ticking 1.0",
                hardware="test",
                num_threads=1,
            )
            results.append(result)
            if on_result is not None:
                on_result(job, result)
            progress(len(results), len(jobs), "engines")
        return results

    def install(self, patch: pytest.MonkeyPatch) -> None:
        patch.setattr("puzzle_dag.costs.measure.run_engines", self.run)
        patch.setattr("puzzle_dag.children.serve.run_engines", self.run)
