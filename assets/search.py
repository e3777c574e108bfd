"""The search: for each scenario the architecture that costs least quality and meets every constraint."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import dagster as dg

from assets.costs import parent_block, read_cost_table
from assets.materialise import Stopwatch, materialised, picture, table
from assets.plan import Plan
from assets.run_scores import read_run_scores
from puzzle_dag.piece_costs import PieceCosts, weakest_source
from puzzle_dag.report.loosened import LoosenedFact, loosened_rows
from puzzle_dag.store import fingerprint
from resources.rows import read_rows, write_rows
from resources.workspace import Workspace

if TYPE_CHECKING:
    from puzzle_dag.config import Scenario
    from puzzle_dag.search.infeasible import InfeasibleScenarioError
    from puzzle_dag.search.score import BlockScore
    from puzzle_dag.search.solution import Solution


class CostsMissingError(ValueError):
    """A scenario's target has no costs that are of today."""


class InfeasibleFailure(dg.Failure, ValueError):
    """No architecture meets a scenario; the UI shows what conflicts and the nearest that can be met. A ValueError: never retried."""


def read_scores(workspace: Workspace) -> list[list["BlockScore"]]:
    """Return the score table, a list a layer, with the runs that begin there; columns beside the losses are scores on lm-eval tasks."""
    from puzzle_dag.search.task_scores import score_of_row

    layers: dict[int, list[BlockScore]] = {}
    for row in read_rows(workspace.tables / "score_table.parquet"):
        layers.setdefault(row["layer"], []).append(score_of_row(row))
    for run in read_run_scores(workspace):
        layers[run.layer].append(run)
    return [layers[i] for i in sorted(layers)]


def read_costs(plan: Plan, workspace: Workspace, *targets: str) -> dict[str, PieceCosts]:
    """Return the costs of all targets that are up to date, as the search sees them.

    Raises:
        CostsMissingError: one of `targets` has none; says how to get them.
        EngineDisagreementError: they were measured with another engine than serves, and the target is strict.
    """
    from puzzle_dag.costs.agreement import check_agreement, find_serving_version

    names = workspace.shelf.value("cost_table")["targets"]
    for target in targets:
        if target not in names:
            how = f"`python -m assets refresh --profile {plan.profile.name}`"
            raise CostsMissingError(
                f"target {target} has no costs of today; {how} measures it (block_costs[{target}]), or says why it can't"
            )
    tables = {name: read_cost_table(workspace, name) for name in names}
    for target in targets:
        check_agreement(tables[target], tables[target].target, find_serving_version(tables[target].target))
    return {n: t.to_piece_costs(plan.shape) for n, t in tables.items()}


def check_source(workspace: Workspace, scenario: "Scenario", costs: PieceCosts) -> None:
    """Check that a scenario accepts costs like these. Raises CostsMissingError, with what to do."""
    from puzzle_dag.costs.obtain import explain_unmeasured

    if costs.source == "analytic" and scenario.costs != "analytic":
        target = workspace.target_of(workspace.shelf.value("target_spec", costs.target))
        raise CostsMissingError(f"scenario {scenario.name}: {explain_unmeasured(target)}")


@dataclass(frozen=True, slots=True)
class Question:
    """A scenario and all that it is answered from."""

    spec: Mapping[str, Any]
    """The scenario as its record says it."""
    scenario: "Scenario"
    """The same, read."""
    earlier: "Mapping[str, Scenario]"
    """Those that it must differ from, by name."""
    scores: "list[list[BlockScore]]"
    """The score table."""
    costs: Mapping[str, PieceCosts]
    """The costs of all targets, by name."""

    @staticmethod
    def read(plan: Plan, workspace: Workspace, name: str) -> "Question":
        """Read a scenario's. Raises CostsMissingError, EngineDisagreementError as `read_costs`."""
        from puzzle_dag.config import split_earlier

        spec = workspace.shelf.value("scenario_spec", name)
        scenario, earlier = split_earlier(spec)
        costs = read_costs(plan, workspace, *(target for asked in (scenario, *earlier.values()) for target in asked.targets))
        return Question(spec, scenario, earlier, read_scores(workspace), costs)

    def answer(self, plan: Plan, scenario: "Scenario | None" = None) -> "list[Solution]":
        """Solve the scenario, or another for the same targets; the solutions say what their costs are. Raises ScenarioError."""
        from puzzle_dag.search.answer import answer_scenario

        found = answer_scenario(self.scores, self.costs, scenario or self.scenario, parent_block(plan), earlier=self.earlier)
        source = weakest_source(self.costs[target].source for target in self.scenario.targets)
        return [replace(s, notes={**s.notes, "costs": source}) for s in found]


def solution_row(solution: "Solution") -> dict[str, Any]:
    """Return a solution as one flat row."""
    predicted = {f"predicted_{k}": v for k, v in solution.predicted.items()}
    parent = {f"parent_{k.removeprefix('parent_')}": v for k, v in solution.parent.items()}
    head = {k: getattr(solution, k) for k in ("scenario", "target", "status", "minimized", "objective", "bound", "gap", "batch", "seconds")}
    return {
        **head,
        "costs": solution.notes.get("costs", "measured"),
        **predicted,
        **parent,
        "blocks": " ".join(c.block for c in solution.choices),
        "runs": " ".join(solution.runs),
        "digest": solution.digest,
    }


def pool_rows(solutions: "list[Solution]") -> list[dict[str, Any]]:
    """Return a pool as rows, the best first, with the layers in which each differs from the best."""
    best = solutions[0].architecture
    return [
        {"rank": rank, "num_different_layers": sum(a != b for a, b in zip(found.architecture, best, strict=True)), **solution_row(found)}
        for rank, found in enumerate(solutions, start=1)
    ]


def _limit_rows(solution: "Solution") -> list[dict[str, Any]]:
    rows = [
        {
            "constraint": x.name,
            "target": x.target,
            "batch": x.batch,
            "at_least": x.at_least,
            "at_most": x.at_most,
            "predicted": x.value,
            "parent": x.parent_value,
        }
        for x in solution.limits
    ]
    quality = [{"constraint": b.score, "at_most": b.at_most, "predicted": b.value, "parent": 0.0} for b in solution.budgets]
    return [*rows, *({name: row.get(name) for name in (rows or quality)[0]} for row in quality)]


def _loosened_rows(solution: "Solution") -> list[dict[str, str]]:
    facts = [LoosenedFact.of(asdict(entry)) for entry in solution.loosened]
    return loosened_rows(facts, str(solution.notes.get("optimised", solution.minimized)))


def _pool_table(solutions: "list[Solution]") -> list[dict[str, Any]]:
    shown = ("rank", "objective", "batch", "num_different_layers", "predicted_throughput_tokens_per_s", "predicted_memory_bytes", "blocks")
    return [{k: row[k] for k in shown} for row in pool_rows(solutions)]


def _metadata(plan: Plan, workspace: Workspace, solutions: "list[Solution]") -> dict[str, Any]:
    from puzzle_dag.report.pictures import architecture_map

    variants, solution = workspace.shelf.value("cost_variants"), solutions[0]
    drawn = architecture_map(
        [c.block for c in solution.choices],
        attentions=variants["attention"],
        ffns=variants["ffn"],
        parent_block=parent_block(plan).name,
        runs=solution.runs,
        title=solution.scenario,
    )
    proven = {"bound": solution.notes.get("bound", solution.bound), "gap": solution.notes.get("gap", solution.gap)}
    optimised = {str(solution.notes["optimised"]): solution.notes["value"]} if "optimised" in solution.notes else {}
    batches = [{**asdict(b), "batch_elsewhere": ", ".join(f"{t} {n}" for t, n in b.batch_elsewhere.items())} for b in solution.batches]
    return {
        "status": solution.status,
        "costs": solution.notes["costs"],
        **optimised,
        "minimized": solution.minimized,
        "objective": solution.objective,
        **{k: "not proven" if v is None else v for k, v in proven.items()},
        "solve_seconds": solution.seconds,
        "batch": solution.batch,
        **{f"batch on {target}": batch for target, batch in solution.batch_elsewhere.items()},
        "constraints": table(_limit_rows(solution)),
        "what loosening buys": table(_loosened_rows(solution)),
        "programs": table(batches),
        "pool": table(_pool_table(solutions)),
        "architecture": table([{"layer": c.layer, "block": c.block, "score": c.score, "run": c.run} for c in solution.choices]),
        "picture": picture(drawn, "the architecture"),
    }


def _failure(error: "InfeasibleScenarioError") -> InfeasibleFailure:
    return InfeasibleFailure(
        str(error), {"conflicting": ", ".join(error.conflicting), "nearest": table(list(error.rows))}, allow_retries=False
    )


def search_assets(plan: Plan) -> list[dg.AssetsDefinition]:
    """Return solution."""

    @dg.asset(
        **plan.options(
            "solution",
            deps=["scenario_spec", "score_table", "cost_table"],
            stages=["puzzle_dag.search.answer"],
            partitions=plan.partitions.scenarios,
            kinds=("highs",),
            description="The chosen block of every layer, proven by HiGHS, and what each constraint costs in quality.",
        )
    )
    def solution(context: dg.AssetExecutionContext, workspace: Workspace) -> dg.MaterializeResult:
        from puzzle_dag.search.infeasible import InfeasibleScenarioError

        time, name = Stopwatch(), context.partition_key
        question = Question.read(plan, workspace, name)
        for target in question.scenario.targets:
            check_source(workspace, question.scenario, question.costs[target])
        try:
            found = question.answer(plan)
        except InfeasibleScenarioError as error:
            raise _failure(error) from error
        return materialised(
            context,
            plan,
            workspace,
            {"scenario_spec": fingerprint(question.spec), "solution": found[0].to_json(), "pool": [s.to_json() for s in found[1:]]},
            data_version=found[0].digest,
            files=[
                write_rows(workspace.tables / "solutions" / f"{name}.parquet", [solution_row(found[0])]),
                write_rows(workspace.tables / "solution_pools" / f"{name}.parquet", pool_rows(found)),
            ],
            metadata=_metadata(plan, workspace, found),
            time=time,
        )

    return [solution]
