"""Numbers and tables as text: quantities with their units, tables in Markdown, and tables aligned for a terminal."""

import math
import re
from collections.abc import Sequence

_BYTE_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
_PLACE = re.compile(" (?:on|at) ")
"""What divides a quantity's name from where it is bounded."""


def format_bytes(num_bytes: float) -> str:
    """Return bytes in the largest binary unit that leaves a number of at least 1: "17.2 MiB"."""
    step = min(len(_BYTE_UNITS) - 1, max(0, int(math.log(num_bytes, 1024)))) if num_bytes >= 1 else 0
    return f"{num_bytes:.0f} B" if step == 0 else f"{num_bytes / 1024**step:.1f} {_BYTE_UNITS[step]}"


def format_seconds(seconds: float) -> str:
    """Return a duration in a unit that people read: "850 µs", "12.3 ms", "4.20 s", "3 min 20 s", "2 h 5 min"."""
    if seconds < 0.001:
        return f"{seconds * 1e6:.3g} µs"
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    if seconds < 60:
        return f"{seconds:.3g} s"
    whole = round(seconds)
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"


def format_quantity(name: str, value: float) -> str:
    """Return a value with the unit that its name says: `latency_s`, `memory_bytes`, `throughput_tokens_per_s`, `kv_bytes_per_token`.

    What stands behind a name ("latency_s on cpu-chat") is passed over; the scores `kl` and `lm_loss` are in nats.
    """
    if not math.isfinite(value):
        return "none"
    name = _PLACE.split(name)[0]
    if name.endswith("_tokens_per_s"):
        return f"{value:,.0f} tokens/s"
    if name.endswith("_bytes_per_token"):
        return f"{format_bytes(value)}/token"
    if name.endswith("_bytes"):
        return format_bytes(value)
    if name.endswith("_s"):
        return format_seconds(value)
    if name in ("kl", "lm_loss"):
        return f"{value:.4g} nats"
    if name == "parameters":
        return f"{value / 1e9:.2f} G" if value >= 1e9 else f"{value / 1e6:.2f} M"
    return f"{value:g}" if value == int(value) else f"{value:.4g}"


def format_percent(share: float, stderr: float | None = None) -> str:
    """Return a share of 1 in percent, with its standard error in points where there is one: "97.3 ± 0.4 %"."""
    return f"{100 * share:.1f} %" if stderr is None else f"{100 * share:.1f} ± {100 * stderr:.1f} %"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a Markdown table; cells are turned into text, and bars in them are escaped. Raises ValueError for rows of another length."""
    lines = [_markdown_row(header), "|" + "---|" * len(header)]
    for row in rows:
        if len(row) != len(header):
            raise ValueError(f"row {list(row)} has {len(row)} cells, the header {len(header)}")
        lines.append(_markdown_row(row))
    return "\n".join(lines)


def _markdown_row(cells: Sequence[object]) -> str:
    return "| " + " | ".join(str(c).replace("|", "\\|").replace("\n", " ") for c in cells) + " |"


def text_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a table aligned for a terminal, numbers and all as text. Raises ValueError for rows of another length."""
    cells = [[str(c) for c in row] for row in (header, *rows)]
    for row in cells:
        if len(row) != len(header):
            raise ValueError(f"row {row} has {len(row)} cells, the header {len(header)}")
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells]
    return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])
