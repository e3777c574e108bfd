"""Configuration assets of a foreign library: its file, read and checked, and the scenarios to solve on it."""

from statistics import fmean
from typing import Any

import dagster as dg

from assets.foreign.plan import ForeignPlan
from assets.foreign.watches import watch_foreign_scenario, watch_library_file
from assets.materialise import materialised, picture, table
from puzzle_dag.config import ForeignScenario, misfit, read_foreign_scenario, read_named, scenario_file
from puzzle_dag.search.foreign import read_foreign_library
from puzzle_dag.search.foreign_candidates import ForeignCandidates, ForeignLibrary
from puzzle_dag.search.foreign_scenario import check_foreign_scenario, grid_of, list_metrics, list_sources
from puzzle_dag.store import fingerprint
from resources.workspace import Workspace


def read_library(workspace: Workspace) -> ForeignLibrary:
    """Return the profile's library. Raises ConfigError, ForeignLibraryError."""
    return read_foreign_library(workspace.root_folder / workspace.read_foreign_profile().library_file)


def check_foreign_profile(workspace: Workspace) -> None:
    """Check the library and every scenario against it. Raises ConfigError, ForeignLibraryError."""
    profile, conf, file = workspace.read_foreign_profile(), workspace.conf, workspace.profile_file
    if not (workspace.root_folder / profile.library_file).resolve().is_relative_to(workspace.root_folder.resolve()):
        why = f"is {profile.library_file}; put it below the project's root"
        raise misfit(file, ("library_file",), why, owner=f"profile {profile.name}")
    library = read_library(workspace)
    for i, name in enumerate(profile.scenarios):
        scenario = read_named(read_foreign_scenario, conf, name, file=file, location=("scenarios", i))
        check_foreign_scenario(scenario, library, profile=profile.name, file=scenario_file(conf, name))


def metric_rows(library: ForeignLibrary) -> list[dict[str, Any]]:
    """Return for each number of a library the least, the mean and the largest over all variants of all layers."""
    rows = []
    for name in list_metrics(library):
        values = [v for variants in grid_of(library, name).values() for v in variants.values()]
        rows.append({"number": name, "least": min(values), "mean": fmean(values), "largest": max(values)})
    return rows


def _library_metadata(plan: ForeignPlan, library: ForeignLibrary) -> dict[str, Any]:
    from puzzle_dag.report.foreign import variant_map

    rows = metric_rows(library)
    shown = [r["number"] for r in rows if not str(r["number"]).startswith("stats.")] or [r["number"] for r in rows]
    drawn = {f"picture_{n}": picture(variant_map(grid_of(library, n), label=n, title=plan.profile.name), n) for n in shown[:2]}
    return {
        "description": plan.profile.description or "(none given)",
        "source": ", ".join(list_sources(library)) or "the library doesn't say",
        "num_layers": len(ForeignCandidates.of(library).layers),
        "num_variants": sum(map(len, library.values())),
        "numbers": table(rows),
        **drawn,
    }


def _library_file_asset(plan: ForeignPlan) -> dg.AssetsDefinition:
    @dg.asset(
        **plan.options(
            "library_file",
            kinds=("json",),
            description="Layers and variants that someone else measured, with the digest of the file; nothing here was trained.",
        )
    )
    def library_file(context: dg.AssetExecutionContext, workspace: Workspace) -> dg.MaterializeResult:
        library = read_library(workspace)
        value = {**watch_library_file(plan, workspace), "source": list_sources(library), "numbers": list_metrics(library)}
        # The DataVersion is the content's: the same numbers in another order or another kind of file solve nothing again.
        return materialised(context, plan, workspace, value, data_version=fingerprint(library), metadata=_library_metadata(plan, library))

    return library_file


def constraint_table(scenario: ForeignScenario) -> list[dict[str, Any]]:
    """Return a scenario's bounds as rows."""
    return [{"sum of": n, "at least": b.at_least, "at most": b.at_most} for n, b in scenario.constraints.items()]


def _scenario_spec_asset(plan: ForeignPlan) -> dg.AssetsDefinition:
    @dg.asset(
        **plan.options(
            "scenario_spec",
            partitions=plan.partitions.scenarios,
            kinds=("yaml",),
            description="What a solution must keep to, and what it minimises (conf/scenarios/NAME.yaml).",
        )
    )
    def scenario_spec(context: dg.AssetExecutionContext, workspace: Workspace) -> dg.MaterializeResult:
        value = watch_foreign_scenario(plan, workspace, context.partition_key)
        scenario = ForeignScenario.model_validate(value)
        metadata = {
            "description": scenario.description or "(none given)",
            "minimize": scenario.minimize,
            "constraints": table(constraint_table(scenario)),
            "num_solutions": scenario.num_solutions,
            "min_different_layers": scenario.min_different_layers,
        }
        return materialised(context, plan, workspace, value, metadata=metadata)

    return scenario_spec


def foreign_library_assets(plan: ForeignPlan) -> list[dg.AssetsDefinition]:
    """Return library_file and scenario_spec."""
    return [_library_file_asset(plan), _scenario_spec_asset(plan)]
