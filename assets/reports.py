"""What came out, for people: the facts of every scenario read from the shelf, as tables and as self-contained HTML pages."""

import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from assets.children import checkpoint_folder, loss_lines
from assets.costs import block_share_rows, parent_architecture, parent_block, read_cost_table
from assets.facts import frontier_points, ratio_points, read_chain, result_row
from assets.online import ALTERNATIVES
from assets.plan import Plan
from assets.predicted import predicted_pictures
from assets.stages import stage_seconds
from puzzle_dag.config import Scenario
from puzzle_dag.costs.comparison import Comparison
from puzzle_dag.report.costs import cost_panels, residual_plot
from puzzle_dag.report.html import Picture, Table
from puzzle_dag.report.loosened import LoosenedFact
from puzzle_dag.report.pictures import frontier, score_heat_map
from puzzle_dag.report.scenario import (
    ConstraintFact,
    PerplexityFact,
    ScenarioFacts,
    ServedFact,
    TaskFact,
    render_overview,
    render_scenario,
)
from puzzle_dag.report.tables import format_percent, format_quantity
from puzzle_dag.store import fingerprint, write_atomically
from resources.rows import read_rows
from resources.workspace import Workspace

_RETENTION = "retention, corrected for chance"
_SIDES = ("at_least", "at_most")
_CAPTION = "predicted by the cost table | measured on the engine, parent and child in turns, with the 95 % confidence interval"


def _constraints(solution: Mapping[str, Any], scenario: Scenario) -> list[ConstraintFact]:
    """Return every constraint with all of its bounds, then the budgets of summed scores."""
    facts = []
    for limit, (name, bound) in zip(solution["limits"], scenario.bounds, strict=True):
        asked = [(side, value) for side in _SIDES if (value := getattr(bound, side)) is not None]
        absolute = " and ".join(f"{side.replace('_', ' ')} {format_quantity(name, value)}" for side, value in asked)
        words = absolute if bound.relative_to is None and bound.equals is None else bound.words
        elsewhere = f" on {limit['target']}" if limit["target"] != scenario.target else ""
        where = f"{elsewhere}, batch {limit['batch']}" + (f", {limit['length']} tokens" if limit["length"] else "")
        limits = [limit[side] for side in _SIDES if limit[side] is not None]
        facts.append(
            ConstraintFact(name=name, bound=f"{words}{where}", limits=limits, parent=limit["parent_value"], predicted=limit["value"])
        )
    for x in solution.get("budgets", ()):
        words = f"at most {format_quantity(x['score'], x['at_most'])}, summed"
        # Scores are of what differs from the parent, whose own are 0.
        facts.append(ConstraintFact(name=x["score"], bound=words, limits=[x["at_most"]], parent=0.0, predicted=x["value"]))
    return facts


def _memory(parent: Mapping[str, Any], child: Mapping[str, Any], solution: Mapping[str, Any], lengths: int) -> ServedFact:
    """Return weights and KV cache at the point of the scenario's memory constraint, else at the batch and lengths that are served."""
    here = (x for x in solution["limits"] if (x["name"], x["target"]) == ("memory_bytes", solution["target"]))
    point = next(here, None)
    batch, length = (point["batch"], point["length"]) if point else (solution["batch"], lengths)
    predicted = point["value"] if point else solution["predicted"]["memory_bytes"]
    own, theirs = (float(m["weight_bytes"] + batch * length * m["kv_bytes_per_token"]) for m in (child, parent))
    return ServedFact(name="memory_bytes", parent=theirs, child=own, predicted=predicted)


def _served(name: str, solution: Mapping[str, Any], served: Mapping[str, Any], lengths: int) -> list[ServedFact]:
    """Return what was measured at the batch size that the solution keeps."""
    report, batch, predicted = served["report"], solution["batch"], solution["predicted"]
    models = {m["model"]: m for m in report["models"] if m["batch"] == batch}
    parent, child = models["parent"], models[name]
    turns = next(s for s in report["speedups"] if (s["child"], s["batch"]) == (name, batch))
    fast, low, high = turns["speedup"], turns["low"], turns["high"]
    slow = {"ratio": 1 / fast, "ratio_low": 1 / high, "ratio_high": 1 / low}
    return [
        ServedFact(
            name="throughput_tokens_per_s",
            parent=parent["throughput_tokens_per_s"],
            child=child["throughput_tokens_per_s"],
            predicted=predicted["throughput_tokens_per_s"],
            ratio=fast,
            ratio_low=low,
            ratio_high=high,
        ),
        ServedFact(name="latency_s", parent=parent["total_s"], child=child["total_s"], predicted=predicted["latency_s"], **slow),
        ServedFact(name="ttft_s", parent=parent["prefill_s"], child=child["prefill_s"], predicted=predicted["ttft_s"]),
        _memory(parent, child, solution, lengths),
    ]


def _tasks(accuracy: Mapping[str, Any]) -> list[TaskFact]:
    return [
        TaskFact(
            task=r["task"],
            metric=r["metric"],
            parent=r["parent"],
            child=r["child"],
            retention=r["corrected"],
            stderr=r["corrected_stderr"] or 0.0,
        )
        for r in accuracy.get("retention", ())
        if r["corrected"] is not None
    ]


def _perplexities(accuracy: Mapping[str, Any]) -> list[PerplexityFact]:
    shown = ("task", "metric", "parent", "child")
    return [PerplexityFact(**{k: p[k] for k in shown}, stderr=p["difference_stderr"]) for p in accuracy.get("perplexities", ())]


def _speculation(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the page tells of a child as a draft model."""
    return {
        "batches": report["batches"],
        "drafted_at_a_time": report["num_draft_tokens"],
        "unsupported": f"{report['unsupported']} {ALTERNATIVES}." if report["unsupported"] else "",
    }


def scenario_facts(plan: Plan, workspace: Workspace, name: str) -> ScenarioFacts | None:
    """Return all that is known of a scenario; None where it has no solution."""
    from puzzle_dag.serving.command import typed_command

    # What is left of former times (the grades of a child that has been replaced) is not reported.
    chain = read_chain(plan, workspace, name)
    solution, spec, healed, served = chain.solution, chain.spec, chain.uptrained, chain.serving
    if solution is None or spec is None:
        return None
    target = workspace.target_of(workspace.shelf.value("target_spec", solution["target"]))
    variants = workspace.shelf.value("cost_variants")
    stages = {"assembled": chain.child, "uptrained": healed}
    return ScenarioFacts(
        name=name,
        profile=plan.profile.name,
        target=solution["target"],
        description=spec.get("description", ""),
        constraints=_constraints(solution, workspace.scenario_of(dict(spec))),
        optimised=str(solution["notes"].get("optimised", solution["minimized"])),
        loosened=[LoosenedFact.of(entry) for entry in solution.get("loosened", ())],
        # An optimised quantity's bound and gap are in the notes.
        solver={
            **{k: solution[k] for k in ("status", "objective", "bound", "gap", "batch", "seconds")},
            "costs": "measured",
            **{k: v for k, v in solution["notes"].items() if k != "trial"},
        },
        blocks=[c["block"] for c in solution["choices"]],
        runs=list(dict.fromkeys(c["run"] for c in solution["choices"] if c.get("run"))),
        parent_block=parent_block(plan).name,
        attentions=variants["attention"],
        ffns=variants["ffn"],
        trial=chain.trial["rows"] if chain.trial else (),
        trial_words=str(solution["notes"].get("trial", "")),
        served=_served(name, solution, served, target.input_length + target.output_length) if served else (),
        command=typed_command(checkpoint_folder(workspace, "uptrained_child", healed), target) if healed else "",
        kl={stage: value["divergence"]["kl"]["mean"] for stage, value in stages.items() if value},
        tasks=_tasks(chain.accuracy or {}),
        perplexities=_perplexities(chain.accuracy or {}),
        uptrain_curves=loss_lines(healed["curve"]) if healed else {},
        retention_floor=spec.get("retention_floor"),
        load=chain.load_curve["curve"]["levels"] if chain.load_curve else (),
        output_length=target.output_length,
        speculation=_speculation(chain.speculation["report"]) if chain.speculation else {},
    )


def _interval(fact: ServedFact) -> str:
    ratio = fact.child / fact.parent if fact.ratio is None else fact.ratio
    low_high = f" ({fact.ratio_low:.2f} to {fact.ratio_high:.2f})" if fact.ratio_low is not None and fact.ratio_high is not None else ""
    return f"{format_quantity(fact.name, fact.child)}, {ratio:.2f} x{low_high}"


def results_table(plan: Plan, workspace: Workspace, facts: Sequence[ScenarioFacts]) -> Table:
    """Return the table of results, a column a scenario: what was predicted, what was measured, what was kept."""
    columns = []
    for fact in facts:
        mean = (read_chain(plan, workspace, fact.name).accuracy or {}).get("mean", {})
        asked = "; ".join(f"{c.name} {c.bound}" for c in fact.constraints)
        cells = {"asked for": asked, "target, batch": f"{fact.target}, {fact.solver['batch']}", "costs": str(fact.solver["costs"])}
        for s in fact.served:
            short = s.name.removesuffix("_tokens_per_s").removesuffix("_bytes").removesuffix("_s")
            if s.name != "ttft_s":
                cells[f"{short}, parent"] = format_quantity(s.name, s.parent)
                cells[f"{short}, predicted"] = "" if s.predicted is None else format_quantity(s.name, s.predicted)
                cells[f"{short}, measured"] = _interval(s)
        cells |= {f"KL {stage} (nats a token)": f"{kl:.4f}" for stage, kl in fact.kl.items()}
        cells |= {f"retention {t.task}": format_percent(t.retention, t.stderr) for t in fact.tasks}
        if mean.get("value") is not None:
            cells["retention, mean"] = format_percent(mean["value"], mean["stderr"])
        cells |= {f"{p.metric} {p.task} (parent)": f"{p.child:.3f} ({p.parent:.3f})" for p in fact.perplexities}
        columns.append(cells)
    names = list(dict.fromkeys(name for cells in columns for name in cells))
    return Table(("", *(f.name for f in facts)), [(n, *(cells.get(n, "not run") for cells in columns)) for n in names], caption=_CAPTION)


def _cost_tables(plan: Plan, workspace: Workspace) -> list[Table]:
    """Return of every target that has costs what share of the parent's time its blocks take."""
    tables = []
    for target in workspace.shelf.value("cost_table")["targets"]:
        shares = block_share_rows(read_cost_table(workspace, target), parent_architecture(plan))
        rows = [(f"{row.pop('batch'):.0f}", *(format_percent(share) for share in row.values())) for row in shares]
        caption = f"{target}: how much of the parent's time its blocks take; the rest no other block can save"
        tables.append(Table(("batch", "of prefill", "of decode", "of both"), rows, caption=caption))
    return tables


def _pictures(workspace: Workspace) -> list[Picture]:
    """Return the score heat map, and of every target that has costs their panels and residuals."""
    layers: dict[int, dict[str, float]] = {}
    for row in read_rows(workspace.tables / "score_table.parquet"):
        layers.setdefault(row["layer"], {})[row["block"]] = row["kl"]
    drawn = [Picture(score_heat_map([layers[i] for i in sorted(layers)]), "KL divergence of every block, alone in the parent")]
    for target in workspace.shelf.value("cost_table")["targets"]:
        costs = read_cost_table(workspace, target)
        drawn.append(
            Picture(
                cost_panels(costs.rows, title=f"{target}: {costs.source} seconds a layer"), "cost against batch size, a panel a variant"
            )
        )
        compared = workspace.tables / "predictions" / f"{target}.parquet"
        if compared.exists():
            png = residual_plot([Comparison(**r) for r in read_rows(compared)], title=target)
            drawn.append(Picture(png, f"how far the costs on {target} are from what was measured"))
    return drawn


def frontier_pictures(rows: list[dict[str, Any]]) -> dict[str, bytes]:
    """Return quality against speed, memory and latency, as measured, by name."""
    parent = "(parent at the same target and batch size = 1)"
    return {
        "quality_against_speed": frontier(frontier_points(rows), x=f"throughput {parent}", y=_RETENTION),
        "quality_against_memory": frontier(ratio_points(rows, "measured_memory_ratio"), x=f"weights and KV cache {parent}", y=_RETENTION),
        "quality_against_latency": frontier(ratio_points(rows, "measured_latency_ratio"), x=f"latency {parent}", y=_RETENTION),
    }


def read_commit(root: Path) -> str:
    """Return the checkout's commit, with "+" where files differ from it, or "unknown"."""
    git = ["git", "-C", str(root)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    if head.returncode:
        return "unknown"
    changed = subprocess.run([*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True, check=False)
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def _served_on(plan: Plan, workspace: Workspace, names: Sequence[str]) -> dict[str, str]:
    """Return the machines and engines that parent and children were served on, as the measurements say."""
    reports = [chain.serving["report"] for chain in (read_chain(plan, workspace, n) for n in names) if chain.serving]
    found = {what: sorted({str(r[key]) for r in reports}) for what, key in (("hardware", "hardware"), ("engine", "engine_version"))}
    return {what: ", ".join(values) or "nothing was served" for what, values in found.items()}


def write_pages(plan: Plan, workspace: Workspace, scenarios: Sequence[str]) -> list[Path]:
    """Write the page of all and one for each scenario that has a solution; return their paths, the former's first."""
    facts = [f for f in (scenario_facts(plan, workspace, n) for n in scenarios) if f is not None]
    machine = _served_on(plan, workspace, scenarios)
    footer = "; ".join([f"commit {read_commit(plan.root)}", *machine.values()])
    index = write_reports(plan, workspace, facts, machine=machine, footer=footer)
    return [index, *(index.parent / f"{f.name}.html" for f in facts)]


def write_reports(
    plan: Plan, workspace: Workspace, facts: Sequence[ScenarioFacts], *, machine: Mapping[str, str], footer: str = ""
) -> Path:
    """Write a page a scenario and one for all to var/PROFILE/reports; return the latter's path. Nothing new, nothing written."""
    folder = workspace.var / "reports"
    index, results, stages = folder / "index.html", results_table(plan, workspace, facts), stage_seconds(workspace)
    records = [workspace.shelf.find(name) for name in ("score_table", "cost_table")]
    foreseen = workspace.shelf.find("predicted_frontier")
    content = [repr(facts), repr(results), stages, footer, [r.data_version for r in (*records, foreseen) if r]]
    stamp, pages = folder / "stamp", [index, *(folder / f"{f.name}.html" for f in facts)]
    if all(p.exists() for p in (*pages, stamp)) and stamp.read_text() == fingerprint(content):
        return index
    for fact in facts:
        write_atomically(folder / f"{fact.name}.html", render_scenario(fact, footer=footer))
    rows = [result_row(workspace, read_chain(plan, workspace, f.name)) for f in facts]
    against = [Picture(png, name.replace("_", " ")) for name, png in frontier_pictures(rows).items()]
    page = render_overview(
        plan.profile.name,
        results=results,
        stages=stages,
        frontiers=against,
        predicted=list(predicted_pictures(foreseen.value["rows"] if foreseen else ()).values()),
        machine=machine,
        pictures=_pictures(workspace) if all(records) else (),
        costs=_cost_tables(plan, workspace) if all(records) else (),
        pages=[(f.name, f"{f.name}.html") for f in facts],
        footer=footer,
    )
    write_atomically(index, page)
    write_atomically(stamp, fingerprint(content))
    return index
