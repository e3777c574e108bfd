"""Small instances of the search, and its answers by brute force straight from the definitions."""

from collections.abc import Sequence
from fractions import Fraction
from itertools import product

from hypothesis import strategies as st

from puzzle_dag.architecture import Architecture, Block
from puzzle_dag.config import Scenario
from puzzle_dag.piece_costs import PieceCost, PieceCosts
from puzzle_dag.search.limits import ScenarioError
from puzzle_dag.search.score import BlockScore

PARENT = Block.parse("kv4/w64")
ATTENTIONS, FFNS = ("kv4", "kv1", "linear", "noop"), ("w64", "w32", "noop")
BATCHES = (1, 4)
PlainBound = tuple[str, int, int, Fraction | None, Fraction | None]
"""(name, batch, length, at_least, at_most)"""
NAMES = (
    "throughput_tokens_per_s",
    "latency_s",
    "ttft_s",
    "tpot_s",
    "memory_bytes",
    "parameters",
    "kv_bytes_per_token",
    "num_attention_layers",
)


def make_scenario(constraints: dict[str, object], **fields: object) -> Scenario:
    content = {"version": 1, "name": "s", "target": "t", "constraints": constraints, "uptrain": {"tokens": 0}, **fields}
    return Scenario.model_validate(content)


def make_costs(draw_int: object, num_layers: int, *, target: str = "t") -> PieceCosts:
    """Costs from a source of integers; times are multiples of 1/64 s, so sums tie and touch limits often."""

    def piece(*, free: bool, kv: bool) -> PieceCost:
        if free:
            return PieceCost(0, 0, 0, {b: {"prefill": 0.0, "decode": 0.0} for b in BATCHES})
        seconds = {b: {"prefill": draw_int(0, 8) / 64, "decode": draw_int(0, 8) / 64} for b in BATCHES}
        return PieceCost(draw_int(0, 9), draw_int(0, 9), draw_int(1, 4) if kv else 0, seconds)

    pieces = {}
    for layer in range(num_layers):
        for name in ATTENTIONS:
            pieces[layer, "attention", name] = piece(free=name == "noop", kv=name.startswith("kv"))
        for name in FFNS:
            pieces[layer, "ffn", name] = piece(free=name == "noop", kv=False)
    constant = PieceCost(3, 5, 0, {b: {"prefill": 1 / 64, "decode": 2 / 64} for b in BATCHES})
    return PieceCosts(target, 12, 4, BATCHES, pieces, constant, "digest")


@st.composite
def instances(draw: st.DrawFn) -> tuple[list[list[BlockScore]], PieceCosts, Scenario]:
    num_layers = draw(st.integers(1, 3))
    costs = make_costs(lambda low, high: draw(st.integers(low, high)), num_layers)
    table = []
    for layer in range(num_layers):
        blocks = draw(st.sets(st.sampled_from(list(product(ATTENTIONS, FFNS))), min_size=0, max_size=6))
        names = sorted({f"{a}/{f}" for a, f in blocks} | {PARENT.name})
        table.append(
            [
                BlockScore(
                    layer,
                    name,
                    0.0 if name == PARENT.name else draw(st.integers(0, 12)) / 8,
                    draw(st.integers(8, 24)) / 8,
                    1.0 if name == PARENT.name else draw(st.integers(0, 8)) / 8,
                    64,
                    f"{layer}:{name}",
                )
                for name in names
            ]
        )
    constraints: dict[str, object] = {}
    for name in draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=3, unique=True)):
        relative = draw(st.booleans())
        share = draw(st.sampled_from([0.3, 0.5, 0.6, 0.7, 0.9, 1.0, 1.2, 1.5]))
        value = share if relative else draw(st.integers(1, 60)) / draw(st.sampled_from([1, 8]))
        bound: dict[str, object] = {draw(st.sampled_from(["at_least", "at_most"])): value}
        if draw(st.integers(0, 5)) == 0:  # both bounds, often an equality
            bound = {"at_least": value, "at_most": value if draw(st.booleans()) else value * 1.25}
        if relative:
            bound["relative_to"] = "parent"
        if draw(st.integers(0, 2)) == 0:
            bound["at"] = {"batch": draw(st.sampled_from(BATCHES))}
            if name == "memory_bytes":
                bound["at"]["length"] = draw(st.integers(1, 9))
        constraints[name] = bound
    objective = draw(st.sampled_from(["kl", "lm_loss", "top1_loss"]))
    batch_sizes = draw(st.sampled_from(["all", [4], [1, 4]]))
    return table, costs, make_scenario(constraints, objective={"minimize": objective}, batch_sizes=batch_sizes)


def plain_value(name: str, costs: PieceCosts, architecture: Architecture, batch: int, length: int) -> Fraction | float:
    """A quantity straight from its definition."""
    pieces = [costs.constant]
    for layer, block in enumerate(architecture):
        pieces += [costs.pieces[layer, "attention", block.attention.name], costs.pieces[layer, "ffn", block.ffn.name]]
    prefill = sum(Fraction(p.seconds[batch]["prefill"]) for p in pieces)
    decode = sum(Fraction(p.seconds[batch]["decode"]) for p in pieces)
    values: dict[str, Fraction | float] = {
        "throughput_tokens_per_s": batch * (12 + 4) / (prefill + decode),
        "latency_s": prefill + decode,
        "ttft_s": prefill,
        "tpot_s": decode / 3,
        "memory_bytes": sum(p.weight_bytes for p in pieces) + batch * length * sum(p.kv_bytes_per_token for p in pieces),
        "parameters": sum(p.parameters for p in pieces),
        "kv_bytes_per_token": sum(p.kv_bytes_per_token for p in pieces),
        "num_attention_layers": sum(b.attention.kind == "gqa" for b in architecture),
    }
    return values[name]


def plain_bounds(scenario: Scenario, costs: PieceCosts, num_layers: int, batch: int) -> list[PlainBound]:
    """Every constraint, by the rules in the scenario file's words."""
    parent = (PARENT,) * num_layers
    own_batches = BATCHES if scenario.batch_sizes == "all" else scenario.batch_sizes
    memory = scenario.constraints.get("memory_bytes")
    out = []
    for name, bound in scenario.constraints.items():
        at_batch = batch if bound.at is None else bound.at.batch
        length = 16 if bound.at is None or bound.at.length is None else bound.at.length
        factor = Fraction(1)
        if bound.relative_to == "parent":
            factor = plain_value(name, costs, parent, at_batch, length)
            if name == "throughput_tokens_per_s" and bound.at is None:
                fits = [
                    b
                    for b in own_batches
                    if memory is None
                    or memory.at is not None
                    or memory.relative_to is not None
                    or memory.at_most is None
                    or plain_value("memory_bytes", costs, parent, b, 16) <= Fraction(str(memory.at_most))
                ]
                if not fits:
                    raise ScenarioError("the parent does not fit")
                factor = max(plain_value(name, costs, parent, b, 16) for b in fits)
        low, high = (None if v is None else Fraction(str(v)) * factor for v in (bound.at_least, bound.at_most))
        out.append((name, at_batch, length, low, high))
    return out


def meets(costs: PieceCosts, architecture: Architecture, bounds: Sequence[PlainBound]) -> bool:
    for name, batch, length, low, high in bounds:
        value = plain_value(name, costs, architecture, batch, length)
        if (low is not None and value < low) or (high is not None and value > high):
            return False
    return True


def plain_objective(table: Sequence[Sequence[BlockScore]], objective: str, picks: Sequence[BlockScore]) -> float:
    own = [next(s for s in scores if s.block == PARENT.name) for scores in table]
    if objective == "kl":
        return sum(s.kl for s in picks)
    if objective == "top1_loss":
        return sum(1 - s.top1_agreement for s in picks)
    return sum(s.lm_loss - o.lm_loss for s, o in zip(picks, own, strict=True))


def brute_force(table: list[list[BlockScore]], costs: PieceCosts, scenario: Scenario) -> float | None:
    """Least objective over all batch sizes and architectures; None where nothing is feasible."""
    best = None
    for batch in BATCHES if scenario.batch_sizes == "all" else scenario.batch_sizes:
        bounds = plain_bounds(scenario, costs, len(table), batch)
        for picks in product(*table):
            architecture = tuple(Block.parse(s.block) for s in picks)
            if meets(costs, architecture, bounds):
                value = plain_objective(table, scenario.objective.minimize, picks)
                best = value if best is None else min(best, value)
    return best


def simple_costs(num_layers: int, *, seconds: dict[str, float], batches: tuple[int, ...] = BATCHES, output_length: int = 4) -> PieceCosts:
    """Every attention and FFN costs what `seconds` says by name, the same at every batch; a KV head takes 2 bytes a token."""

    def piece(name: str) -> PieceCost:
        kv = 2 * int(name[2:]) if name.startswith("kv") else 0
        phases = {b: {"prefill": seconds.get(name, 0.0), "decode": seconds.get(name, 0.0)} for b in batches}
        size = 0 if name == "noop" else 10 * len(name)
        return PieceCost(size, 2 * size, kv, phases)

    pieces = {("attention", n): piece(n) for n in ATTENTIONS} | {("ffn", n): piece(n) for n in FFNS}
    constant = PieceCost(1, 2, 0, {b: {"prefill": 0.5, "decode": 0.5} for b in batches})
    return PieceCosts("t", 12, output_length, batches, PieceCosts.same_in_every_layer(pieces, num_layers=num_layers), constant, "d")


def simple_table(num_layers: int, kl: dict[str, float]) -> list[list[BlockScore]]:
    return [
        [BlockScore(layer, name, value, 2.0 + value, 1.0 - value / 10, 64, f"{layer}:{name}") for name, value in kl.items()]
        for layer in range(num_layers)
    ]


TABLE = {PARENT.name: 0.0, "kv1/w64": 0.1, "kv4/w32": 0.2, "noop/noop": 2.0}
SECONDS = {"kv4": 1.0, "kv1": 0.5, "w64": 1.0, "w32": 0.5}
