"""Why what lies further down is stale: the first causes, however far up, so that `status` says "search_space[L03] changed".

A dry run makes nothing, so of an item below a stale one it can only tell which items above have a reason of their own. Of a
configuration asset that is a file whose new value is read already: it changed. Of any other it is told as it is
("block_library[L03]: code"), for what becomes of it only its run can tell.
"""

from collections.abc import Iterable, Sequence

from assets.staleness import NEVER_RUN, Item

CONFIGURATION = "1_configuration"
"""Group of the assets whose watch is their whole value."""
_MOST_SHOWN = 3


class Roots:
    """The first causes of each item that is found stale in one pass over the assets, those above first."""

    def __init__(self, configuration: Iterable[str]) -> None:
        """Remember which assets are configuration."""
        self._configuration = frozenset(configuration)
        self._found: dict[Item, tuple[tuple[Item, str], ...]] = {}

    def add(self, item: Item, reasons: Sequence[str], parents: Sequence[Item]) -> tuple[str, ...]:
        """Remember a stale item, and return in words why it is stale: its own reasons, then the first causes above it.

        Args:
            item: the item.
            reasons: its own, as `Staleness.reasons` words them; () where only something above it is stale.
            parents: what it is made from; those that are stale were added before.
        """
        above = tuple(dict.fromkeys(root for parent in parents for root in self._found.get(parent, ())))
        never_run = NEVER_RUN in reasons
        # What never ran because something above it didn't is no cause of its own for what is below.
        own = () if never_run and above else tuple(self._root(item, reason, parents) for reason in reasons)
        self._found[item] = tuple(dict.fromkeys((*own, *above)))
        return tuple(reasons) if never_run else tuple(dict.fromkeys((*reasons, *_words(above))))

    def _root(self, item: Item, reason: str, parents: Iterable[Item]) -> tuple[Item, str]:
        """Return which item a reason speaks of, and what to say behind its name."""
        changed = next((parent for parent in parents if reason == f"{parent} changed"), None)
        if changed is not None:
            return changed, " changed"
        is_file = item.asset in self._configuration and reason.endswith(" changed")
        return item, " changed" if is_file else f": {reason}"


def _words(roots: Iterable[tuple[Item, str]]) -> list[str]:
    """Return roots in words, those of one asset as one ("search_space[L00] and 31 more changed"), and no more than fit a line."""
    groups: dict[tuple[str, str], list[Item]] = {}
    for item, said in roots:
        groups.setdefault((item.asset, said), []).append(item)
    words = [f"{items[0]}{f' and {len(items) - 1} more' if items[1:] else ''}{said}" for (_, said), items in groups.items()]
    hidden = len(words) - _MOST_SHOWN
    return words if hidden <= 1 else [*words[:_MOST_SHOWN], f"{hidden} more causes"]
