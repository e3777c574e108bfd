"""Run a program that ends when whoever started it ends: `python -m puzzle_dag.serving.follow COMMAND ...`.

The kernel sends SIGTERM when the parent process dies, however it dies, so that no server holds the device after a
killed refresh. The wish survives the exec, so the program itself needs to know nothing of it.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main(command: list[str]) -> None:
    """Replace this process by `command`."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1:])
