"""The two kinds of page: everything about one scenario's child, and all scenarios of a profile side by side."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from puzzle_dag.report.html import Picture, Section, Table, render_page
from puzzle_dag.report.loosened import LoosenedFact, loosened_rows
from puzzle_dag.report.online import load_section, speculation_section
from puzzle_dag.report.pictures import DISTILLATION_LOSSES, architecture_map, loss_curve, retention_bars
from puzzle_dag.report.tables import format_percent, format_quantity, format_seconds
from puzzle_dag.report.trial import trial_section


@dataclass(frozen=True, slots=True, kw_only=True)
class ConstraintFact:
    """One constraint of a scenario, as asked for and as met. All values in the unit that the name says."""

    name: str
    """Name of the constrained quantity, e.g. "throughput_tokens_per_s"."""
    bound: str
    """The bound in words: "at least 1.5 x parent"."""
    limits: Sequence[float]
    """The bound's value, or the lower and the upper one."""
    parent: float
    """The parent's value."""
    predicted: float
    """The child's value as the cost table predicts it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedFact:
    """One quantity measured on the engine, parent and child interleaved."""

    name: str
    """Name of the quantity, e.g. "throughput_tokens_per_s"."""
    parent: float
    """The parent's value."""
    child: float
    """The child's value."""
    predicted: float | None = None
    """What the cost table predicted for the child."""
    ratio: float | None = None
    """Child / parent as measured in turns; by default that of the two values."""
    ratio_low: float | None = None
    """Lower end of the 95 % confidence interval of child / parent."""
    ratio_high: float | None = None
    """Upper end of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskFact:
    """One task's result, parent and child on the same items."""

    task: str
    """lm-eval's name of the task."""
    metric: str
    """What is measured: "acc", "word_perplexity"."""
    parent: float
    """The parent's value."""
    child: float
    """The child's value."""
    retention: float
    """Child / parent, corrected for chance where the task has a chance level."""
    stderr: float
    """Paired standard error of the retention."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PerplexityFact:
    """How well parent and child predict a text; the lower, the better."""

    task: str
    """lm-eval's name of the task."""
    metric: str
    """What is measured: "nats_per_token", "bits_per_byte"."""
    parent: float
    """The parent's value."""
    child: float
    """The child's value."""
    stderr: float
    """Paired standard error of child - parent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScenarioFacts:
    """All that a scenario's page shows."""

    name: str
    """The scenario."""
    profile: str
    """The profile it belongs to."""
    target: str
    """The target it is for."""
    description: str = ""
    """What it is for, in words."""
    constraints: Sequence[ConstraintFact] = ()
    """What was asked for and what is predicted."""
    optimised: str = ""
    """Name of the objective: a score, or the quantity that is optimised within a budget of it."""
    loosened: Sequence[LoosenedFact] = ()
    """What loosening each bound alone buys."""
    solver: Mapping[str, object] = field(default_factory=dict)
    """Status, objective, bound, gap, seconds, batch size, by name."""
    blocks: Sequence[str] = ()
    """Block of each layer."""
    runs: Sequence[str] = ()
    """Names of the runs of layers that were replaced at once."""
    parent_block: str = ""
    """The parent's block."""
    attentions: Sequence[str] = ()
    """Attention variants that were on offer."""
    ffns: Sequence[str] = ()
    """FFN variants that were on offer."""
    trial: Sequence[Mapping[str, Any]] = ()
    """What was tried on the engine before training: a row a child and bound, as `report.trial.trial_section` takes them."""
    trial_words: str = ""
    """What came of that, or why nothing was tried; empty where the profile doesn't ask for a trial."""
    served: Sequence[ServedFact] = ()
    """What the engine measured."""
    command: str = ""
    """What serves the child in the mode and precision of its target."""
    kl: Mapping[str, float] = field(default_factory=dict)
    """KL(parent || child) in nats a held-out token, by stage: "assembled", "uptrained"."""
    tasks: Sequence[TaskFact] = ()
    """What lm-eval measured."""
    perplexities: Sequence[PerplexityFact] = ()
    """What it measured that is no accuracy."""
    uptrain_curves: Mapping[str, Sequence[tuple[float, float]]] = field(default_factory=dict)
    """Loss name -> (tokens, loss) over the distillation."""
    retention_floor: float | None = None
    """Share of the parent's accuracy that the scenario asks for."""
    load: Sequence[Mapping[str, Any]] = ()
    """Parent and child under load: a row a model and concurrency, as `report.online.load_section` takes them."""
    output_length: int = 1
    """Generated tokens a request, on the target."""
    speculation: Mapping[str, Any] = field(default_factory=dict)
    """The child as a draft model of its parent: arguments of `report.online.speculation_section`; empty where nobody tried."""


def render_scenario(facts: ScenarioFacts, *, footer: str = "") -> str:
    """Return the HTML page of one scenario."""
    tried = trial_section(facts.trial, facts.trial_words)
    sections = [_asked(facts), _architecture(facts), tried, _served(facts), _quality(facts), load_section(facts.load, facts.output_length)]
    if facts.speculation:
        sections.append(speculation_section(**facts.speculation))
    subtitle = " · ".join(p for p in (facts.description, f"profile {facts.profile}", f"target {facts.target}") if p)
    return render_page(facts.name, [s for s in sections if s.tables or s.pictures or s.paragraphs], subtitle=subtitle, footer=footer)


def _asked(facts: ScenarioFacts) -> Section:
    rows = [
        (c.name, c.bound, _limits(c), format_quantity(c.name, c.parent), format_quantity(c.name, c.predicted)) for c in facts.constraints
    ]
    tables = [Table(("constraint", "asked for", "limit", "parent", "child, predicted"), rows)] if rows else []
    if facts.solver:
        shown = [f"{v:.6g}" if isinstance(v, float) else str(v) for v in facts.solver.values()]
        tables.append(Table(tuple(facts.solver), [shown], caption="the solver's answer"))
    if rows_of_bounds := loosened_rows(facts.loosened, facts.optimised):
        cells = [tuple(row.values()) for row in rows_of_bounds]
        tables.append(Table(tuple(rows_of_bounds[0]), cells, caption="what loosening each bound alone would buy, by solving again"))
    return Section("What was asked for", tables=tables)


def _limits(fact: ConstraintFact) -> str:
    """Return "1,500 tokens/s", or "100 ms to 200 ms"."""
    return " to ".join(dict.fromkeys(format_quantity(fact.name, limit) for limit in fact.limits))


def _architecture(facts: ScenarioFacts) -> Section:
    if not facts.blocks:
        return Section("The child")
    png = architecture_map(facts.blocks, attentions=facts.attentions, ffns=facts.ffns, parent_block=facts.parent_block, runs=facts.runs)
    return Section("The child", pictures=[Picture(png, "which attention and which FFN every layer took")])


def _served(facts: ScenarioFacts) -> Section:
    rows = []
    for s in facts.served:
        ratio = f"{s.child / s.parent if s.ratio is None else s.ratio:.3f}"
        if s.ratio_low is not None and s.ratio_high is not None:
            ratio += f" ({s.ratio_low:.3f} to {s.ratio_high:.3f})"
        predicted = "" if s.predicted is None else format_quantity(s.name, s.predicted)
        rows.append((s.name, format_quantity(s.name, s.parent), format_quantity(s.name, s.child), ratio, predicted))
    header = ("quantity", "parent", "child", "child / parent (95 % interval)", "child, predicted")
    told = [f"In the mode that its costs were measured in: {facts.command}"] if facts.command else []
    return Section("Served by the engine", paragraphs=told, tables=[Table(header, rows)] if rows else [])


def _quality(facts: ScenarioFacts) -> Section:
    tables, pictures = [], []
    if facts.kl:
        divergences = [(stage, f"{value:.4f}") for stage, value in facts.kl.items()]
        tables.append(Table(("child", "KL(parent || child), nats a token"), divergences))
    if facts.tasks:
        rows = [(t.task, t.metric, f"{t.parent:.3f}", f"{t.child:.3f}", format_percent(t.retention, t.stderr)) for t in facts.tasks]
        tables.append(Table(("task", "metric", "parent", "child", "retention (paired standard error)"), rows))
        png = retention_bars({t.task: (t.retention, t.stderr) for t in facts.tasks}, floor=facts.retention_floor)
        pictures.append(Picture(png, "share of the parent's accuracy that the child keeps"))
    if facts.perplexities:
        header = ("text", "measure, the lower the better", "parent", "child", "child - parent (paired standard error)")
        texts = []
        for p in facts.perplexities:
            texts.append((p.task, p.metric, f"{p.parent:.3f}", f"{p.child:.3f}", f"{p.child - p.parent:+.3f} ± {p.stderr:.3f}"))
        tables.append(Table(header, texts))
    if any(facts.uptrain_curves.values()):
        pictures.append(Picture(loss_curve(facts.uptrain_curves, y=DISTILLATION_LOSSES), "losses of the global distillation"))
    return Section("Quality", tables=tables, pictures=pictures)


def render_overview(
    profile: str,
    *,
    results: Table,
    stages: Mapping[str, float],
    machine: Mapping[str, str],
    frontiers: Sequence[Picture] = (),
    predicted: Sequence[Picture] = (),
    pictures: Sequence[Picture] = (),
    costs: Sequence[Table] = (),
    pages: Sequence[tuple[str, str]] = (),
    footer: str = "",
) -> str:
    """Return the HTML page of a profile.

    Args:
        profile: name of the profile.
        results: the table of results, a row a scenario.
        stages: stage -> seconds.
        machine: what it ran on: name -> value.
        frontiers: pictures of quality against speed, memory and latency, as measured.
        predicted: the same from solutions alone, before any child is trained.
        pictures: further pictures, such as the score heat map.
        costs: what share of the parent's time its blocks take, a table a target.
        pages: (scenario, relative address of its page).
        footer: one line at the end.
    """
    sections = [Section("Results", tables=[results], links=pages)]
    if frontiers:
        sections.append(Section("The frontier: the parent and its children", pictures=frontiers))
    if predicted:
        sections.append(Section("The frontier as predicted, from solutions alone", pictures=predicted))
    if pictures or costs:
        sections.append(Section("What the library and the costs look like", tables=costs, pictures=pictures))
    total = ("all", format_seconds(sum(stages.values())))
    times = Table(("stage", "time"), [*((name, format_seconds(s)) for name, s in stages.items()), total])
    sections.append(Section("Where the time went", tables=[times]))
    sections.append(Section("The machine", tables=[Table(("what", "value"), list(machine.items()))]))
    return render_page(f"puzzle_dag: {profile}", sections, footer=footer)
