"""HiGHS without a word of its own: what `puzzle-dag solve --json` writes to standard output is the JSON alone."""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

import highspy


@contextmanager
def _nowhere(descriptor: int) -> Iterator[None]:
    """Send what is written to a file descriptor nowhere, C's buffers included."""
    flush, kept, sink = ctypes.CDLL(None).fflush, os.dup(descriptor), os.open(os.devnull, os.O_WRONLY)
    flush(None)
    try:
        os.dup2(sink, descriptor)
        yield
        flush(None)
    finally:
        os.dup2(kept, descriptor)
        os.close(kept)
        os.close(sink)


def make_highs() -> highspy.Highs:
    """Return a solver that logs nothing.

    From 1.16 on HiGHS writes its banner when the first solver of a process is made, before there is one whose options could be set.
    """
    with _nowhere(1):
        solver = highspy.Highs()
    solver.setOptionValue("output_flag", False)
    return solver
