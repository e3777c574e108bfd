"""What is known of a scenario, collected from the shelf.

A chain counts only as far as it hangs together: the grades of a former child are not those of today's. Each record
says which digest it was made from, so that is checked here and not believed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from assets.plan import Plan
from assets.served import constraint_rows, measured_constraints, overall_verdict
from puzzle_dag.store import fingerprint
from resources.workspace import Workspace

if TYPE_CHECKING:
    from puzzle_dag.report.pictures import FrontierPoint


@dataclass(frozen=True, slots=True)
class Chain:
    """The values of one scenario's assets, from its file on, None from the first that is missing or of former times."""

    name: str
    """The scenario."""
    spec: Mapping[str, Any] | None
    searched: Mapping[str, Any] | None
    """What the search found."""
    solution: Mapping[str, Any] | None
    """What the child is made from: the same, or what a refinement and a trial made of it."""
    trial: Mapping[str, Any] | None
    """What the engine said of it and of others before it was made."""
    child: Mapping[str, Any] | None
    uptrained: Mapping[str, Any] | None
    accuracy: Mapping[str, Any] | None
    serving: Mapping[str, Any] | None
    load_curve: Mapping[str, Any] | None
    speculation: Mapping[str, Any] | None


def read_chain(plan: Plan, workspace: Workspace, name: str) -> Chain:
    """Read what there is of a scenario and hangs together."""

    def value(asset: str) -> Mapping[str, Any] | None:
        record = workspace.shelf.find(asset, name)
        return None if record is None else record.value

    def after(above: Mapping[str, Any] | None, asset: str, link: str, digest: Any) -> Mapping[str, Any] | None:
        found = None if above is None else value(asset)
        return found if found is not None and above is not None and found.get(link) == digest(above) else None

    spec = value("scenario_spec")
    solved = after(spec, "solution", "scenario_spec", fingerprint)
    searched = None if solved is None else solved["solution"]
    solution, last = searched, solved
    for asset in plan.solving[1:]:
        last = after(spec, asset, "scenario_spec", fingerprint)
        solution = last["solution"] if last and solution and last["from"] == solution["digest"] else None
    trial = last if plan.chosen == "trial" and solution is not None else None
    child = after(solution, "child", "solution", lambda s: s["digest"])
    uptrained = after(child, "uptrained_child", "child", lambda c: c["digest"])
    accuracy = after(uptrained, "accuracy", "uptrained_child", lambda u: u["digest"])

    def measured(asset: str) -> Mapping[str, Any] | None:
        found = after(uptrained, asset, "uptrained_child", lambda u: u["digest"])
        return found if found is not None and spec is not None and found["target"] == spec["target"] else None

    beyond = (measured(asset) for asset in ("serving", "load_curve", "speculation"))
    return Chain(name, spec, searched, solution, trial, child, uptrained, accuracy, *beyond)


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


def constraints_met(workspace: Workspace, chain: Chain) -> list[dict[str, Any]]:
    """Return the constraints as measured; [] where nothing was served."""
    if chain.serving is None or chain.spec is None or chain.solution is None:
        return []
    target = workspace.target_of(workspace.shelf.value("target_spec", chain.spec["target"]))
    scenario = workspace.scenario_of(dict(chain.spec))
    return constraint_rows(measured_constraints(scenario, target, chain.serving["report"], chain.name, chain.solution["batch"]))


def _measured_ratios(workspace: Workspace, chain: Chain) -> dict[str, float | None]:
    """Return child / parent of latency and memory (weights and KV cache), as served at the batch size that the solution keeps."""
    own, theirs = served_model(chain, chain.name), served_model(chain, "parent")
    if not own or not theirs or chain.spec is None:
        return {"measured_latency_ratio": None, "measured_memory_ratio": None}
    target = workspace.target_of(workspace.shelf.value("target_spec", chain.spec["target"]))
    num_tokens = own["batch"] * (target.input_length + target.output_length)
    memory = [m["weight_bytes"] + num_tokens * m["kv_bytes_per_token"] for m in (own, theirs)]
    return {"measured_latency_ratio": own["total_s"] / theirs["total_s"], "measured_memory_ratio": memory[0] / memory[1]}


def result_row(workspace: Workspace, chain: Chain) -> dict[str, Any]:
    """Return one scenario's results as a flat row; None for what isn't there."""
    solution, served, mean = chain.solution or {}, served_model(chain, chain.name), (chain.accuracy or {}).get("mean", {})
    predicted, speedup, floor = solution.get("predicted", {}), _speedup(chain), (chain.spec or {}).get("retention_floor")
    retained = mean.get("value")
    return {
        "scenario": chain.name,
        "target": (chain.spec or {}).get("target"),
        "batch": solution.get("batch"),
        "objective": solution.get("objective"),
        "costs": None if chain.solution is None else solution.get("notes", {}).get("costs", "measured"),
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
        "constraints_verdict": overall_verdict(constraints_met(workspace, chain)) if chain.serving else None,
        "kl_assembled": (chain.child or {}).get("divergence", {}).get("kl", {}).get("mean"),
        "kl": (chain.uptrained or {}).get("divergence", {}).get("kl", {}).get("mean"),
        "retention": retained,
        "retention_stderr": mean.get("stderr"),
        "retention_floor": floor,
        "retention_met": None if retained is None or floor is None else retained >= floor,
        **_measured_ratios(workspace, chain),
    }


def _point_names(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what stands beside each child: the scenario, with target and batch size where those of the others are not the same."""
    told = {key: len({r[key] for r in rows}) > 1 for key in ("target", "batch")}
    names = []
    for row in rows:
        place = [row["target"]] * told["target"] + [f"batch {row['batch']}"] * told["batch"]
        names.append(f"{row['scenario']} ({', '.join(place)})" if place else row["scenario"])
    return names


def frontier_points(rows: Sequence[Mapping[str, Any]]) -> "list[FrontierPoint]":
    """Return the parent and the children that were served and graded, speed-up against retention."""
    from puzzle_dag.report.pictures import FrontierPoint

    known = [r for r in rows if r["measured_speedup"] is not None and r["retention"] is not None]
    points = [FrontierPoint("parent", 1.0, 1.0, "parent")]
    for name, row in zip(_point_names(known), known, strict=True):
        half = (row["speedup_high"] - row["speedup_low"]) / 2
        points.append(FrontierPoint(name, row["measured_speedup"], row["retention"], "child", half, row["retention_stderr"]))
    return points


def ratio_points(rows: Sequence[Mapping[str, Any]], ratio: str) -> "list[FrontierPoint]":
    """Return the parent and the graded children, a measured ratio to the parent ("measured_memory_ratio") against retention."""
    from puzzle_dag.report.pictures import FrontierPoint

    known = [r for r in rows if r[ratio] is not None and r["retention"] is not None]
    children = [
        FrontierPoint(name, r[ratio], r["retention"], "child", 0.0, r["retention_stderr"])
        for name, r in zip(_point_names(known), known, strict=True)
    ]
    return [FrontierPoint("parent", 1.0, 1.0, "parent"), *children]
