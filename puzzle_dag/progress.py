"""How far a long step has come: a callback that every long step takes, and one that logs rate and time left."""

import logging
import time
from collections.abc import Callable

Progress = Callable[[int, int, str], None]
"""Called with what is done, the total and its unit ("tokens", "pairs"); cheap enough to call at every batch."""


def silent(done: int, total: int, unit: str) -> None:
    """Report nothing."""


class ProgressLog:
    """Logs "what: done/total unit, rate, time left" every few seconds, and once at the end."""

    def __init__(self, what: str, *, every_s: float = 5.0, logger: logging.Logger | None = None) -> None:
        """Log under the name `what`, at most once in `every_s` seconds, to `logger` (by default this module's)."""
        self.what = what
        self.every_s = every_s
        self.logger = logger or logging.getLogger(__name__)
        self._first: tuple[float, int] | None = None
        self._last_s = 0.0
        self._last_done = 0

    def __call__(self, done: int, total: int, unit: str) -> None:
        """Take note that `done` of `total` are done; a smaller `done` than before starts a new run."""
        now_s = time.perf_counter()
        if self._first is None or done < self._last_done:
            self._first, self._last_s = (now_s, done), now_s
        self._last_done = done
        if done < total and now_s - self._last_s < self.every_s:
            return
        self._last_s = now_s
        elapsed_s, num_new = now_s - self._first[0], done - self._first[1]
        if num_new <= 0 or elapsed_s <= 0:
            self.logger.info("%s: %d/%d %s", self.what, done, total, unit)
            return
        rate = num_new / elapsed_s
        left_s = (total - done) / rate
        self.logger.info("%s: %d/%d %s, %.1f %s/s, %.0f s left", self.what, done, total, unit, rate, unit, left_s)
