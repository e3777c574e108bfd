"""What a user configures: a profile (parent, corpus, search space, budgets), targets and scenarios.

Each is one YAML file under conf/profiles/, conf/targets/ or conf/scenarios/; the file's stem is its name.
Everything is validated before any compute is spent, and an error names the file, the field, the value and the fix.
"""

from puzzle_dag.config.foreign import (
    ForeignBound,
    ForeignProfile,
    ForeignScenario,
    is_foreign,
    library_of,
    read_foreign_profile,
    read_foreign_scenario,
)
from puzzle_dag.config.online import LoadCurveSettings, SpeculationSettings
from puzzle_dag.config.profile import (
    AccuracySettings,
    BundledCorpus,
    LibrarySettings,
    ParentSource,
    Profile,
    TextCorpus,
    TokenBudgets,
    UptrainSettings,
    read_any_profile,
    read_profile,
)
from puzzle_dag.config.reading import ConfigError, Name, Settings, check_name, read_settings
from puzzle_dag.config.scenario import At, Bound, ConstraintName, Objective, Scenario, UptrainBudget, read_scenario
from puzzle_dag.config.space import LayerOverride, SearchSpaceSettings, resolve_space
from puzzle_dag.config.target import Target, read_target

__all__ = [
    "AccuracySettings",
    "At",
    "Bound",
    "BundledCorpus",
    "ConfigError",
    "ConstraintName",
    "ForeignBound",
    "ForeignProfile",
    "ForeignScenario",
    "LayerOverride",
    "LibrarySettings",
    "LoadCurveSettings",
    "Name",
    "Objective",
    "ParentSource",
    "Profile",
    "Scenario",
    "SearchSpaceSettings",
    "Settings",
    "SpeculationSettings",
    "Target",
    "TextCorpus",
    "TokenBudgets",
    "UptrainBudget",
    "UptrainSettings",
    "check_name",
    "is_foreign",
    "library_of",
    "read_any_profile",
    "read_foreign_profile",
    "read_foreign_scenario",
    "read_profile",
    "read_scenario",
    "read_settings",
    "read_target",
    "resolve_space",
]
