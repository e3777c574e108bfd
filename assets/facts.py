"""All that is known of a scenario, collected from the shelf: for the frontier, the reports and the demo's table.

A chain counts only as far as it hangs together: the grades of a former child are not those of today's. Each record
says which digest it was made from, so that is checked here and not believed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from assets.children import loss_lines
from assets.costs import parent_block
from assets.plan import Plan
from assets.served import constraint_rows, measured_constraints
from puzzle_dag.config import Bound
from puzzle_dag.report.pictures import FrontierPoint
from puzzle_dag.report.scenario import ConstraintFact, ScenarioFacts, ServedFact, TaskFact
from puzzle_dag.store import fingerprint
from resources.workspace import Workspace


@dataclass(frozen=True, slots=True)
class Chain:
    """The values of one scenario's assets, from its file on, None from the first that is missing or of former times."""

    name: str
    """The scenario."""
    spec: Mapping[str, Any] | None
    solution: Mapping[str, Any] | None
    child: Mapping[str, Any] | None
    uptrained: Mapping[str, Any] | None
    accuracy: Mapping[str, Any] | None
    serving: Mapping[str, Any] | None


def read_chain(workspace: Workspace, name: str) -> Chain:
    """Read what there is of a scenario and hangs together."""

    def value(asset: str) -> Mapping[str, Any] | None:
        record = workspace.shelf.find(asset, name)
        return None if record is None else record.value

    def after(above: Mapping[str, Any] | None, asset: str, link: str, digest: Any) -> Mapping[str, Any] | None:
        found = None if above is None else value(asset)
        return found if found is not None and above is not None and found[link] == digest(above) else None

    spec = value("scenario_spec")
    solved = after(spec, "solution", "scenario_spec", fingerprint)
    solution = None if solved is None else solved["solution"]
    child = after(solution, "child", "solution", lambda s: s["digest"])
    uptrained = after(child, "uptrained_child", "child", lambda c: c["digest"])
    accuracy = after(uptrained, "accuracy", "uptrained_child", lambda u: u["digest"])
    serving = after(uptrained, "serving", "uptrained_child", lambda u: u["digest"])
    if serving is not None and spec is not None and serving["target"] != spec["target"]:
        serving = None
    return Chain(name, spec, solution, child, uptrained, accuracy, serving)


def _speedup(chain: Chain) -> Mapping[str, Any]:
    if chain.serving is None or chain.solution is None:
        return {}
    found: Mapping[str, Any] = next(s for s in chain.serving["report"]["speedups"] if s["batch"] == chain.solution["batch"])
    return found


def served_model(chain: Chain, model: str) -> Mapping[str, Any]:
    """Return the measurement of "parent" or of the child at the batch size that the solution keeps; {} where there is none."""
    if chain.serving is None or chain.solution is None:
        return {}
    batch = chain.solution["batch"]
    found: Mapping[str, Any] = next(m for m in chain.serving["report"]["models"] if m["model"] == model and m["batch"] == batch)
    return found


def constraints_met(plan: Plan, workspace: Workspace, chain: Chain) -> list[dict[str, Any]]:
    """Return the constraints as measured; [] where nothing was served."""
    if chain.serving is None or chain.spec is None or chain.solution is None:
        return []
    target = workspace.target_of(workspace.shelf.value("target_spec", chain.spec["target"]))
    scenario = workspace.scenario_of(dict(chain.spec))
    return constraint_rows(measured_constraints(scenario, target, chain.serving["report"], chain.name, chain.solution["batch"]))


def result_row(plan: Plan, workspace: Workspace, chain: Chain) -> dict[str, Any]:
    """Return one scenario's results as a flat row; None for what isn't there."""
    solution, served, mean = chain.solution or {}, served_model(chain, chain.name), (chain.accuracy or {}).get("mean", {})
    predicted, speedup, floor = solution.get("predicted", {}), _speedup(chain), (chain.spec or {}).get("retention_floor")
    retained = mean.get("value")
    return {
        "scenario": chain.name,
        "target": (chain.spec or {}).get("target"),
        "batch": solution.get("batch"),
        "objective": solution.get("objective"),
        "predicted_throughput_tokens_per_s": predicted.get("throughput_tokens_per_s"),
        "measured_throughput_tokens_per_s": served.get("throughput_tokens_per_s"),
        "predicted_latency_s": predicted.get("latency_s"),
        "measured_latency_s": served.get("total_s"),
        "predicted_speedup": speedup.get("predicted"),
        "measured_speedup": speedup.get("speedup"),
        "speedup_low": speedup.get("low"),
        "speedup_high": speedup.get("high"),
        "memory_bytes": predicted.get("memory_bytes"),
        "parameters": predicted.get("parameters"),
        "parent_parameters": solution.get("parent", {}).get("parameters"),
        "constraints_met": all(c["met"] for c in constraints_met(plan, workspace, chain)) if chain.serving else None,
        "kl_assembled": (chain.child or {}).get("divergence", {}).get("kl", {}).get("mean"),
        "kl": (chain.uptrained or {}).get("divergence", {}).get("kl", {}).get("mean"),
        "retention": retained,
        "retention_stderr": mean.get("stderr"),
        "retention_floor": floor,
        "retention_met": None if retained is None or floor is None else retained >= floor,
    }


def _bound_words(bound: Bound) -> str:
    side = f"at least {bound.at_least:g}" if bound.at_least is not None else f"at most {bound.at_most:g}"
    return side + (" x the parent's" if bound.relative_to else "")


def _constraint_facts(workspace: Workspace, chain: Chain) -> list[ConstraintFact]:
    if chain.solution is None or chain.spec is None:
        return []
    bounds = {str(n): b for n, b in workspace.scenario_of(dict(chain.spec)).constraints.items()}
    return [
        ConstraintFact(
            name=limit["name"],
            bound=_bound_words(bounds[limit["name"]]),
            limit=limit["at_least"] if limit["at_least"] is not None else limit["at_most"],
            parent=limit["parent_value"],
            predicted=limit["value"],
        )
        for limit in chain.solution["limits"]
    ]


def _served_facts(chain: Chain) -> list[ServedFact]:
    child, parent, speedup = served_model(chain, chain.name), served_model(chain, "parent"), _speedup(chain)
    if not child:
        return []
    total_s = child["predicted_s"]
    tokens = child["throughput_tokens_per_s"] * child["total_s"]
    return [
        ServedFact(
            name="throughput_tokens_per_s",
            parent=parent["throughput_tokens_per_s"],
            child=child["throughput_tokens_per_s"],
            predicted=None if total_s is None else tokens / total_s,
            ratio_low=speedup["low"],
            ratio_high=speedup["high"],
        ),
        ServedFact(name="latency_s", parent=parent["total_s"], child=child["total_s"], predicted=total_s),
        ServedFact(name="ttft_s", parent=parent["prefill_s"], child=child["prefill_s"]),
        ServedFact(name="weight_bytes", parent=parent["weight_bytes"], child=child["weight_bytes"]),
        ServedFact(name="kv_bytes_per_token", parent=parent["kv_bytes_per_token"], child=child["kv_bytes_per_token"]),
    ]


def scenario_facts(plan: Plan, workspace: Workspace, chain: Chain) -> ScenarioFacts:
    """Return what a scenario's page shows."""
    solution, variants = chain.solution or {}, workspace.shelf.value("cost_variants")
    kls = {"assembled": chain.child, "uptrained": chain.uptrained}
    return ScenarioFacts(
        name=chain.name,
        profile=plan.profile.name,
        target=(chain.spec or {}).get("target", ""),
        description=(chain.spec or {}).get("description", ""),
        constraints=_constraint_facts(workspace, chain),
        solver={k: solution[k] for k in ("status", "objective", "bound", "gap", "batch", "seconds")} if solution else {},
        blocks=[c["block"] for c in solution.get("choices", [])],
        parent_block=parent_block(plan).name,
        attentions=variants["attention"],
        ffns=variants["ffn"],
        served=_served_facts(chain),
        kl={stage: value["divergence"]["kl"]["mean"] for stage, value in kls.items() if value},
        tasks=[
            TaskFact(task=r["task"], metric=r["metric"], parent=r["parent"], child=r["child"], retention=r["corrected"], stderr=r["corrected_stderr"])
            for r in (chain.accuracy or {}).get("retention", [])
            if r["corrected"] is not None
        ],
        uptrain_curves=loss_lines(chain.uptrained["curve"]) if chain.uptrained else {},
        retention_floor=(chain.spec or {}).get("retention_floor"),
    )


def frontier_points(rows: list[dict[str, Any]]) -> list[FrontierPoint]:
    """Return the parent and the children that were served and graded, speed-up against retention."""
    points = [FrontierPoint("parent", 1.0, 1.0, "parent")]
    for row in rows:
        if row["measured_speedup"] is not None and row["retention"] is not None:
            half = (row["speedup_high"] - row["speedup_low"]) / 2
            points.append(FrontierPoint(row["scenario"], row["measured_speedup"], row["retention"], "child", half, row["retention_stderr"]))
    return points


def stage_seconds(plan: Plan, workspace: Workspace, partitions: Mapping[str, list[str | None]]) -> dict[str, float]:
    """Return the seconds of each asset's latest materialisations, summed over its partitions; those under 0.1 s left out."""
    sums = {a: sum(r.seconds for p in keys if (r := workspace.shelf.find(a, p)) is not None) for a, keys in partitions.items()}
    return {asset: seconds for asset, seconds in sums.items() if seconds >= 0.1}
