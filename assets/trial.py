"""The trial: what was found is run on the engine before it is trained, and searched again where it misses its bounds on time."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import dagster as dg

from assets.costs import parent_architecture, read_cost_table
from assets.drawings import architecture_picture
from assets.materialise import Stopwatch, materialised, table
from assets.plan import Plan
from assets.refinement import REFINED_FROM, REFINING, refine
from assets.search import Question
from puzzle_dag.config import TrialSettings
from puzzle_dag.config.scenario import TIMED
from puzzle_dag.progress import ProgressLog
from puzzle_dag.store import fingerprint
from resources.rows import write_rows
from resources.workspace import Workspace

if TYPE_CHECKING:
    from puzzle_dag.config import Scenario
    from puzzle_dag.costs.trial import Role, Turns
    from puzzle_dag.search.solution import Solution
    from puzzle_dag.search.timed import MeasuredBound, TimedBound

_SHOWN = ("round", "target", "constraint", "batch", "asked", "solved_for", "predicted", "measured", "low", "high", "num_turns", "verdict")


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What a trial hands on."""

    solution: "Solution"
    """What the child is made from; its notes say what was tried."""
    corrections: Mapping[str, float]
    """By how much the bounds were moved that it was solved with."""
    rows: Sequence[Mapping[str, Any]] = ()
    """A row a child and bound; none where no engine was started."""
    measured_over_asked: float | None = None
    """Of the bound that is missed most, or met with least to spare."""


def _triable(workspace: Workspace, question: Question) -> tuple[list[str], list[str]]:
    """Return the targets whose bounds on time this machine can measure, and in words why no others."""
    from puzzle_dag.costs.obtain import is_measurable

    targets, reasons = [], []
    scenario = question.scenario
    for name in dict.fromkeys(bound.target or scenario.target for quantity, bound in scenario.bounds if quantity in TIMED):
        if (source := question.costs[name].source) != "measured":
            reasons.append(f"the costs of {name} are {source}")
        elif not is_measurable(target := read_cost_table(workspace, name).target):
            reasons.append(f"{name} is for other hardware than this machine ({target.hardware})")
        else:
            targets.append(name)
    return targets, reasons if targets or reasons else ["the scenario bounds no time"]


class _Engines:
    """Runs the children of one scenario beside their parent."""

    def __init__(self, plan: Plan, workspace: Workspace, question: Question, targets: Sequence[str], settings: TrialSettings) -> None:
        self._plan, self._workspace, self._question, self._targets, self._settings = plan, workspace, question, targets, settings
        self.peak_bytes = 0
        """Most memory that an engine held."""

    def measure(self, solution: "Solution") -> "tuple[MeasuredBound, ...]":
        """Return the bounds on time as measured; what the store has isn't run again."""
        from puzzle_dag.search.timed import timed_bounds

        question = self._question
        asked = timed_bounds(question.scenario, solution, question.costs, parent_architecture(self._plan), self._targets)
        found = [m for name in self._targets for m in self._measure(solution, name, [bound for bound in asked if bound.target == name])]
        return tuple(sorted(found, key=lambda m: m.asked.index))

    def _measure(self, solution: "Solution", target: str, asked: "Sequence[TimedBound]") -> "list[MeasuredBound]":
        from puzzle_dag.costs.trial import Timed, measure_in_turns
        from puzzle_dag.search.timed import turns_wanted

        settings = self._settings
        models: dict[Role, Timed] = {"child": Timed(solution.architecture, [bound.batch for bound in asked])}
        if batches := [bound.parent_batch for bound in asked if bound.parent_batch is not None]:
            models["parent"] = Timed(parent_architecture(self._plan), batches)
        turns = measure_in_turns(
            self._plan.shape,
            models,
            read_cost_table(self._workspace, target).target,
            self._workspace.store,
            turns=settings.turns,
            repeats=settings.repeats,
            turns_wanted=lambda t: turns_wanted(_read(t, asked), settings.tolerance, settings.turns + settings.further_turns),
            remeasure=self._workspace.anew,
            progress=ProgressLog(f"trial of {solution.scenario}"),
        )
        self.peak_bytes = max(self.peak_bytes, turns.peak_rss_bytes)
        return _read(turns, asked)


def _read(turns: "Turns", asked: "Sequence[TimedBound]") -> "list[MeasuredBound]":
    """Return what engines say of bounds on one target."""
    from puzzle_dag.search.timed import measure_bound

    return [
        measure_bound(
            bound,
            turns.child_s(bound.batch, bound.phase),
            None if bound.parent_batch is None else turns.parent_s(bound.parent_batch, bound.phase),
        )
        for bound in asked
    ]


def _searcher(plan: Plan, workspace: Workspace, question: Question) -> "Callable[[Scenario], Solution]":
    """Return what solves a scenario as the assets before the trial do."""

    def search(scenario: "Scenario") -> "Solution":
        found = question.answer(plan, scenario)[0]
        return found if plan.profile.refinement is None else refine(plan, workspace, found, question, scenario).solution

    return search


def _try(
    plan: Plan, workspace: Workspace, first: "Solution", question: Question, engines: _Engines, settings: TrialSettings, untried: str
) -> _Outcome:
    from puzzle_dag.search.correction import corrections_to_json
    from puzzle_dag.search.trial import as_asked, trial_rows, trial_words, try_scenario

    trial = try_scenario(
        question.scenario,
        first,
        measure=engines.measure,
        search=_searcher(plan, workspace, question),
        rounds=settings.rounds,
        tolerance=settings.tolerance,
    )
    answer, words = trial.answer, trial_words(trial, question.scenario, settings.tolerance)
    solution = as_asked(answer.solution, question.scenario, question.costs, parent_architecture(plan))
    return _Outcome(
        replace(solution, notes={**solution.notes, "trial": "; ".join(part for part in (words, untried) if part)}),
        corrections_to_json(answer.corrections),
        trial_rows(trial, question.scenario, settings.tolerance),
        answer.worst.over_asked,
    )


def _metadata(plan: Plan, workspace: Workspace, outcome: _Outcome) -> dict[str, Any]:
    solution, shown = outcome.solution, (*_SHOWN, "objective", "is_answer", "blocks")
    measured = {} if outcome.measured_over_asked is None else {"measured_over_asked": outcome.measured_over_asked}
    return {
        "trial": solution.notes["trial"],
        "rounds": table([{k: row[k] for k in shown} for row in outcome.rows]),
        **measured,
        "picture": architecture_picture(plan, workspace, [c.block for c in solution.choices], runs=solution.runs, title=solution.scenario),
    }


def trial_assets(plan: Plan) -> list[dg.AssetsDefinition]:
    """Return trial, where the profile asks for it."""
    settings, refinement = plan.profile.trial, plan.profile.refinement
    if settings is None:
        return []
    before = plan.solving[-2]
    stages, refining = ["puzzle_dag.costs.trial", "puzzle_dag.search.trial", "puzzle_dag.search.answer"], refinement is not None

    @dg.asset(
        **plan.options(
            "trial",
            deps=[before, "scenario_spec", "score_table", "cost_table", *(REFINED_FROM if refining else ())],
            stages=[*stages, *(REFINING if refining else ())],
            settings={
                "trial": settings.model_dump(),
                **({"refinement": refinement.model_dump(), "dtype": plan.profile.dtype} if refinement is not None else {}),
            },
            partitions=plan.partitions.scenarios,
            kinds=("vllm", "highs"),
            device=True,
            description="The solution, run on the engine beside the parent before anything is trained, and searched again where it "
            "misses a bound on time.",
        )
    )
    def trial(context: dg.AssetExecutionContext, workspace: Workspace) -> dg.MaterializeResult:
        from puzzle_dag.search.solution import Solution

        time, name = Stopwatch(), context.partition_key
        question = Question.read(plan, workspace, name)
        first = Solution.from_json(workspace.shelf.value(before, name)["solution"])
        targets, reasons = _triable(workspace, question)
        engines, untried = _Engines(plan, workspace, question, targets, settings), f"not tried: {', '.join(reasons)}" if reasons else ""
        outcome = _Outcome(replace(first, notes={**first.notes, "trial": untried}), {})
        if targets:
            with workspace.device():
                time = Stopwatch()
                outcome = _try(plan, workspace, first, question, engines, settings, untried)
        path = workspace.tables / "trial" / f"{name}.parquet"
        path.unlink(missing_ok=True)  # of a former trial, where nothing is tried now
        return materialised(
            context,
            plan,
            workspace,
            {
                "scenario_spec": fingerprint(question.spec),
                "from": first.digest,
                "solution": outcome.solution.to_json(),
                "corrections": dict(outcome.corrections),
                "rows": list(outcome.rows),
            },
            data_version=outcome.solution.digest,
            files=[write_rows(path, list(outcome.rows))] if outcome.rows else [],
            metadata=_metadata(plan, workspace, outcome),
            time=time,
            engine_peak_bytes=engines.peak_bytes,
        )

    return [trial]
