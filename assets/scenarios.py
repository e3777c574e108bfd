"""Scenarios come and go: their files lie in conf/scenarios/, and the profile's list says which it solves.

Everything is validated before a file is touched, and each file is replaced as a whole. What was solved for a scenario
that goes stays: its file moves to conf/scenarios/retired/, its results lie under var/ and hold again when it comes back.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import yaml

from assets.listing import add_name, remove_name
from puzzle_dag.config import (
    ConfigError,
    ForeignProfile,
    ForeignScenario,
    Profile,
    Scenario,
    check_name,
    library_of,
    misfit,
    profile_file,
    read_any_profile,
    read_foreign_scenario,
    read_scenario,
)
from puzzle_dag.lease import lease
from puzzle_dag.preflight import list_placed_blocks, read_targets
from puzzle_dag.scenario_checks import PlacedBlocks, check_scenario
from puzzle_dag.search.foreign import read_foreign_library
from puzzle_dag.search.foreign_candidates import ForeignLibraryError
from puzzle_dag.search.foreign_scenario import check_foreign_scenario
from puzzle_dag.store import write_atomically

RETIRED = "retired"
"""Folder below conf/scenarios/ of the scenarios that no profile solves any more."""


def validate_scenario(root: Path, profile_name: str, name: str, text: str, *, where: str | None = None) -> Scenario | ForeignScenario:
    """Return the scenario that a file of this name and content would be to the profile.

    Args:
        root: the project's root.
        profile_name: the profile that is to solve it.
        name: the file's stem.
        text: the file's content.
        where: what messages call it; by default its place in conf/.

    Raises:
        ConfigError: it is no valid scenario, or one that a refresh would refuse: a target or a batch size that the profile doesn't
            measure, a layer or block that isn't there; of a foreign library, a number that it lacks.
    """
    conf, profile = root / "conf", read_any_profile(root / "conf", profile_name)
    check_name(name)
    with tempfile.TemporaryDirectory() as folder:
        trial = Path(folder) / "scenarios" / f"{name}.yaml"
        write_atomically(trial, text)
        try:
            return (_try_foreign if isinstance(profile, ForeignProfile) else _try)(root, profile, trial)
        except ConfigError as error:
            shown = where or str(conf / "scenarios" / trial.name)
            raise ConfigError(str(error).replace(str(trial), shown)) from None


def _try(root: Path, profile: Profile, trial: Path) -> Scenario:
    """Read a scenario's file and make the checks that a refresh makes. Raises ConfigError."""
    conf = root / "conf"

    def read_placed() -> PlacedBlocks:
        from puzzle_dag.model.parent import read_parent_shape  # with transformers, which few scenarios need

        try:
            return list_placed_blocks(profile, read_parent_shape(profile.parent, root), file=profile_file(conf, profile.name))
        except ConfigError:
            raise
        except ValueError as error:
            raise misfit(profile_file(conf, profile.name), ("parent",), f"can't be read: {error}", owner=profile.name) from error

    scenario = read_scenario(trial.parents[1], trial.stem)
    check_scenario(conf, profile, scenario, read_targets(conf, profile), read_placed, file=trial)
    return scenario


def _try_foreign(root: Path, profile: ForeignProfile, trial: Path) -> ForeignScenario:
    scenario = read_foreign_scenario(trial.parents[1], trial.stem)
    try:
        check_foreign_scenario(scenario, read_foreign_library(root / profile.library_file), profile=profile.name, file=trial)
    except ForeignLibraryError as error:
        raise ConfigError(str(error)) from error
    return scenario


def _is_for(conf: Path, profile: Profile | ForeignProfile, name: str) -> bool:
    """Say whether a scenario's file asks for this profile: by its library, or by a target that the profile measures."""
    library = library_of(conf, name)
    if isinstance(profile, ForeignProfile):
        return library == profile.name
    return library is None and read_scenario(conf, name).target in profile.targets


def write_scenario(
    root: Path, profile_name: str, name: str, text: str, *, overwrite: bool = False, where: str | None = None
) -> tuple[Scenario | ForeignScenario, bool]:
    """Write a scenario's file and name it in the profile; say whether anything changed.

    Raises:
        ConfigError: as `validate_scenario`; or another file of that name is there and `overwrite` is off.
    """
    scenario = validate_scenario(root, profile_name, name, text, where=where)
    path = root / "conf" / "scenarios" / f"{name}.yaml"
    with _editing(root):
        is_new = not path.exists() or path.read_text() != text
        if is_new and path.exists() and not overwrite:
            raise ConfigError(f"{path} is there already, with other content; give another name, or say that it may be overwritten")
        if is_new:
            write_atomically(path, text)
        is_listed = _edit_listing(root, profile_name, name, add=True)
    return scenario, is_new or is_listed


def add_scenario(root: Path, profile_name: str, file: Path) -> Scenario | ForeignScenario:
    """Copy a scenario's file into conf/ and name it in the profile; a file of the same name is replaced.

    Raises:
        ConfigError: the file is no valid scenario, its target isn't one of the profile's, or its name isn't one.
    """
    if not file.is_file():
        raise ConfigError(f"{file} does not exist; give the path of a scenario's YAML file")
    return write_scenario(root, profile_name, file.stem, file.read_text(), overwrite=True, where=str(file))[0]


def remove_scenario(root: Path, profile_name: str, name: str) -> Path | None:
    """Take a scenario out of the profile; its results stay. Return where its file moved, None where another profile solves it, too.

    Raises:
        ConfigError: the profile doesn't name it.
    """
    profile = read_any_profile(root / "conf", profile_name)
    if check_name(name) not in profile.scenarios:
        raise ConfigError(f"profile {profile_name} has no scenario {name!r}; it has: {', '.join(profile.scenarios) or 'none'}")
    path = root / "conf" / "scenarios" / f"{name}.yaml"
    with _editing(root):
        _edit_listing(root, profile_name, name, add=False)
        if not path.exists() or name in _named(root):
            return None
        (path.parent / RETIRED).mkdir(exist_ok=True)
        return path.rename(path.parent / RETIRED / path.name)


@dataclass(frozen=True, slots=True)
class Adoption:
    """What `adopt_scenarios` did."""

    added: tuple[str, ...] = ()
    """Scenarios whose file was found, and which the profile solves from now on."""
    retired: tuple[str, ...] = ()
    """Scenarios whose file is gone, and which the profile solves no more."""
    problems: tuple[str, ...] = ()
    """Files that could not be taken, and why."""


def adopt_scenarios(root: Path, profile_name: str) -> Adoption:
    """Make the profile's list follow the folder: what was dropped into conf/scenarios/ comes in, what was deleted goes.

    A file comes in if no profile names it yet and it names this library, or a target that this profile measures. A file that isn't
    valid stays where it is, and is told of.

    Raises:
        ConfigError: a profile can't be read.
    """
    conf = root / "conf"
    profile, named = read_any_profile(conf, profile_name), _named(root)
    added, problems = [], []
    for path in sorted((conf / "scenarios").glob("*.yaml")):
        if path.stem in named:
            continue
        try:
            if _is_for(conf, profile, path.stem):
                write_scenario(root, profile_name, path.stem, path.read_text())
                added.append(path.stem)
        except ConfigError as error:
            problems.append(str(error))
    gone = [name for name in profile.scenarios if not (conf / "scenarios" / f"{name}.yaml").exists()]
    for name in gone:
        remove_scenario(root, profile_name, name)
    return Adoption(tuple(added), tuple(gone), tuple(problems))


@contextmanager
def _editing(root: Path) -> Iterator[None]:
    # Two who add at the same time read the same list, and one name would be lost.
    with lease(root / "var" / "conf.lock"):
        yield


def _named(root: Path) -> set[str]:
    """Return the scenarios that any profile names."""
    names: set[str] = set()
    for path in (root / "conf" / "profiles").glob("*.yaml"):
        try:
            names |= set((yaml.safe_load(path.read_text()) or {}).get("scenarios") or ())
        except (yaml.YAMLError, AttributeError, TypeError) as error:
            raise ConfigError(f"{path}: can't tell which scenarios it names: {error}") from error
    return names


def _edit_listing(root: Path, profile_name: str, name: str, *, add: bool) -> bool:
    path = root / "conf" / "profiles" / f"{profile_name}.yaml"
    text = path.read_text()
    edited = (add_name if add else remove_name)(text, "scenarios", name, where=str(path))
    if edited != text:
        write_atomically(path, edited)
    return edited != text
