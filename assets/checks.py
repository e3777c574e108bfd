"""Asset checks: what must hold of what was made. The blocking ones keep everything that follows from running.

A `blocking` check stops only its own run, so the refresh looks at the latest result of each before it goes on.
"""

import math

import dagster as dg

from assets.checking import Body, check_of, check_result
from assets.children import checkpoint_folder, chosen_architecture, chosen_pieces
from assets.costs import parent_block
from assets.facts import constraints_met, read_chain
from assets.further_checks import further_score_checks
from assets.heldout import heldout_is_predicted
from assets.library import space_from_json
from assets.materialise import table
from assets.plan import Plan
from assets.refinement import chosen_solution
from assets.search import read_costs, read_scores
from assets.served import Verdict, overall_verdict
from assets.speed_checks import costs_are_monotone, serves_as_predicted
from resources.workspace import Workspace

_Check = tuple[str, str, dg.PartitionsDefinition, Body, str]
"""Asset, name, partitions, body, description."""

_VERDICTS: dict[Verdict, str] = {
    "met": "no part of the confidence interval is more than 5 % short",
    "missed": "the whole confidence interval is more than 5 % short",
    "unclear": "the confidence interval straddles the bound: measure more engines, or on a quieter machine",
}


def _library_is_complete(plan: Plan) -> Body:
    def body(context: dg.AssetCheckExecutionContext, workspace: Workspace) -> dg.AssetCheckResult:
        from puzzle_dag.pieces import LayerPieces, PieceMissingError

        value = workspace.shelf.value("block_library", context.partition_key)
        space = space_from_json(workspace.shelf.value("search_space", context.partition_key))
        pieces, missing = LayerPieces.from_json(workspace.store, value["pieces"]), []
        for place, variants in (("attention", space.attentions), ("ffn", space.ffns)):
            for variant in variants:
                try:
                    pieces.digest(place, variant.name)  # type: ignore[arg-type]
                except PieceMissingError:
                    missing.append(f"{place}/{variant.name}")
        losses = [r["loss_trained"] for r in value["reports"]]
        return check_result(
            not missing and all(math.isfinite(x) for x in losses), missing=", ".join(missing) or "none", num_variants=len(losses)
        )

    return body


def _scores_are_sound(plan: Plan) -> Body:
    def body(context: dg.AssetCheckExecutionContext, workspace: Workspace) -> dg.AssetCheckResult:
        rows = workspace.shelf.value("block_scores", context.partition_key)["scores"]
        wrong = [
            r["block"]
            for r in rows
            if not (math.isfinite(r["kl"]) and r["kl"] >= 0 and math.isfinite(r["lm_loss"]) and 0 <= r["top1_agreement"] <= 1)
        ]
        own = next((r for r in rows if r["block"] == parent_block(plan).name), None)
        parent_is_zero = own is not None and own["kl"] == 0 and own["top1_agreement"] == 1
        return check_result(
            not wrong and parent_is_zero, unsound=", ".join(wrong) or "none", parent_is_zero=parent_is_zero, num_pairs=len(rows)
        )

    return body


def _solution_is_feasible(plan: Plan, asset: str) -> Body:
    def body(context: dg.AssetCheckExecutionContext, workspace: Workspace) -> dg.AssetCheckResult:
        """Hold the solutions, added up again from the tables and not by the solver, against all that the scenario asks."""
        from puzzle_dag.config import split_earlier
        from puzzle_dag.search.correction import corrected_scenario, corrections_of_json
        from puzzle_dag.search.recheck import recheck_solutions
        from puzzle_dag.search.solution import Solution

        scenario, earlier = split_earlier(workspace.shelf.value("scenario_spec", context.partition_key))
        value = workspace.shelf.value(asset, context.partition_key)
        solutions = [Solution.from_json(s) for s in (value["solution"], *value.get("pool", ()))]
        is_refined = asset != "solution" and plan.profile.refinement is not None
        asked = (scenario,) if is_refined else (scenario, *earlier.values())
        # A trial solves with other bounds on time: the costs must meet those. What they tighten, the scenario's own is met with.
        solved = corrected_scenario(scenario, corrections_of_json(value.get("corrections", {})))
        found = recheck_solutions(
            read_scores(workspace),
            read_costs(plan, workspace, *(target for one in asked for target in one.targets)),
            solved,
            parent_block(plan),
            solutions,
            earlier=earlier,
            is_refined=is_refined,
        )
        rows = [{"constraint": x.name, "value": x.value, "at_least": x.at_least, "at_most": x.at_most} for x in found.limits]
        return check_result(not found.wrong, wrong="; ".join(found.wrong) or "none", num_solutions=len(solutions), limits=table(rows))

    return body


def _child_is_as_assembled(plan: Plan) -> Body:
    def body(context: dg.AssetCheckExecutionContext, workspace: Workspace) -> dg.AssetCheckResult:
        """Compare the logits of the checkpoint, read back, with those of the child put together in memory."""
        import torch
        from safetensors.torch import load_file

        from puzzle_dag.children.assemble import build_child
        from puzzle_dag.model.checkpoint import load_checkpoint

        solution = chosen_solution(plan, workspace, context.partition_key)
        folder = checkpoint_folder(workspace, "child", workspace.shelf.value("child", context.partition_key))
        rows = load_file(workspace.var / "tokens.safetensors")["heldout"][:2]
        with workspace.device(), torch.inference_mode():
            parent = workspace.load_parent()
            child = build_child(parent, chosen_architecture(solution), chosen_pieces(workspace, solution["choices"]))
            expected = child(input_ids=rows.to(parent.model.device)).logits.float()
            found = load_checkpoint(folder, device=parent.model.device)(input_ids=rows.to(parent.model.device)).logits.float()
        difference = float((expected - found).abs().max())
        return check_result(difference == 0, largest_difference=difference)

    return body


def _retention_is_kept(plan: Plan) -> Body:
    def body(context: dg.AssetCheckExecutionContext, workspace: Workspace) -> dg.AssetCheckResult:
        mean = workspace.shelf.value("accuracy", context.partition_key)["mean"]
        floor = workspace.read_scenario(context.partition_key).retention_floor
        retained = mean["value"]
        shown = (
            {"retention": retained, "stderr": mean["stderr"]}
            if retained is not None
            else {"retention": "undefined: the parent is no better than chance"}
        )
        return check_result(retained is not None and retained >= floor, blocking=False, floor=floor, **shown)

    return body


def _serves_as_asked(plan: Plan) -> Body:
    def body(context: dg.AssetCheckExecutionContext, workspace: Workspace) -> dg.AssetCheckResult:
        rows = constraints_met(workspace, read_chain(plan, workspace, context.partition_key))
        # A scenario may bound nothing that an engine measures (parameters); then there is nothing to miss.
        verdict = overall_verdict(rows)
        severity = dg.AssetCheckSeverity.ERROR if verdict == "missed" else dg.AssetCheckSeverity.WARN
        return dg.AssetCheckResult(
            passed=verdict == "met",
            severity=severity,
            description=_VERDICTS[verdict],
            metadata={"verdict": verdict, "constraints": table(rows)},
        )

    return body


def asset_checks(plan: Plan) -> list[dg.AssetChecksDefinition]:
    """Return the checks of one profile."""
    checks = [
        check_of(plan, asset, name, partitions, body, blocking=blocking, description=description)
        for blocking, checks in ((True, _blocking_checks(plan)), (False, _warning_checks(plan)))
        for asset, name, partitions, body, description in checks
    ]
    return [*checks, *further_score_checks(plan)]


def _blocking_checks(plan: Plan) -> list[_Check]:
    layers, scenarios = plan.partitions.layers, plan.partitions.scenarios
    library, scores, assembled = _library_is_complete(plan), _scores_are_sound(plan), _child_is_as_assembled(plan)
    added_up = "The solutions, added up again, are as the scenario asks: bounds, budgets, structure, pool."
    feasible = [(asset, "feasible", scenarios, _solution_is_feasible(plan, asset), added_up) for asset in plan.solving]
    return [
        ("block_library", "complete", layers, library, "Every variant of the space is there, its loss finite."),
        ("block_scores", "sound", layers, scores, "Scores are finite, and the parent's own block scores 0."),
        *feasible,
        ("child", "as_assembled", scenarios, assembled, "The checkpoint gives the assembled child's logits bit for bit."),
    ]


def _warning_checks(plan: Plan) -> list[_Check]:
    targets, scenarios = plan.partitions.targets, plan.partitions.scenarios
    held_out = (
        "Random models that were no probes: median error at most 3 %, worst 8 %, or 1.2 times the repeat noise. "
        "It passes where none was asked for (`heldout_models` of the target), and says that nothing was checked."
    )
    monotone = "No variant takes less time at a larger batch, beyond the noise of the measurement."
    retention = "Mean retention, corrected for chance, is above the scenario's floor."
    as_asked = "The engine's measurement meets the scenario within 5 %: an error where it can't, a warning where it is unclear."
    as_predicted = "The speed-up that the cost table foretold lies within 10 % beyond the measured 95 % interval."
    return [
        ("block_costs", "held_out", targets, heldout_is_predicted(plan), held_out),
        ("block_costs", "monotone", targets, costs_are_monotone(plan), monotone),
        ("accuracy", "retention", scenarios, _retention_is_kept(plan), retention),
        ("serving", "as_asked", scenarios, _serves_as_asked(plan), as_asked),
        ("serving", "as_predicted", scenarios, serves_as_predicted(plan), as_predicted),
    ]
