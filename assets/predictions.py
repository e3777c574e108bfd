"""What a target's cost table says of parent and child before either is served, to stand beside what the engine measures."""

from typing import TYPE_CHECKING

from assets.children import chosen_architecture
from assets.costs import parent_architecture
from assets.plan import Plan
from assets.refinement import chosen_solution
from puzzle_dag.piece_costs import Phase
from resources.workspace import Workspace

if TYPE_CHECKING:
    from puzzle_dag.costs.table import CostTable


def predict_seconds(plan: Plan, workspace: Workspace, scenario: str, costs: "CostTable") -> dict[str, dict[int, dict[Phase, float]]]:
    """Return model ("parent", the scenario's child) -> batch size of the table -> phase -> seconds. Raises CostTableError."""
    from puzzle_dag.costs.table import PHASES

    child = chosen_architecture(chosen_solution(plan, workspace, scenario))
    models = {"parent": parent_architecture(plan), scenario: child}
    return {name: {b: {p: costs.seconds(a, b, p) for p in PHASES} for b in costs.batch_sizes} for name, a in models.items()}
