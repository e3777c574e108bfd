"""Refinement: solutions improved with scores that know what else was replaced; only where the profile asks for it."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import dagster as dg

from assets.drawings import architecture_picture
from assets.library import space_from_json
from assets.materialise import Stopwatch, materialised, picture, table
from assets.plan import Plan
from assets.search import Question
from puzzle_dag.architecture import layer_key
from puzzle_dag.progress import ProgressLog
from puzzle_dag.store import fingerprint
from resources.rows import write_rows
from resources.workspace import Workspace

if TYPE_CHECKING:
    from puzzle_dag.config import Scenario
    from puzzle_dag.search.context import Context
    from puzzle_dag.search.refine import Refinement
    from puzzle_dag.search.solution import Solution


REFINING = ("puzzle_dag.search.refine", "puzzle_dag.search.context", "puzzle_dag.search.score", "puzzle_dag.library.activations")
"""Stages that a refinement goes through."""
REFINED_FROM = ("parent", "parent_activations")
"""Assets that it reads beside those that a search reads."""


def chosen_solution(plan: Plan, workspace: Workspace, scenario: str) -> Mapping[str, Any]:
    """Return the solution that a scenario's child is made from: refined and tried, where the profile asks for that."""
    found: Mapping[str, Any] = workspace.shelf.value(plan.chosen, scenario)["solution"]
    return found


def _read_context(plan: Plan, workspace: Workspace, num_tokens: int | None) -> "Context":
    from puzzle_dag.library.activations import ActivationCache
    from puzzle_dag.pieces import LayerPieces
    from puzzle_dag.search.context import Context

    libraries = [workspace.shelf.value("block_library", layer_key(i)) for i in range(plan.shape.num_hidden_layers)]
    return Context(
        workspace.load_parent(),
        [space_from_json(library["space"]) for library in libraries],
        [LayerPieces.from_json(workspace.store, library["pieces"]) for library in libraries],
        ActivationCache(workspace.var / "activations"),
        plan.profile.dtype,
        None if num_tokens is None else num_tokens // plan.profile.tokens.row_length,
    )


def refine(
    plan: Plan, workspace: Workspace, first: "Solution", question: Question, scenario: "Scenario", *, rescore: bool = False
) -> "Refinement":
    """Improve a solution of a scenario by the profile's settings; the device must be held. What it ends with says how far it came."""
    from puzzle_dag.search.refine import refine_solution

    settings = plan.profile.refinement
    assert settings is not None
    refined = refine_solution(
        first,
        question.scores,
        question.costs,
        scenario,
        _read_context(plan, workspace, settings.tokens),
        workspace.store,
        num_rounds=settings.rounds,
        earlier=question.earlier,
        rescore=rescore,
        progress=ProgressLog(f"scores in {first.scenario}"),
    )
    change = f"from {refined.losses[0]:.4f} to {refined.losses[-1]:.4f}, as measured"
    notes = {**first.notes, **refined.solution.notes, "refined": change}
    return replace(refined, solution=replace(refined.solution, notes=notes))


def _metadata(plan: Plan, workspace: Workspace, refined: "Refinement") -> dict[str, Any]:
    from puzzle_dag.report.pictures import loss_curve

    solution, rows = refined.solution, [asdict(step) for step in refined.steps]
    tried = [(number, step.measured) for number, step in enumerate(refined.steps) if step.measured is not None]
    kept = [point for point in tried if refined.steps[point[0]].is_kept]
    drawn = loss_curve({"kept": kept, "tried": tried}, title=solution.scenario, x="child tried", y=solution.minimized)
    return {
        "loss_before": refined.losses[0],
        "loss_after": refined.losses[-1],
        "steps": table(rows),
        "picture": architecture_picture(plan, workspace, [c.block for c in solution.choices], title=solution.scenario),
        "losses": picture(drawn, "loss of each child that was tried, and of those that were kept"),
    }


def refinement_assets(plan: Plan) -> list[dg.AssetsDefinition]:
    """Return refinement, where the profile asks for it."""
    settings = plan.profile.refinement
    if settings is None:
        return []

    @dg.asset(
        **plan.options(
            "refinement",
            deps=["solution", "scenario_spec", "score_table", "cost_table", *REFINED_FROM],
            stages=REFINING,
            settings={"refinement": settings.model_dump(), "dtype": plan.profile.dtype},
            partitions=plan.partitions.scenarios,
            kinds=("pytorch", "highs"),
            device=True,
            description="The solution, improved under the same constraints with scores that are taken inside the child.",
        )
    )
    def refinement(context: dg.AssetExecutionContext, workspace: Workspace) -> dg.MaterializeResult:
        from puzzle_dag.search.solution import Solution

        name = context.partition_key
        question = Question.read(plan, workspace, name)
        first = Solution.from_json(workspace.shelf.value("solution", name)["solution"])
        with workspace.device():
            time = Stopwatch()
            refined = refine(plan, workspace, first, question, question.scenario, rescore=workspace.anew)
        solution = refined.solution
        rows = [{"scenario": name, **asdict(step)} for step in refined.steps]
        return materialised(
            context,
            plan,
            workspace,
            {"scenario_spec": fingerprint(question.spec), "from": first.digest, "solution": solution.to_json(), "steps": rows},
            data_version=solution.digest,
            files=[write_rows(workspace.tables / "refinement" / f"{name}.parquet", rows)],
            metadata=_metadata(plan, workspace, refined),
            time=time,
        )

    return [refinement]
