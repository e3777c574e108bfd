"""What is told of engines that failed: which, why, with which log, and what was never tried."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_MEMORY_WORDS = ("OutOfMemoryError", "MemoryError", "out of memory", "No available memory for the cache blocks", "ran out of memory")


@dataclass(frozen=True, slots=True)
class EngineFailure:
    """An engine that failed in each of its tries."""

    name: str
    """The job's name."""
    reason: str
    """What became of it the last time."""
    log: Path | None
    """Its log of the last time, kept; None where there is none."""
    tail: str
    """The log's last lines."""
    num_tries: int
    """How often it was tried."""

    def describe(self) -> str:
        """Return the failure as text: reason, what to do where memory ran out, and the log's last lines."""
        told = f"{self.reason}\n{self.tail}"
        fix = ""
        if any(word in told for word in _MEMORY_WORDS):
            fix = "\nIt ran out of memory: lower the target's `batch_sizes` or lengths, or free memory on this machine."
        where = f" ({self.log})" if self.log is not None else ""
        times = "twice" if self.num_tries == 2 else "once"
        return f"engine {self.name!r} failed {times}: {self.reason}{fix}\n--- end of its log{where} ---\n{self.tail}"


class EngineFailedError(RuntimeError):
    """Engines failed or hung in each of their tries; all others were run first. The message has the ends of their logs."""

    def __init__(self, failures: Sequence[EngineFailure], *, num_jobs: int, num_done: int, never_tried: Sequence[str] = ()) -> None:
        """Say which failed and why, how many of all gave results, and which were never tried."""
        self.failures, self.never_tried = tuple(failures), tuple(never_tried)
        told = f"of {num_jobs} engines {num_done} gave results"
        if self.never_tried:
            told += f"; {len(self.never_tried)} were never tried: {', '.join(self.never_tried)}"
        super().__init__("\n".join([*(f.describe() for f in self.failures), told]))
