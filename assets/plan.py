"""What all asset definitions of one profile share: its settings, its parent's shape, keys, partitions and options."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import dagster as dg

from assets.partitions import Partitions
from assets.versions import stage_version
from puzzle_dag.config import ForeignProfile, Profile, read_any_profile
from puzzle_dag.store import fingerprint

if TYPE_CHECKING:
    from assets.foreign.plan import ForeignPlan

DEVICE_POOL = "device"
OWNERS = ["team:compression"]

GROUPS = {
    "1_configuration": ("corpus", "parent", "search_space", "cost_variants", "target_spec", "scenario_spec"),
    "2_parent": ("tokens", "parent_activations", "parent_accuracy", "parent_serving"),
    "3_library": ("block_library",),
    "4_scores": ("block_scores", "run_scores", "task_scores", "layer_group", "score_table"),
    "5_costs": ("block_costs", "cost_table"),
    "6_search": ("solution", "refinement", "trial", "predicted_frontier"),
    "7_children": ("child", "uptrained_child", "accuracy", "serving", "load_curve", "speculation"),
    "8_results": ("frontier", "tables"),
}
"""Groups in the order that data flows through them, which is the order the UI sorts them in."""

OPT_IN = ("load_curve", "speculation")
"""Assets that exist only where the profile has settings under their name; each takes minutes a scenario."""

OPT_IN_SEARCH = ("refinement", "trial")
"""Likewise, before the children, in the order of the data flow: they are made from what the last of them ends with."""

OPT_IN_SCORES = ("run_scores", "task_scores")
"""Further scores of a layer, likewise: of runs that begin at it (`search_space.runs`), and on lm-eval tasks (`task_scores`)."""

CORE = frozenset(name for names in GROUPS.values() for name in names) - {*OPT_IN, *OPT_IN_SEARCH, *OPT_IN_SCORES}
"""The assets of every profile with a parent."""


def dagster_name(verb: str, name: str, kind: str = "") -> str:
    """Return the name of a job, an op, a sensor or a schedule ("refresh_tiny_job"); Dagster takes letters, digits and "_" only."""
    return "_".join(part.replace("-", "_").replace(".", "_") for part in (verb, name, kind) if part)


class Naming:
    """How the assets of one profile are named, grouped and told of; what is planned says the profile and the groups."""

    __slots__ = ()
    groups: ClassVar[Mapping[str, tuple[str, ...]]]
    """Group -> its assets, in the order of the data flow."""
    root: Path
    """The project's root."""
    profile: Any
    """Settings of the profile; only its name is used here."""

    def key(self, name: str) -> dg.AssetKey:
        """Return an asset's key, prefixed with the profile's name."""
        return dg.AssetKey([self.profile.name, name])

    def dep(self, name: str, mapping: dg.PartitionMapping | None = None) -> dg.AssetDep:
        """Return a dependency on another asset of this profile."""
        return dg.AssetDep(self.key(name), partition_mapping=mapping)

    def asks_for(self, asset: str, partition: str) -> bool:
        """Say whether the profile asks for this partition of an asset."""
        return True

    def options(
        self,
        name: str,
        *,
        description: str,
        deps: Sequence[str | dg.AssetDep] = (),
        stages: Sequence[str] = (),
        settings: Any = None,
        partitions: dg.PartitionsDefinition | None = None,
        kinds: Sequence[str] = ("python",),
        device: bool = False,
    ) -> dict[str, Any]:
        """Return what every asset gives to `dg.asset`.

        `code_version` says what code and which of the profile's settings make the asset: the VERSION of each stage
        module it calls and the fingerprint of `settings`, so that an edited budget makes exactly its asset stale.
        """
        code = {"stages": {s: stage_version(s) for s in stages}, "settings": settings}
        return {
            "key": self.key(name),
            "deps": [self.dep(d) if isinstance(d, str) else d for d in deps],
            "code_version": ".".join([*(f"{s.rpartition('.')[2]}{v}" for s, v in code["stages"].items()), fingerprint(code)[:12]]),
            "partitions_def": partitions,
            "group_name": next(group for group, names in self.groups.items() if name in names),
            "kinds": set(kinds),
            "owners": OWNERS,
            "description": description,
            "pool": DEVICE_POOL if device else None,
        }


@dataclass(frozen=True, slots=True)
class Plan(Naming):
    """One profile with a parent, as its definitions see it."""

    groups = GROUPS

    root: Path
    """The project's root."""
    profile: Profile
    """Settings, as read when the definitions were made."""
    shape: Any
    """The parent's PuzzleDagConfig, read without its weights."""
    partitions: Partitions
    """Partition sets."""

    @property
    def opted_in(self) -> tuple[str, ...]:
        """Names of the OPT_IN and OPT_IN_SEARCH assets that the profile asks for."""
        return tuple(name for name in (*OPT_IN_SEARCH, *OPT_IN) if getattr(self.profile, name) is not None)

    def asks_for(self, asset: str, partition: str) -> bool:
        """Say whether the profile asks for this partition of an asset; those of OPT_IN may be kept to some of the scenarios."""
        return asset not in OPT_IN or getattr(self.profile, asset).includes(partition)

    @property
    def solving(self) -> tuple[str, ...]:
        """Names of the assets that hold a scenario's solution, each made from the one before it."""
        return ("solution", *(name for name in OPT_IN_SEARCH if getattr(self.profile, name) is not None))

    @property
    def chosen(self) -> str:
        """Name of the asset whose solutions the children are made from."""
        return self.solving[-1]

    @property
    def further_scores(self) -> tuple[str, ...]:
        """Names of the OPT_IN_SCORES assets that the profile asks for."""
        asked = {"run_scores": self.profile.search_space.runs, "task_scores": self.profile.task_scores}
        return tuple(name for name in OPT_IN_SCORES if asked[name] is not None)


def make_plan(root: Path, profile_name: str) -> "Plan | ForeignPlan":
    """Read a profile and its parent's config.json, or a foreign library's profile. Raises ConfigError, UnsupportedFamilyError."""
    from assets.foreign.plan import make_foreign_plan

    profile = read_any_profile(root / "conf", profile_name)
    if isinstance(profile, ForeignProfile):
        return make_foreign_plan(root, profile)
    from puzzle_dag.model.parent import read_parent_shape  # with transformers, which a foreign library needs nothing of

    shape = read_parent_shape(profile.parent, root)
    return Plan(root, profile, shape, Partitions.of(profile.name, shape.num_hidden_layers))
