"""Small instances with all that a scenario can ask for: several targets, equalities, structure, weights, budgets; by brute force."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from fnmatch import fnmatchcase
from fractions import Fraction
from itertools import product
from math import ceil

from hypothesis import strategies as st
from search_instances import BATCHES, NAMES, PARENT, instances, make_costs, plain_value

from puzzle_dag.architecture import Architecture, Block
from puzzle_dag.config import Bound, Scenario
from puzzle_dag.piece_costs import PieceCosts
from puzzle_dag.search.score import BlockScore
from puzzle_dag.search.task_scores import GradedBlockScore

Table = list[list[BlockScore]]
Instance = tuple[Table, dict[str, PieceCosts], Scenario]
COUNTS = ("parameters", "kv_bytes_per_token", "num_attention_layers")
PATTERNS = ("kv4/*", "*/noop", "noop/*", "*/w64", "*")


@st.composite
def bounds(draw: st.DrawFn, name: str) -> dict[str, object]:
    value = draw(st.integers(1, 60)) / draw(st.sampled_from([1, 8]))
    relative = draw(st.booleans())
    if relative:
        value = draw(st.sampled_from([0.5, 0.7, 0.9, 1.0, 1.2]))
    kind = draw(st.sampled_from(["at_least", "at_most", "at_most", "equals"]))
    bound: dict[str, object] = {kind: value}
    if kind == "equals":
        bound["equals"] = draw(st.integers(0, 3)) if name == "num_attention_layers" and not relative else value
        if name not in COUNTS or draw(st.booleans()):
            bound["within"] = draw(st.sampled_from([0.1, 0.25, 0.5]))
    if relative:
        bound["relative_to"] = "parent"
    if draw(st.integers(0, 2)) == 0:
        bound["target"] = "u"
    return bound


@st.composite
def objectives(draw: st.DrawFn) -> dict[str, object]:
    budget = {draw(st.sampled_from(["kl", "lm_loss", "quiz"])): {"at_most": draw(st.integers(0, 20)) / 8}}
    form = draw(st.sampled_from(["word", "weights", "quantity"]))
    if form == "quantity":
        word, name = draw(
            st.sampled_from([("maximize", "throughput"), ("minimize", "memory"), ("minimize", "ttft"), ("minimize", "parameters")])
        )
        return {word: name, "subject_to": budget}
    objective: dict[str, object] = {"minimize": draw(st.sampled_from(["kl", "lm_loss", "top1_loss"]))}
    if form == "weights":
        objective = {"minimize": {"kl": 2.0, "quiz": draw(st.sampled_from([0.5, -0.25])), "top1_loss": 1.0}}
    return {**objective, **({"subject_to": budget} if draw(st.integers(0, 3)) == 0 else {})}


@st.composite
def structures(draw: st.DrawFn, names: list[str]) -> dict[str, object]:
    """Of `names`, the first layer's blocks, one may be forbidden."""
    if draw(st.booleans()):
        return {}
    return {
        "fixed": draw(st.dictionaries(st.just(0), st.sampled_from(PATTERNS))),
        "forbidden": draw(st.dictionaries(st.sampled_from(["all", 0]), st.tuples(st.sampled_from(names)))),
        "homogeneous": draw(st.integers(0, 5)) == 0,
        "max_distinct": draw(st.sampled_from([None, 2])),
    }


@st.composite
def wide_instances(draw: st.DrawFn) -> Instance:
    table, costs, plain = draw(instances())
    graded: Table = [[GradedBlockScore(**asdict(s), tasks={"quiz": draw(st.integers(0, 8)) / 8}) for s in scores] for scores in table]
    constraints: dict[str, list[dict[str, object]]] = {}
    for name in draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=3)):
        found, own = constraints.setdefault(name, []), draw(bounds(name))
        points = [(b.get("target"), str(b.get("at"))) for b in found]
        if (own.get("target"), "None") in points:
            own["at"] = {"batch": draw(st.sampled_from(BATCHES))}
        if (own.get("target"), str(own.get("at"))) not in points:
            found.append(own)
    content = {
        **plain.model_dump(),
        "constraints": {name: several[0] if len(several) == 1 else several for name, several in constraints.items()},
        "objective": draw(objectives()),
        "structure": draw(structures(sorted({score.block for score in table[0]}))),
        "batch_sizes": draw(st.sampled_from(["all", [4], {"at_least": 2}, {"at_most": 3}])),
    }
    elsewhere = make_costs(lambda low, high: draw(st.integers(low, high)), len(table), target="u")
    return graded, {"t": costs, "u": elsewhere}, Scenario.model_validate(content)


class ParentDoesNotFit(Exception):
    """A throughput relative to a parent that the memory doesn't hold."""


def own_batches(scenario: Scenario) -> list[int]:
    return [b for b in BATCHES if scenario.allows_batch(b)]


def written(bound: Bound) -> tuple[Fraction | None, Fraction | None]:
    if bound.equals is not None:
        value, within = Fraction(str(bound.equals)), Fraction(str(bound.within or 0))
        return value * (1 - within), value * (1 + within)
    return tuple(None if v is None else Fraction(str(v)) for v in (bound.at_least, bound.at_most))


def resolved(scenario: Scenario, costs: Mapping[str, PieceCosts], batches: Mapping[str, int], num_layers: int) -> list[tuple]:
    """Every bound as (name, target, batch, low, high), by the words of the documentation."""
    parent, out = (PARENT,) * num_layers, []
    for name, bound in scenario.bounds:
        target = bound.target or "t"
        batch = batches[target] if bound.at is None else bound.at.batch
        factor = Fraction(1)
        if bound.relative_to:
            factor = Fraction(plain_value(name, costs[target], parent, batch, 16))
            if name == "throughput_tokens_per_s" and bound.at is None:
                mine = [b for n, b in scenario.bounds if n == "memory_bytes" and (b.target or "t") == target]
                highs = [written(b)[1] for b in mine if b.relative_to is None and b.at is None]
                most = min((h for h in highs if h is not None), default=None)
                possible = own_batches(scenario) if target == "t" else BATCHES
                fit = [b for b in possible if most is None or plain_value("memory_bytes", costs[target], parent, b, 16) <= most]
                if not fit:
                    raise ParentDoesNotFit
                factor = max(Fraction(plain_value(name, costs[target], parent, b, 16)) for b in fit)
        low, high = (None if v is None else v * factor for v in written(bound))
        out.append((name, target, batch, low, high))
    return out


def losses(table: Table, score: str, picks: Sequence[BlockScore]) -> Fraction:
    own = [next(s for s in scores if s.block == PARENT.name) for scores in table]
    values = {
        "kl": lambda s, o: Fraction(s.kl),
        "top1_loss": lambda s, o: 1 - Fraction(s.top1_agreement),
        "lm_loss": lambda s, o: Fraction(s.lm_loss) - Fraction(o.lm_loss),
        "quiz": lambda s, o: Fraction(o.tasks["quiz"]) - Fraction(s.tasks["quiz"]),
    }
    return sum((values[score](s, o) for s, o in zip(picks, own, strict=True)), Fraction(0))


def is_allowed(scenario: Scenario, layer: int, name: str) -> bool:
    structure = scenario.structure
    forbidden = (*structure.forbidden.get("all", ()), *structure.forbidden.get(layer, ()))
    return fnmatchcase(name, structure.fixed.get(layer, "*")) and not any(fnmatchcase(name, p) for p in forbidden)


def has_structure(scenario: Scenario, architecture: Architecture, earlier: Sequence[Architecture] = ()) -> bool:
    structure, names = scenario.structure, [b.name for b in architecture]
    if not all(is_allowed(scenario, layer, name) for layer, name in enumerate(names)):
        return False
    most = 1 if structure.homogeneous else structure.max_distinct or len(names)
    far = all(sum(a != b for a, b in zip(architecture, e, strict=True)) >= structure.min_different_layers for e in earlier)
    return len(set(names)) <= most and far


def loosen(bound: tuple, side: str) -> tuple:
    """A resolved bound, one side of it five percent further out; a count of layers by one layer at least."""
    name, target, batch, low, high = bound
    value = low if side == "at_least" else high
    change = value / 20 if name != "num_attention_layers" else Fraction(max(1, ceil(value / 20)))
    return (name, target, batch, max(Fraction(0), low - change), high) if side == "at_least" else (name, target, batch, low, high + change)


def answers(
    instance: Instance, *, earlier: Sequence[Architecture] = (), loosened: tuple[int, str] | None = None
) -> Iterator[tuple[Architecture, Fraction | float]]:
    """Every architecture that a scenario allows at some batch sizes, with what its objective is there."""
    table, costs, scenario = instance
    objective = scenario.objective
    for own, elsewhere in product(own_batches(scenario), BATCHES):
        limits = resolved(scenario, costs, {"t": own, "u": elsewhere}, len(table))
        if loosened is not None and loosened[0] < len(limits):
            limits[loosened[0]] = loosen(limits[loosened[0]], loosened[1])
        for picks in product(*table):
            architecture = tuple(Block.parse(s.block) for s in picks)
            values = [plain_value(name, costs[target], architecture, batch, 16) for name, target, batch, *_ in limits]
            sides = zip(values, limits, strict=True)
            inside = all((low is None or v >= low) and (high is None or v <= high) for v, (*_, low, high) in sides)
            kept = all(losses(table, score, picks) <= Fraction(str(b.at_most)) for score, b in objective.subject_to.items())
            if inside and kept and has_structure(scenario, architecture, earlier):
                if objective.quantity is None:
                    yield architecture, sum((Fraction(w) * losses(table, s, picks) for s, w in objective.weights.items()), Fraction(0))
                else:
                    yield architecture, plain_value(objective.quantity, costs["t"], architecture, own, 16)


def best(scenario: Scenario, found: Sequence[Fraction | float]) -> float:
    return float(max(found) if scenario.objective.maximize else min(found))
