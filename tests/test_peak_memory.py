"""The high-water mark rises with what is held, and falls back when it is reset."""

import sys

import numpy as np
import pytest

from puzzle_dag.peak_memory import peak_memory_bytes, reset_peak_memory

_HELD = 256 * 2**20


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux resets the mark")
def test_peak_covers_what_was_held_since_the_reset():
    reset_peak_memory()
    before = peak_memory_bytes()
    held = np.ones(_HELD, dtype=np.uint8)
    assert peak_memory_bytes() - before >= 0.9 * held.nbytes
    del held
    reset_peak_memory()
    assert peak_memory_bytes() - before < 0.5 * _HELD
