"""What a search optimises: a summed score, or one quantity (throughput, memory, ...) while summed scores keep to budgets."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from puzzle_dag.config import Objective, Scenario
from puzzle_dag.piece_costs import PieceCosts
from puzzle_dag.search.candidates import Candidates
from puzzle_dag.search.limits import Measure, SumLimit, as_written, make_measure
from puzzle_dag.search.program import Floats, Outcome


@dataclass(frozen=True, slots=True)
class Goal:
    """The objective at one batch size; `measure` is the optimised quantity there, None where scores are minimised."""

    objective: Objective
    measure: Measure | None

    @staticmethod
    def of(scenario: Scenario, costs: PieceCosts, batch: int) -> "Goal":
        """Return the goal at a batch size of the scenario's own target. Raises ScenarioError as `make_measure`."""
        objective = scenario.objective
        if objective.quantity is None:
            return Goal(objective, None)
        at = objective.at
        point = (batch, None) if at is None else (at.batch, at.length)
        return Goal(objective, make_measure(objective.quantity, costs, point[0], length=point[1]))

    def costs(self, candidates: Candidates) -> Floats:
        """Return what each candidate adds to the sum that is minimised."""
        return candidates.costs(self.objective) if self.measure is None else candidates.amounts(self.measure)

    def value(self, candidates: Candidates, chosen: Sequence[int]) -> float:
        """Return what a choice reaches: its summed score, or the quantity."""
        if self.measure is None:
            return candidates.exact_sum(self.costs(candidates), chosen)
        return self.measure.of(candidates.architecture(chosen))

    def bound(self, outcome: Outcome) -> float:
        """Return the proven bound of that value; NaN where nothing was proven."""
        if self.measure is None or outcome.bound != outcome.bound:
            return outcome.bound
        return float(self.measure.value(self.measure.constant + Fraction(outcome.bound)))

    @property
    def is_maximised(self) -> bool:
        """Whether more is better."""
        return self.measure is not None and self.measure.is_rate

    def loss(self, value: float) -> float:
        """Return a value as a number that is the lower the better."""
        return -value if self.is_maximised else value


def quality_budgets(objective: Objective) -> tuple[SumLimit, ...]:
    """Return an objective's budgets of summed scores as limits."""
    return tuple(SumLimit(score, None, as_written(budget.at_most)) for score, budget in objective.subject_to.items())
