"""Where everything of a checkout lies: what a person writes under conf/, what is made under var/."""

import os
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg

from puzzle_dag.config import (
    ForeignProfile,
    Profile,
    Scenario,
    Target,
    profile_file,
    read_foreign_profile,
    read_profile,
    read_scenario,
    read_target,
    split_earlier,
)
from puzzle_dag.lease import lease_device
from puzzle_dag.store import Artifact, ArtifactStore, fingerprint
from resources.parents import load_parent_once
from resources.shelf import Record, Shelf

if TYPE_CHECKING:
    from puzzle_dag.model.parent import Parent

ROOT_VARIABLE = "PUZZLE_DAG_ROOT"


def project_root() -> Path:
    """Return the project's root: $PUZZLE_DAG_ROOT, or the checkout that this file belongs to."""
    return Path(os.environ.get(ROOT_VARIABLE) or Path(__file__).parents[1]).resolve()


class Workspace(dg.ConfigurableResource):  # type: ignore[type-arg]
    """The folders of one profile. All that is made lies under var/, so deleting var/ is a fresh start."""

    root: str
    """The project's root, absolute."""
    profile: str
    """Name of the profile."""
    anew: bool = False
    """Make what this run makes anew and replace what the store has; by default what is stored is taken."""

    @property
    def root_folder(self) -> Path:
        """The project's root; relative paths in configuration start here."""
        return Path(self.root)

    @property
    def conf(self) -> Path:
        """What a person writes."""
        return self.root_folder / "conf"

    @property
    def profile_file(self) -> Path:
        """The profile's file."""
        return profile_file(self.conf, self.profile)

    @property
    def var(self) -> Path:
        """What this profile makes."""
        return self.root_folder / "var" / self.profile

    @property
    def store(self) -> ArtifactStore:
        """Expensive artifacts by content, shared by all profiles."""
        return ArtifactStore(self.root_folder / "var" / "store")

    @property
    def shelf(self) -> Shelf:
        """Records of what was materialised."""
        return Shelf(self.var)

    @property
    def tables(self) -> Path:
        """Parquet files, one folder a table."""
        return self.var / "tables"

    @property
    def database(self) -> Path:
        """The DuckDB file, rebuilt from the Parquet files."""
        return self.var / "puzzle.duckdb"

    def device(self) -> AbstractContextManager[None]:
        """Hold the device while the context lasts; wait for whoever holds it."""
        return lease_device(self.root_folder)

    def load_parent(self, *, dtype: str | None = None) -> "Parent":
        """Load the profile's parent; a process that runs many partitions loads it once."""
        profile = self.read_profile()
        version = self.shelf.find("parent")
        return load_parent_once(self.root_folder, profile.parent, version.data_version if version else "", dtype, profile.device)

    def discard_damaged(self, record: Record) -> None:
        """Take artifacts of which a file is missing or cut short out of the store, so that they are made again."""
        for name, size in record.files.items():
            path = (self.var / name).resolve()
            if self.store.root.resolve() in path.parents and not (path.is_file() and path.stat().st_size == size):
                kind, prefix, key = path.relative_to(self.store.root.resolve()).parts[:3]
                shutil.rmtree(self.store.root / kind / prefix / key, ignore_errors=True)

    def keep(self, kind: str, inputs: Any, fill: Callable[[Path], tuple[str, dict[str, Any]]]) -> Artifact:
        """Return the artifact that `inputs` determine, making it where the store doesn't have it (or `anew` is on).

        `fill(folder)` writes its files and returns their digest and what to remember of them (JSON).
        """
        key = fingerprint(inputs)
        found = self.store.find(kind, key)
        if found is not None and not self.anew:
            return found
        metadata: dict[str, Any] = {}

        def write(folder: Path) -> str:
            digest, remembered = fill(folder)
            metadata.update(remembered)
            return digest

        return self.store.write(kind, key, write, inputs=inputs, metadata=metadata)

    def read_profile(self) -> Profile:
        """Read the profile's file. Raises ConfigError."""
        return read_profile(self.conf, self.profile)

    def read_foreign_profile(self) -> ForeignProfile:
        """Read the profile's file where it is a foreign library's. Raises ConfigError."""
        return read_foreign_profile(self.conf, self.profile)

    def read_target(self, name: str) -> Target:
        """Read a target's file. Raises ConfigError."""
        return read_target(self.conf, name)

    @staticmethod
    def target_of(spec: dict[str, Any]) -> Target:
        """Return the target that a record of `target_spec` says."""
        return Target.model_validate(spec)

    @staticmethod
    def scenario_of(spec: dict[str, Any]) -> Scenario:
        """Return the scenario that a record of `scenario_spec` says."""
        return split_earlier(spec)[0]

    def read_scenario(self, name: str) -> Scenario:
        """Read a scenario's file. Raises ConfigError."""
        return read_scenario(self.conf, name)
