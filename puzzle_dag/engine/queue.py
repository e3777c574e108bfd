"""Which engine is tried next: what failed waits behind all others for a second try, and no sound model is lost to those that hang.

An engine that hangs costs a whole limit of silence. So where several hung and none has given a result, one engine of each model
that was not tried yet is started, the smallest first. The first result shows that engines do run here, and all goes on as
usual. Without one, only the smallest model is tried a second time, and the rest is given up: that takes as many
limits as there are models, where two tries of every engine would take as many as twice the engines.
"""

import logging
import shutil
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from puzzle_dag.engine.failures import EngineFailure
from puzzle_dag.engine.jobs import EngineJob
from puzzle_dag.engine.watchdog import Attempt, log_path, read_tail
from puzzle_dag.store import fingerprint

log = logging.getLogger(__name__)

_MOST_LOST_WORKERS = 3
"""Workers that may hang, or never start, before it is asked whether any engine runs here."""


def _identify_model(job: EngineJob) -> str:
    """Return what engines of one model, served alike, have in common."""
    return fingerprint([job.config, job.folder, asdict(job.settings)])


def _count_layers(job: EngineJob) -> int:
    """Return a model's layers, 0 for a checkpoint, of which no size is known here."""
    return int((job.config or {}).get("num_hidden_layers", 0))


class EngineQueue:
    """Jobs that wait for an engine. What failed once waits behind all others; what failed twice is given up."""

    def __init__(self, jobs: Sequence[EngineJob], scratch: Path, log_folder: Path, *, retry: bool) -> None:
        """Queue `jobs`. Their logs are written into `scratch`; those of failures are kept in `log_folder`."""
        self.retry = retry
        self.waiting = deque(jobs)
        self.failures: list[EngineFailure] = []
        self.never_tried: tuple[str, ...] = ()
        self._failed_once: dict[str, tuple[EngineJob, str]] = {}
        self._lost_models: set[str] = set()
        self._num_hung = self._num_unstarted = 0
        self._set_aside: list[EngineJob] | None = None
        self._tried_again = False
        self._scratch, self._log_folder = scratch, log_folder

    def settle(self, attempt: Attempt, *, any_result: bool) -> None:
        """Put back the jobs that an attempt left without a result, those that it failed last."""
        failed = [j for j in attempt.jobs.values() if j.name in attempt.failures]
        self.waiting.extendleft(reversed([j for j in attempt.jobs.values() if j.name not in attempt.failures]))
        for job in failed:
            self._note(job, attempt)
        self._num_unstarted += bool(failed) and not attempt.was_ready
        self._num_hung += attempt.was_ready and attempt.was_silent
        if any_result:
            self._resume()
        elif self._num_unstarted >= _MOST_LOST_WORKERS:
            self._give_up()  # whichever job comes first, the worker ends before it starts an engine
        elif self._num_hung >= _MOST_LOST_WORKERS:
            self._seek_sound_model(attempt.silence_limit_s)

    def _note(self, job: EngineJob, attempt: Attempt) -> None:
        """Remember a failure: the job waits for its second try, or has had it."""
        reason, own = attempt.failures[job.name].strip(), log_path(self._scratch, job.name)
        if attempt.worker_log.is_file() and not (attempt.forked and own.is_file() and own.stat().st_size):
            shutil.copy(attempt.worker_log, own)  # the next attempt writes the worker's log anew
        if attempt.was_ready:
            self._lost_models.add(_identify_model(job))
        if job.name in self._failed_once or not self.retry:
            self._failed_once.pop(job.name, None)
            self.failures.append(self._report(job, reason, num_tries=2 if self.retry else 1))
        else:
            self._failed_once[job.name] = job, reason
            self.waiting.append(job)
            log.warning("engine %r failed (%s); it is tried once more after the others", job.name, reason)

    def _seek_sound_model(self, silence_limit_s: float) -> None:
        """Leave one waiting job of each model that was not tried; when there is none left, the smallest model's second try."""
        if self._set_aside is None:
            chosen: dict[str, EngineJob] = {}
            for job in self.waiting:
                if _identify_model(job) not in self._lost_models:
                    chosen.setdefault(_identify_model(job), job)
            told = "%d engines hung and none gave a result; one of each other model (%d) is tried before the rest is given up, %.0f s each"
            log.warning(told, self._num_hung, len(chosen), silence_limit_s)
            self._set_aside = []
            self._keep_waiting(sorted(chosen.values(), key=_count_layers))
        else:
            self._keep_waiting(j for j in self.waiting if j.name not in self._failed_once)
        if self.waiting:
            return
        if self._tried_again or not self._failed_once:
            self._give_up()
            return
        self._tried_again = True
        again, _ = min(self._failed_once.values(), key=lambda failed: _count_layers(failed[0]))
        self._set_aside.remove(again)
        self.waiting.append(again)

    def _keep_waiting(self, jobs: Iterable[EngineJob]) -> None:
        """Let some of the waiting jobs wait on, in the order given, and set the others aside."""
        assert self._set_aside is not None
        kept = list(jobs)
        names = {j.name for j in kept}
        self._set_aside += [j for j in self.waiting if j.name not in names]
        self.waiting = deque(kept)

    def _resume(self) -> None:
        """Engines do run here: let what was set aside wait again, what failed once behind all others."""
        if self._set_aside:
            everything = [*self.waiting, *self._set_aside]
            self.waiting = deque(sorted(everything, key=lambda j: j.name in self._failed_once))
        self._set_aside = None

    def _give_up(self) -> None:
        """Report what failed once and say what was never tried."""
        self.failures += [self._report(job, reason, num_tries=1) for job, reason in self._failed_once.values()]
        left = [*self.waiting, *(self._set_aside or ())]
        self.never_tried = tuple(j.name for j in left if j.name not in self._failed_once)
        self.waiting.clear()

    def _report(self, job: EngineJob, reason: str, *, num_tries: int) -> EngineFailure:
        """Keep the log of a job's last try, and return the failure."""
        own = log_path(self._scratch, job.name)
        if not own.is_file():
            return EngineFailure(job.name, reason, None, "", num_tries)
        self._log_folder.mkdir(parents=True, exist_ok=True)
        kept = self._log_folder / own.name
        shutil.copy(own, kept)
        return EngineFailure(job.name, reason, kept, read_tail(kept), num_tries)
