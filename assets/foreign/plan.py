"""What all asset definitions of one foreign library share: its settings, keys, partitions and groups."""

from dataclasses import dataclass
from pathlib import Path

import dagster as dg

from assets.plan import Naming
from puzzle_dag.config import ForeignProfile

GROUPS = {
    "1_configuration": ("library_file", "scenario_spec"),
    "6_search": ("solution",),
    "8_results": ("frontier", "tables"),
}
"""Groups in the order that data flows through them, named as those of a profile with a parent."""


@dataclass(frozen=True, slots=True)
class ForeignPartitions:
    """The partition sets of one foreign library."""

    scenarios: dg.DynamicPartitionsDefinition
    targets: dg.DynamicPartitionsDefinition
    """Always empty: nothing is measured. It is there for the refresh, which brings both sets up to date."""


@dataclass(frozen=True, slots=True)
class ForeignPlan(Naming):
    """One foreign library, as its definitions see it."""

    groups = GROUPS

    root: Path
    """The project's root."""
    profile: ForeignProfile
    """Settings, as read when the definitions were made."""
    partitions: ForeignPartitions
    """Partition sets."""


def make_foreign_plan(root: Path, profile: ForeignProfile) -> ForeignPlan:
    """Return the plan of a foreign library. Names of dynamic sets are global to an instance, hence the prefix."""
    sets = (dg.DynamicPartitionsDefinition(name=f"{profile.name}/{kind}") for kind in ("scenario", "target"))
    return ForeignPlan(root, profile, ForeignPartitions(*sets))
