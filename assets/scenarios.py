"""Adding a scenario: its file goes to conf/scenarios/, its name into the profile, validated before either is touched."""

import re
import shutil
import tempfile
from pathlib import Path

from puzzle_dag.config import ConfigError, Scenario, read_profile, read_scenario
from puzzle_dag.store import write_atomically

_FLOW_LIST = re.compile(r"^(scenarios:[ \t]*\[)([^\]\n]*)(\].*)$", re.MULTILINE)


def add_scenario(root: Path, profile_name: str, file: Path) -> Scenario:
    """Copy a scenario's file into conf/ and name it in the profile; a file of the same name is replaced.

    Raises:
        ConfigError: the file is no valid scenario, its target isn't one of the profile's, or the profile's list
            of scenarios is not written as `scenarios: [a, b]`.
    """
    conf = root / "conf"
    profile = read_profile(conf, profile_name)
    with tempfile.TemporaryDirectory() as folder:
        trial = Path(folder) / "scenarios" / f"{file.stem}.yaml"
        trial.parent.mkdir()
        if not file.is_file():
            raise ConfigError(f"{file} does not exist; give the path of a scenario's YAML file")
        shutil.copyfile(file, trial)
        scenario = read_scenario(Path(folder), file.stem)
    if scenario.target not in profile.targets:
        raise ConfigError(f"{file}: target {scenario.target!r} is not one of profile {profile_name}: {', '.join(profile.targets)}")
    listing = conf / "profiles" / f"{profile_name}.yaml"
    if scenario.name not in profile.scenarios:
        text = listing.read_text()
        match = _FLOW_LIST.search(text)
        if match is None:
            raise ConfigError(f"{listing}: write the scenarios as `scenarios: [a, b]`, or add {scenario.name!r} by hand")
        names = ", ".join([n for n in (match[2].strip(),) if n] + [scenario.name])
        text = text[: match.start()] + match[1] + names + match[3] + text[match.end() :]
    else:
        text = ""
    write_atomically(conf / "scenarios" / f"{scenario.name}.yaml", file.read_text())
    if text:
        write_atomically(listing, text)
    return scenario
