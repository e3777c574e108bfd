"""How close the library's training comes to the machine's own matrix-product rate, variant by variant.

Run `python benchmarks/library_rate.py` on an idle machine. Only products that the mathematics asks for are counted
(forward, gradient of weights, gradient of inputs where one is needed), so that time in norms, activations, softmax
and the optimiser lowers the ratio.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional

from puzzle_dag.architecture import FFN, Attention, Block
from puzzle_dag.library.activations import DTYPES, ActivationCache, collect_activations
from puzzle_dag.library.block import BlockStates, ParentLayer, Variant, place_of
from puzzle_dag.library.initialise import initialise_pieces
from puzzle_dag.library.student import Student
from puzzle_dag.model.configuration_puzzle_dag import PuzzleDagConfig
from puzzle_dag.model.modeling_puzzle_dag import PuzzleDagForCausalLM
from puzzle_dag.model.parent import Parent

ROW_LENGTH, ROWS_PER_STEP, ROWS_PER_CHUNK = 256, 16, 4
TOKENS = ROW_LENGTH * ROWS_PER_STEP


def best_seconds(run: Callable[[], object], repeats: int, device: str) -> float:
    """The shortest of several runs, after one that warms up."""
    seconds = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return min(seconds[1:])


def matmul_rate(rows: int, inner: int, columns: int, dtype: torch.dtype, device: str) -> float:
    """FLOP/s of a linear layer of this shape."""
    x, weight = torch.randn(rows, inner, dtype=dtype, device=device), torch.randn(columns, inner, dtype=dtype, device=device)
    num_products = max(1, 20_000_000_000 // (2 * rows * inner * columns))

    def run() -> None:
        for _ in range(num_products):
            functional.linear(x, weight)

    return num_products * 2 * rows * inner * columns / best_seconds(run, 5, device)


def forward_flop(config: PuzzleDagConfig, variant: Variant) -> float:
    """FLOP a token of a variant's products, forward."""
    d, head_dim, heads = config.hidden_size, config.head_dim, config.num_attention_heads
    if variant.kind == "linear":
        return 2 * d * d
    if isinstance(variant, FFN):
        return 2 * 3 * d * variant.intermediate_size
    projections = 2 * d * head_dim * (2 * heads + 2 * variant.kv_heads)
    return projections + 2 * 2 * heads * head_dim * (ROW_LENGTH + 1) / 2


def training_flop(config: PuzzleDagConfig, variant: Variant, own: Block) -> float:
    """FLOP a token of a training step's products: the input of the variant itself needs no gradient."""
    d, forward = config.hidden_size, forward_flop(config, variant)
    if isinstance(variant, FFN):
        return 2 * forward + (2 * d * variant.intermediate_size if variant.kind == "swiglu" else 0)
    behind = 2 * forward_flop(config, own.ffn)  # the parent's FFN: forward, and the gradient of its input
    if variant.kind == "linear":
        return 2 * forward + behind
    attended = 2 * 2 * config.num_attention_heads * config.head_dim * (ROW_LENGTH + 1) / 2
    return 2 * forward + attended + 2 * d * config.num_attention_heads * config.head_dim + behind


def make_parent(dtype: torch.dtype, device: str) -> Parent:
    """A random parent of the bundled one's shape, two layers deep."""
    shape = {"vocab_size": 2048, "hidden_size": 384, "intermediate_size": 768, "num_hidden_layers": 2}
    config = PuzzleDagConfig(**shape, num_attention_heads=8, num_key_value_heads=8, head_dim=32)
    model = PuzzleDagForCausalLM(config).eval().to(device, dtype)
    return Parent(model, None, Block(Attention("gqa", 8), FFN("swiglu", 768)), "random", Path(), ("random", "random"))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="bfloat16", choices=sorted(DTYPES))
    parser.add_argument("--repeats", type=int, default=10, help="timed steps a variant; the fastest counts")
    arguments = parser.parse_args()
    dtype, device = DTYPES[arguments.dtype], arguments.device
    torch.manual_seed(0)
    parent = make_parent(dtype, device)
    rows = torch.randint(0, 2048, (2 * ROWS_PER_STEP, ROW_LENGTH))
    with tempfile.TemporaryDirectory() as folder:
        collect_activations(parent, rows, rows[:1], Path(folder), dtype=arguments.dtype)
        cache = ActivationCache(Path(folder))
        layer = ParentLayer(parent, 1, dtype=dtype, row_length=ROW_LENGTH)
        hidden = cache.gather("train", 1, torch.arange(ROWS_PER_STEP))
        variants: list[Variant] = [Attention.parse(n) for n in ("kv4", "kv2", "kv1", "linear")]
        variants += [FFN.parse(n) for n in ("w576", "w384", "w192", "linear")]
        states = initialise_pieces(layer, variants, cache, "paper")
    small = matmul_rate(ROW_LENGTH * ROWS_PER_CHUNK, 384, 768, dtype, device)
    large = matmul_rate(2048, 2048, 2048, dtype, device)
    print(f"{torch.get_num_threads()} threads, {arguments.dtype}: {large / 1e9:.0f} GFLOP/s at 2048^3, {small / 1e9:.0f} at 1024x384x768")
    print(f"{'':18} {'ms a step':>9} {'GFLOP/s':>8} {'of 2048^3':>9} {'of own shape':>12}")

    def show(name: str, flop: float, seconds: float) -> None:
        rate = flop * TOKENS / seconds
        print(f"{name:18} {seconds * 1e3:9.1f} {rate / 1e9:8.0f} {rate / large:9.1%} {rate / small:12.1%}")

    def run_parent() -> list[BlockStates]:
        return [layer.run(chunk) for chunk in hidden.split(ROWS_PER_CHUNK)]

    sums = [forward_flop(parent.config, parent.block.attention) + forward_flop(parent.config, parent.block.ffn), 0.0]
    sums[1] = best_seconds(run_parent, arguments.repeats, device)
    show("parent's layer", sums[0], sums[1])
    batch = run_parent()
    total = torch.stack([chunk.output_squares() for chunk in batch]).sum()
    for variant in variants:
        student = Student(layer, variant, states[variant], 1e-3)

        def step(student: Student = student) -> None:
            student.accumulate(batch, total)
            student.update(1.0)

        flop, seconds = training_flop(parent.config, variant, parent.block), best_seconds(step, arguments.repeats, device)
        show(f"{place_of(variant)} {variant.name}", flop, seconds)
        sums = [sums[0] + flop, sums[1] + seconds]
    show("all, one pass", sums[0], sums[1])


if __name__ == "__main__":
    main()
