"""The most memory that this process held since a moment, read from Linux's own high-water mark."""

import resource
import sys
from pathlib import Path

_CLEAR = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")
_RESET_HIGH_WATER = "5"  # proc(5)


def reset_peak_memory() -> None:
    """Set the high-water mark back to what is resident now, where the system allows it."""
    try:
        _CLEAR.write_text(_RESET_HIGH_WATER)
    except OSError:
        return


def peak_memory_bytes() -> int:
    """Return the largest resident size since the last reset; since the process began where there is no resetting."""
    try:
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return int(line.split()[1]) * 1024
