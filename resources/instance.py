"""The persistent Dagster instance inside the checkout, set up from conf/dagster.yaml."""

import os
from pathlib import Path

import dagster as dg

from puzzle_dag.store import write_atomically


def dagster_home(root: Path) -> Path:
    """Make var/dagster ready and return it: its dagster.yaml is a copy of conf/dagster.yaml."""
    home = root / "var" / "dagster"
    wanted = (root / "conf" / "dagster.yaml").read_text()
    there = home / "dagster.yaml"
    if not there.exists() or there.read_text() != wanted:
        write_atomically(there, wanted)
    return home


def open_instance(root: Path) -> dg.DagsterInstance:
    """Open the instance of a checkout; child processes find it through $DAGSTER_HOME."""
    home = dagster_home(root)
    os.environ["DAGSTER_HOME"] = str(home)
    return dg.DagsterInstance.from_config(str(home))
