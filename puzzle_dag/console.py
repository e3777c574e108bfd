"""What a command tells the person who called it: lines on standard output, each there at once."""

import sys


def say(line: str = "") -> None:
    """Write a line to standard output, also where that is a file or a pipe, before the next one is worked out."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
