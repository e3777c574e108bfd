"""Where everything of a checkout lies: what a person writes under conf/, what is made under var/."""

import os
from pathlib import Path

import dagster as dg

from puzzle_dag.config import Profile, Scenario, Target, read_profile, read_scenario, read_target
from puzzle_dag.store import ArtifactStore
from resources.shelf import Shelf

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

    @property
    def root_folder(self) -> Path:
        """The project's root; relative paths in configuration start here."""
        return Path(self.root)

    @property
    def conf(self) -> Path:
        """What a person writes."""
        return self.root_folder / "conf"

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

    @property
    def device_lock(self) -> Path:
        """File whose lock is the lease of the device."""
        return self.root_folder / "var" / "device.lock"

    def read_profile(self) -> Profile:
        """Read the profile's file. Raises ConfigError."""
        return read_profile(self.conf, self.profile)

    def read_target(self, name: str) -> Target:
        """Read a target's file. Raises ConfigError."""
        return read_target(self.conf, name)

    def read_scenario(self, name: str) -> Scenario:
        """Read a scenario's file. Raises ConfigError."""
        return read_scenario(self.conf, name)
