"""Refinement: solutions improved with scores that know what else was replaced; only where the profile asks for it."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import dagster as dg

from assets.drawings import architecture_picture
from assets.library import space_from_json
from assets.materialise import Stopwatch, materialised, picture, table
from assets.plan import Plan
from assets.search import read_costs, read_scores
from puzzle_dag.architecture import layer_key
from puzzle_dag.progress import ProgressLog
from puzzle_dag.store import fingerprint
from resources.rows import write_rows
from resources.workspace import Workspace

if TYPE_CHECKING:
    from puzzle_dag.search.context import Context
    from puzzle_dag.search.refine import Refinement


def chosen_solution(plan: Plan, workspace: Workspace, scenario: str) -> Mapping[str, Any]:
    """Return the solution that a scenario's child is made from: the refined one, where the profile asks for that."""
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
            deps=["solution", "scenario_spec", "score_table", "cost_table", "parent", "parent_activations"],
            stages=["puzzle_dag.search.refine", "puzzle_dag.search.context", "puzzle_dag.search.score", "puzzle_dag.library.activations"],
            settings={"refinement": settings.model_dump(), "dtype": plan.profile.dtype},
            partitions=plan.partitions.scenarios,
            kinds=("pytorch", "highs"),
            device=True,
            description="The solution, improved under the same constraints with scores that are taken inside the child.",
        )
    )
    def refinement(context: dg.AssetExecutionContext, workspace: Workspace) -> dg.MaterializeResult:
        from puzzle_dag.config import split_earlier
        from puzzle_dag.search.refine import refine_solution
        from puzzle_dag.search.solution import Solution

        name = context.partition_key
        spec = workspace.shelf.value("scenario_spec", name)
        scenario, earlier = split_earlier(spec)
        first = Solution.from_json(workspace.shelf.value("solution", name)["solution"])
        costs = read_costs(plan, workspace, *(target for asked in (scenario, *earlier.values()) for target in asked.targets))
        with workspace.device():
            time = Stopwatch()
            refined = refine_solution(
                first,
                read_scores(workspace),
                costs,
                scenario,
                _read_context(plan, workspace, settings.tokens),
                workspace.store,
                num_rounds=settings.rounds,
                earlier=earlier,
                rescore=workspace.anew,
                progress=ProgressLog(f"scores in {name}"),
            )
        change = f"from {refined.losses[0]:.4f} to {refined.losses[-1]:.4f}, as measured"
        notes = {**first.notes, **refined.solution.notes, "refined": change}
        solution = replace(refined.solution, notes=notes)
        rows = [{"scenario": name, **asdict(step)} for step in refined.steps]
        return materialised(
            context,
            plan,
            workspace,
            {"scenario_spec": fingerprint(spec), "from": first.digest, "solution": solution.to_json(), "steps": rows},
            data_version=solution.digest,
            files=[write_rows(workspace.tables / "refinement" / f"{name}.parquet", rows)],
            metadata=_metadata(plan, workspace, refined),
            time=time,
        )

    return [refinement]
