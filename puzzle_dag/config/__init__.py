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
from puzzle_dag.config.objective import LOSSES, ConstraintName, Objective
from puzzle_dag.config.online import LoadCurveSettings, ServingSettings, SpeculationSettings
from puzzle_dag.config.profile import (
    AccuracySettings,
    BundledCorpus,
    LibrarySettings,
    ParentSource,
    Profile,
    TaskScoreSettings,
    TextCorpus,
    TokenBudgets,
    UptrainSettings,
    profile_file,
    read_any_profile,
    read_profile,
)
from puzzle_dag.config.reading import At, ConfigError, Name, Settings, check_name, locate, misfit, read_named, read_settings
from puzzle_dag.config.refinement import RefinementSettings
from puzzle_dag.config.scenario import (
    BatchRange,
    Bound,
    Scenario,
    UptrainBudget,
    read_earlier,
    read_scenario,
    scenario_file,
    split_earlier,
    with_earlier,
)
from puzzle_dag.config.shape import Shape, read_shape
from puzzle_dag.config.space import LayerOverride, RunSettings, SearchSpaceSettings, resolve_runs, resolve_space
from puzzle_dag.config.structure import PoolSettings, StructureSettings
from puzzle_dag.config.target import Target, read_target, target_file
from puzzle_dag.config.trial import TrialSettings

__all__ = [
    "LOSSES",
    "AccuracySettings",
    "At",
    "BatchRange",
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
    "PoolSettings",
    "Profile",
    "RefinementSettings",
    "RunSettings",
    "Scenario",
    "SearchSpaceSettings",
    "ServingSettings",
    "Settings",
    "Shape",
    "SpeculationSettings",
    "StructureSettings",
    "Target",
    "TaskScoreSettings",
    "TextCorpus",
    "TokenBudgets",
    "TrialSettings",
    "UptrainBudget",
    "UptrainSettings",
    "check_name",
    "is_foreign",
    "library_of",
    "locate",
    "misfit",
    "profile_file",
    "read_any_profile",
    "read_earlier",
    "read_foreign_profile",
    "read_foreign_scenario",
    "read_named",
    "read_profile",
    "read_scenario",
    "read_settings",
    "read_shape",
    "read_target",
    "resolve_runs",
    "resolve_space",
    "scenario_file",
    "split_earlier",
    "target_file",
    "with_earlier",
]
