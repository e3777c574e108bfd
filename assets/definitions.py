"""Dagster's way in: the definitions of one profile are one code location.

workspace.yaml names the profile as the attribute of this module, so that each location loads its own profile and
only that; `defs` is the profile named by $PUZZLE_DAG_PROFILE.
"""

import os

import dagster as dg

from assets.auto import auto_sensor, automation_condition
from assets.automation import conf_sensor
from assets.checks import asset_checks
from assets.children import child_assets
from assets.configuration import configuration_assets
from assets.costs import cost_assets
from assets.foreign.checks import foreign_checks
from assets.foreign.library import foreign_library_assets
from assets.foreign.plan import ForeignPlan
from assets.foreign.results import foreign_result_assets
from assets.foreign.search import foreign_search_assets
from assets.grading import grading_assets
from assets.launching import add_scenario_job, refresh_job
from assets.library import library_assets
from assets.online import online_assets
from assets.parent import parent_assets
from assets.plan import Plan, make_plan
from assets.predicted import predicted_assets
from assets.refinement import refinement_assets
from assets.results import result_assets
from assets.run_scores import run_score_assets
from assets.scores import score_assets
from assets.search import search_assets
from assets.serving import serving_assets
from assets.sweeps import sweep_schedules
from assets.task_scores import task_score_assets
from assets.trial import trial_assets
from resources.workspace import Workspace, project_root

PROFILE_VARIABLE = "PUZZLE_DAG_PROFILE"
DEFAULT_PROFILE = "tiny"


def build_definitions(plan: Plan | ForeignPlan) -> dg.Definitions:
    """Return the definitions of one profile."""
    refresh = refresh_job(plan)
    factories = (
        configuration_assets,
        parent_assets,
        library_assets,
        run_score_assets,
        task_score_assets,
        score_assets,
        cost_assets,
        search_assets,
        refinement_assets,
        trial_assets,
        predicted_assets,
        child_assets,
        grading_assets,
        serving_assets,
        online_assets,
        result_assets,
    )
    checks = asset_checks
    if isinstance(plan, ForeignPlan):
        factories, checks = (foreign_library_assets, foreign_search_assets, foreign_result_assets), foreign_checks
    return dg.Definitions(
        assets=[_with_auto_mode(plan, asset) for factory in factories for asset in factory(plan)],
        asset_checks=checks(plan),
        jobs=[refresh, add_scenario_job(plan)],
        sensors=[conf_sensor(plan, refresh), auto_sensor(plan)],
        schedules=sweep_schedules(plan),
        resources={"workspace": Workspace(root=str(plan.root), profile=plan.profile.name)},
        executor=dg.in_process_executor,
    )


def _with_auto_mode(plan: Plan, asset: dg.AssetsDefinition) -> dg.AssetsDefinition:
    condition = automation_condition(plan.root, plan.profile.name)
    return asset.map_asset_specs(lambda spec: spec.replace_attributes(automation_condition=condition))


def __getattr__(name: str) -> dg.Definitions:
    """Return the definitions of the profile `name` (`defs`: of $PUZZLE_DAG_PROFILE), made when they are asked for."""
    if name.startswith("_"):
        raise AttributeError(name)
    profile = os.environ.get(PROFILE_VARIABLE, DEFAULT_PROFILE) if name == "defs" else name
    return build_definitions(make_plan(project_root(), profile))
