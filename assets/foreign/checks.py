"""Asset checks of a foreign library: its numbers are whole, and every answer holds when it is added up again."""

import dagster as dg

from assets.checking import check_of, check_result
from assets.foreign.library import read_library
from assets.foreign.plan import ForeignPlan
from puzzle_dag.config import ForeignScenario
from puzzle_dag.search.foreign_candidates import ForeignCandidates
from puzzle_dag.search.foreign_scenario import list_metrics, recheck_answers
from resources.workspace import Workspace


def _library_is_complete(context: dg.AssetCheckExecutionContext, workspace: Workspace) -> dg.AssetCheckResult:
    library = read_library(workspace)
    numbers, known = list_metrics(library), {name for n in ForeignCandidates.of(library).numbers for name in n}
    partial = sorted(known - set(numbers) - {"source"})
    return check_result(
        not partial and bool(numbers),
        blocking=False,
        everywhere=", ".join(numbers) or "none",
        missing_somewhere=", ".join(partial) or "none",
    )


def _solution_is_feasible(context: dg.AssetCheckExecutionContext, workspace: Workspace) -> dg.AssetCheckResult:
    name = context.partition_key
    scenario = ForeignScenario.model_validate(workspace.shelf.value("scenario_spec", name))
    answers = workspace.shelf.value("solution", name)["answers"]
    wrong = recheck_answers(read_library(workspace), scenario, answers)
    return check_result(not wrong, wrong="; ".join(wrong) or "none", num_solutions=len(answers))


def foreign_checks(plan: ForeignPlan) -> list[dg.AssetChecksDefinition]:
    """Return the checks of one foreign library."""
    return [
        check_of(
            plan,
            "library_file",
            "complete",
            None,
            _library_is_complete,
            blocking=False,
            description="Every variant of every layer has a finite value of every number that any of them has.",
        ),
        check_of(
            plan,
            "solution",
            "feasible",
            plan.partitions.scenarios,
            _solution_is_feasible,
            blocking=True,
            description="Every answer, added up again from the library, keeps to every bound and differs enough from the others.",
        ),
    ]
