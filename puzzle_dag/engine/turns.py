"""Models run by turns, an engine of each a turn: as many turns as what they tell asks for."""

import logging
from collections.abc import Callable
from typing import TypeVar

from puzzle_dag.engine.failures import EngineFailedError

_log = logging.getLogger(__name__)

Told = TypeVar("Told")


def run_turns(turns: int, run: Callable[[range], Told], wanted: Callable[[Told], int]) -> Told:
    """Run turns, then further ones for as long as they are wanted, and return what all of them tell.

    Args:
        turns: as many are run first.
        run: runs the engines of some turns, which follow those that it ran before, and says what all tell.
        wanted: says how many there should be by what they tell; no more than there are ends it.

    Raises:
        EngineFailedError: engines of the first turns failed. Where those of further turns do, the turns before them tell what they can,
            and a warning says so.
    """
    told, done = run(range(turns)), turns
    while (more := wanted(told)) > done:
        _log.info("%d turns leave it open: %d more", done, more - done)
        try:
            told, done = run(range(done, more)), more
        except EngineFailedError as error:
            _log.warning("further turns failed, so %d have to tell: %s", done, error)
            break
    return told
