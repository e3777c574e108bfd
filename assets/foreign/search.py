"""The search on a foreign library: for each scenario the variants that cost least and keep to every bound, proven."""

from collections.abc import Mapping, Sequence
from typing import Any

import dagster as dg

from assets.foreign.library import read_library
from assets.foreign.plan import ForeignPlan
from assets.materialise import Stopwatch, materialised, picture, table
from puzzle_dag.config import ForeignScenario
from puzzle_dag.report.loosened import LoosenedFact, loosened_rows
from puzzle_dag.search.foreign_candidates import ForeignLibrary
from puzzle_dag.search.foreign_scenario import choice_by_layer, grid_of, list_metrics, solve_foreign_scenario, total_of
from puzzle_dag.store import fingerprint
from resources.rows import write_rows
from resources.workspace import Workspace


def choice_rows(library: ForeignLibrary, scenario: ForeignScenario, answers: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each layer of each answer: its variant, what is minimised there, and each bounded number."""
    grids = {name: grid_of(library, name) for name in (scenario.minimize, *scenario.constraints)}
    return [
        {"scenario": scenario.name, "solution": rank, "layer": layer, "variant": variant, "number": name, "value": grid[layer][variant]}
        for rank, answer in enumerate(answers, start=1)
        for layer, variant in answer["choices"].items()
        for name, grid in grids.items()
    ]


def chosen_rows(library: ForeignLibrary, answers: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a row a layer: what stands there in each answer."""
    by_layer = [choice_by_layer(library, a["choices"]) for a in answers]
    return [{"layer": layer, **{f"solution {i}": found[layer] for i, found in enumerate(by_layer, 1)}} for layer in by_layer[0]]


def solution_rows(library: ForeignLibrary, scenario: ForeignScenario, answers: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each answer: the proof, and the sum of every number of the library."""
    return [
        {
            "scenario": scenario.name,
            "solution": rank,
            "minimize": scenario.minimize,
            **{k: answer[k] for k in ("status", "objective", "bound", "gap", "seconds")},
            **{name: float(total_of(library, answer["choices"], name)) for name in list_metrics(library)},
        }
        for rank, answer in enumerate(answers, start=1)
    ]


def loosening_rows(scenario: ForeignScenario, answers: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each bound and step: what loosening it alone would buy the best answer."""
    return [{"scenario": scenario.name, "minimize": scenario.minimize, **entry} for entry in answers[0].get("loosening", ())]


def loosened_table(scenario: ForeignScenario, answers: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Return the same for people."""
    return loosened_rows([LoosenedFact.of(entry) for entry in answers[0].get("loosening", ())], scenario.minimize)


def _metadata(library: ForeignLibrary, scenario: ForeignScenario, answers: list[dict[str, Any]]) -> dict[str, Any]:
    from puzzle_dag.report.foreign import variant_map

    grid, best = grid_of(library, scenario.minimize), answers[0]
    drawn = variant_map(grid, chosen=best["choices"], label=scenario.minimize, title=scenario.name)
    bounds = scenario.constraints
    return {
        **{k: best[k] for k in ("status", "objective")},
        **{k: "not proven" if best[k] is None else best[k] for k in ("bound", "gap")},
        "solve_seconds": best["seconds"],
        "num_solutions": len(answers),
        "constraints": table(
            [{"sum of": n, "at least": b.at_least, "at most": b.at_most, "solution": best["costs"].get(n)} for n, b in bounds.items()]
        ),
        "what loosening buys": table(loosened_table(scenario, answers)),
        "solutions": table(solution_rows(library, scenario, answers)),
        "choices": table(chosen_rows(library, answers)),
        "picture": picture(drawn, f"{scenario.minimize} of every variant, the chosen ones framed"),
    }


def foreign_search_assets(plan: ForeignPlan) -> list[dg.AssetsDefinition]:
    """Return solution."""

    @dg.asset(
        **plan.options(
            "solution",
            deps=["library_file", "scenario_spec"],
            partitions=plan.partitions.scenarios,
            stages=["puzzle_dag.search.answer"],
            kinds=("highs",),
            description="The chosen variant of every layer, proven by HiGHS; several where the scenario asks for several.",
        )
    )
    def solution(context: dg.AssetExecutionContext, workspace: Workspace) -> dg.MaterializeResult:
        time, name = Stopwatch(), context.partition_key
        spec, library_file = workspace.shelf.value("scenario_spec", name), workspace.shelf.find("library_file")
        library, scenario = read_library(workspace), ForeignScenario.model_validate(spec)
        answers = solve_foreign_scenario(library, scenario)
        version = library_file.data_version if library_file else ""
        found = [{k: v for k, v in a.items() if k != "seconds"} for a in answers]
        loosening = loosening_rows(scenario, answers)
        files = [write_rows(workspace.tables / "loosening" / f"{name}.parquet", loosening)] if loosening else []
        return materialised(
            context,
            plan,
            workspace,
            {"scenario_spec": fingerprint(spec), "library": version, "answers": answers},
            data_version=fingerprint(found),
            files=[
                write_rows(workspace.tables / "solutions" / f"{name}.parquet", solution_rows(library, scenario, answers)),
                write_rows(workspace.tables / "choices" / f"{name}.parquet", choice_rows(library, scenario, answers)),
                *files,
            ],
            metadata=_metadata(library, scenario, answers),
            time=time,
        )

    return [solution]
