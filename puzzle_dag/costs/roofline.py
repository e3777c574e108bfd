"""Analytic costs for hardware that nobody measured: a roofline from published peaks, labelled `analytic` in every row.

Each kernel takes the longer of its arithmetic at the peak rate and its memory traffic at the peak bandwidth (Williams,
Waterman and Patterson, "Roofline", 2009), plus a fixed time to launch it. Real kernels reach 50 to 90 % of those
peaks, so absolute times come out too short; what the search needs most, how variants compare, suffers less. Three
numbers are assumptions and not published: `LAUNCH_S`, `STEP_S` and `MESSAGE_S`. A batch is taken to fit in memory.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from puzzle_dag.architecture import FFN, Attention, Block
from puzzle_dag.config import Target
from puzzle_dag.costs.accelerators import ACCELERATORS, Accelerator
from puzzle_dag.costs.memory import NumberTypes
from puzzle_dag.costs.probes import Variant
from puzzle_dag.costs.rows import RowTemplate
from puzzle_dag.costs.table import CONSTANT, PHASES, CostTable, sort_rows
from puzzle_dag.engine.jobs import Workload
from puzzle_dag.engine.worker import count_prefill_tokens
from puzzle_dag.model.configuration_puzzle_dag import PuzzleDagConfig
from puzzle_dag.piece_costs import Phase

VERSION = 2
LAUNCH_S = {"eager": 5e-6, "compiled": 2e-6}
"""Assumption: seconds to launch a kernel, by mode; compiled stands for CUDA graphs."""
STEP_S = 1e-3
"""Assumption: seconds of the engine's own work a step (scheduling, sampling, answering)."""
MESSAGE_S = 10e-6
"""Assumption: latency of one collective between tensor-parallel accelerators."""
ENGINE_VERSION = f"roofline {VERSION}"
"""What stands where a measured row names its engine."""


class RooflineError(ValueError):
    """A target that no analytic cost can be given for."""


@dataclass(frozen=True, slots=True)
class _Step:
    """One kind of engine step: what goes through every layer at once, and how often."""

    tokens: float
    """Tokens a step."""
    logit_tokens: float
    """Tokens a step whose logits are computed."""
    pairs: float
    """(query, key) pairs a step that full or windowed attention looks at, all requests together."""
    keys: float
    """Keys a step that are read from the KV cache, all requests together."""
    times: int
    """Such steps in the phase."""


def _visible(position: int, window: int | None) -> int:
    """Return the keys that the token at `position` (from 1 on) sees."""
    return position if window is None else min(position, window)


def _list_steps(target: Target, batch: int, phase: Phase, window: int | None) -> list[_Step]:
    """Return the steps of a phase; a prefill longer than the engine's token budget is cut into equal steps."""
    length = target.input_length
    if phase == "prefill":
        tokens = batch * length
        times = -(-tokens // count_prefill_tokens(Workload.of(target)))
        pairs = batch * sum(_visible(p, window) for p in range(1, length + 1))
        return [_Step(tokens / times, batch / times, pairs / times, tokens / times, times)]
    seen = [_visible(length + s, window) for s in range(1, target.output_length)]
    return [_Step(batch, batch, batch * keys, batch * keys, seen.count(keys)) for keys in sorted(set(seen))]


@dataclass(frozen=True, slots=True)
class Roofline:
    """Seconds of kernels on one accelerator (or several, tensor-parallel) for a parent's shape."""

    shape: PuzzleDagConfig
    """The parent's configuration."""
    accelerator: Accelerator
    """Published peaks."""
    mode: str
    """"eager" or "compiled"."""
    parallel: int
    """Tensor-parallel size."""
    types: NumberTypes
    """Bytes of a number."""
    matrix_flops_per_s: float
    """Peak rate of the linear maps' number type."""
    plain_flops_per_s: float
    """Peak rate of the activations' number type: attention and the head, which no quantisation touches."""

    @staticmethod
    def of(shape: PuzzleDagConfig, target: Target) -> "Roofline":
        """Return the roofline of a target.

        Raises:
            RooflineError: nothing is published here for the target's hardware, or its heads can't be spread over its accelerators.
            UnknownDtypeError: the bytes of the target's number types are not known.
        """
        accelerator = ACCELERATORS.get(target.hardware)
        if accelerator is None:
            raise RooflineError(
                f"target {target.name!r}: field `hardware` is {target.hardware!r}, for which no peaks are published here; "
                f"measure it, or use one of {', '.join(ACCELERATORS)}"
            )
        if shape.num_attention_heads % target.tensor_parallel_size:
            raise RooflineError(
                f"target {target.name!r}: field `tensor_parallel_size` is {target.tensor_parallel_size}, "
                f"which doesn't divide the parent's {shape.num_attention_heads} attention heads; use a divisor"
            )
        matrix = target.dtype if target.quantization is None else "int8" if "int8" in target.quantization else "fp8"
        rates = accelerator.flops_per_s
        types = NumberTypes.of(target)
        return Roofline(shape, accelerator, target.mode, target.tensor_parallel_size, types, rates[matrix], rates[target.dtype])

    def kernel_s(self, num_bytes: float, flops: float = 0.0, flops_per_s: float = 1.0) -> float:
        """Return the seconds of one kernel."""
        return max(flops / flops_per_s, num_bytes / self.accelerator.bytes_per_s) + LAUNCH_S[self.mode]

    def linear_s(self, tokens: float, inputs: float, outputs: float) -> float:
        """Return the seconds of a linear map of `tokens` rows, its weights [outputs, inputs] on one accelerator."""
        num_bytes = inputs * outputs * self.types.matrix + tokens * (inputs + outputs) * self.types.weight
        return self.kernel_s(num_bytes, 2 * tokens * inputs * outputs, self.matrix_flops_per_s)

    def norm_s(self, tokens: float) -> float:
        """Return the seconds of a norm with its residual: both are read, both are written."""
        return self.kernel_s(4 * tokens * self.shape.hidden_size * self.types.weight)

    def gather_s(self, tokens: float, *, times: int) -> float:
        """Return the seconds to exchange a hidden state; an all-reduce sends (p - 1) / p of it twice, an all-gather once."""
        if self.parallel == 1:
            return 0.0
        sent: float = times * (self.parallel - 1) / self.parallel * tokens * self.shape.hidden_size * self.types.weight
        return sent / self.accelerator.link_bytes_per_s + MESSAGE_S

    def linear_place_s(self, tokens: float) -> float:
        """Return the seconds of an attention or FFN that is one linear map, its outputs spread over the accelerators."""
        hidden = self.shape.hidden_size
        return self.norm_s(tokens) + self.linear_s(tokens, hidden, hidden / self.parallel) + self.gather_s(tokens, times=1)

    def attention_s(self, variant: Attention, step: _Step) -> float:
        """Return the seconds that an attention variant adds to a step."""
        hidden, head_dim = self.shape.hidden_size, self.shape.head_dim
        if variant.kind == "noop":
            return 0.0
        if variant.kind == "linear":
            return self.linear_place_s(step.tokens)
        q_size = self.shape.num_attention_heads * head_dim / self.parallel
        # Fewer KV heads than accelerators: each keeps a copy of the one that it needs.
        kv_size = max(variant.kv_heads / self.parallel, 1) * head_dim
        rotary = self.kernel_s(2 * step.tokens * (q_size + 2 * kv_size) * self.types.weight)
        num_bytes = 2 * step.tokens * q_size * self.types.weight + 2 * step.keys * kv_size * self.types.kv
        core = self.kernel_s(num_bytes, 4 * step.pairs * q_size, self.plain_flops_per_s)
        maps = self.linear_s(step.tokens, hidden, q_size + 2 * kv_size) + self.linear_s(step.tokens, q_size, hidden)
        return self.norm_s(step.tokens) + rotary + core + maps + self.gather_s(step.tokens, times=2)

    def ffn_s(self, variant: FFN, step: _Step) -> float:
        """Return the seconds that an FFN variant adds to a step."""
        hidden, tokens = self.shape.hidden_size, step.tokens
        if variant.kind == "noop":
            return 0.0
        if variant.kind == "linear":
            return self.linear_place_s(tokens)
        width = variant.intermediate_size / self.parallel
        product = self.kernel_s(3 * tokens * width * self.types.weight)
        maps = self.linear_s(tokens, hidden, 2 * width) + self.linear_s(tokens, width, hidden)
        return self.norm_s(tokens) + product + maps + self.gather_s(tokens, times=2)

    def constant_s(self, step: _Step) -> float:
        """Return the seconds of a step beside its layers: embedding, final norm, head, and the engine's own work."""
        hidden, vocabulary, each = self.shape.hidden_size, self.shape.vocab_size / self.parallel, self.types.weight
        embedding = self.kernel_s(2 * step.tokens * hidden * each)
        num_bytes = hidden * vocabulary * each + step.logit_tokens * (hidden + vocabulary) * each
        head = self.kernel_s(num_bytes, 2 * step.logit_tokens * hidden * vocabulary, self.plain_flops_per_s)
        return STEP_S + embedding + self.norm_s(step.tokens) + head + self.gather_s(step.tokens, times=2)

    def variant_s(self, place: str, name: str, steps: Iterable[_Step]) -> float:
        """Return the seconds that a variant adds to all steps of a phase."""
        if place == "constant":
            return sum(s.times * self.constant_s(s) for s in steps)
        if place == "attention":
            return sum(s.times * self.attention_s(Attention.parse(name), s) for s in steps)
        return sum(s.times * self.ffn_s(FFN.parse(name), s) for s in steps)


def _window(shape: PuzzleDagConfig) -> int | None:
    """Return the sliding window where every layer has it; a mixture of layers costs what full attention costs, an upper bound."""
    windows = {shape.layer_window(layer) for layer in range(shape.num_hidden_layers)}
    return windows.pop() if len(windows) == 1 else None


def estimate_table(
    shape: PuzzleDagConfig, parent_block: Block, target: Target, attentions: Iterable[Attention], ffns: Iterable[FFN]
) -> CostTable:
    """Return a cost table from published peaks, all of whose seconds are labelled `analytic`. Takes milliseconds, needs no engine.

    Args:
        shape: the parent's configuration.
        parent_block: the parent's own block.
        target: hardware, mode, number types and workload.
        attentions: attention variants; the parent's and the no-op may be among them.
        ffns: FFN variants, likewise.

    Raises:
        RooflineError: nothing is known of the target's hardware, or its heads can't be spread over its accelerators.
        UnknownDtypeError: the bytes of the target's number types are not known.
    """
    roofline = Roofline.of(shape, target)
    pieces: list[Variant] = [("attention", a.name) for a in sorted({parent_block.attention, *attentions})]
    pieces += [("ffn", f.name) for f in sorted({parent_block.ffn, *ffns})]
    pieces.append(("constant", CONSTANT))
    template = RowTemplate(
        shape=shape,
        target=target,
        hardware=roofline.accelerator.name,
        num_threads=0,
        engine_version=ENGINE_VERSION,
        source="analytic",
    )
    rows = []
    for batch in target.batch_sizes:
        for phase in PHASES:
            steps = _list_steps(target, batch, phase, _window(shape))
            rows += [template.fill(*piece, batch, phase, seconds=roofline.variant_s(*piece, steps)) for piece in pieces]
    return CostTable(sort_rows(rows), target, num_engines=0, residuals={})
