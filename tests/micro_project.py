"""A whole project in a temporary folder: the micro profile on a random parent, with a Dagster instance of its own."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dagster as dg
import duckdb
import yaml

from assets.refresh import RefreshRecord, refresh
from resources.instance import open_instance
from resources.workspace import Workspace

CHECKOUT = Path(__file__).parents[1]


@dataclass
class Project:
    root: Path
    profile: str = "micro"

    @property
    def workspace(self) -> Workspace:
        return Workspace(root=str(self.root), profile=self.profile)

    @property
    def profile_file(self) -> Path:
        return self.root / "conf" / "profiles" / f"{self.profile}.yaml"

    def edit(self, file: Path, **fields: Any) -> None:
        """Change fields of a YAML file; "a.b" reaches into a mapping."""
        content = yaml.safe_load(file.read_text())
        for name, value in fields.items():
            *path, last = name.split("__")
            place = content
            for part in path:
                place = place.setdefault(part, {})
            place[last] = value
        file.write_text(yaml.safe_dump(content))

    def instance(self) -> dg.DagsterInstance:
        return open_instance(self.root)

    def refresh(self, **options: Any) -> RefreshRecord:
        with self.instance() as instance:
            return refresh(self.root, self.profile, instance, **options)

    def rows(self, query: str) -> list[Any]:
        """Return what a query of the DuckDB file gives."""
        with duckdb.connect(str(self.workspace.database), read_only=True) as connection:
            return connection.execute(query).fetchall()


def copy_project(source: Project, root: Path) -> Project:
    """Return a copy of a project with all that was made in it: a refresh of the micro profile takes a while, a copy doesn't."""
    shutil.copytree(source.root, root, dirs_exist_ok=True)
    return Project(root, source.profile)


def make_project(root: Path, parent_folder: Path) -> Project:
    (root / "conf").mkdir(parents=True)
    shutil.copy(CHECKOUT / "conf" / "dagster.yaml", root / "conf")
    for kind in ("profiles", "targets", "scenarios"):
        (root / "conf" / kind).mkdir()
        for file in (CHECKOUT / "conf" / kind).glob("micro*.yaml"):
            shutil.copy(file, root / "conf" / kind)
    shutil.copytree(parent_folder, root / "parents" / "micro")
    return Project(root)
