"""How close scoring and healing come to the machine's own matrix-product rate, on the bundled parent.

Run `python benchmarks/search_rates.py` on an idle machine. Only products that the mathematics asks for are counted:
for a score the replaced block, the layers behind it and the head; for healing 6 FLOP a parameter and token for the
child, 2 for the parent. The library's own benchmark is `library_rate.py`.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch

from puzzle_dag.architecture import Block, LayerSpace
from puzzle_dag.children.assemble import assemble_child
from puzzle_dag.children.uptrain import uptrain_child
from puzzle_dag.config import LibrarySettings, UptrainSettings, read_profile
from puzzle_dag.corpus.tokens import build_tokens
from puzzle_dag.costs.memory import size_attention, size_ffn
from puzzle_dag.engine.hardware import measure_matmul_rate
from puzzle_dag.library.activations import ActivationCache, collect_activations
from puzzle_dag.library.build import build_layer
from puzzle_dag.model.parent import Parent, load_parent
from puzzle_dag.pieces import LayerPieces
from puzzle_dag.preflight import resolve_spaces
from puzzle_dag.search.score import score_layer
from puzzle_dag.store import ArtifactStore


def block_flop(parent: Parent, block: Block) -> float:
    """FLOP a token of a block's projections, forward; attention's own products (a few per cent here) are left out."""
    return 2.0 * (size_attention(parent.config, block.attention).parameters + size_ffn(parent.config, block.ffn).parameters)


def score_flop(parent: Parent, layer: int, space: LayerSpace, num_tokens: int) -> float:
    """FLOP of scoring all pairs of a layer: what each variant computes once, then the layers behind and the head a pair."""
    behind = (parent.num_layers - layer - 1) * block_flop(parent, parent.block)
    head = 2.0 * parent.config.hidden_size * parent.config.vocab_size
    return num_tokens * sum(2.0 * size_ffn(parent.config, b.ffn).parameters + behind + head for b in space.blocks)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--profile", default="tiny")
    parser.add_argument("--tokens", type=int, default=8_192, help="tokens that are scored on; four times as many are healed on")
    args = parser.parse_args()
    profile = read_profile(Path("conf"), args.profile)
    parent = load_parent(profile.parent, Path())
    spaces = resolve_spaces(profile, parent.config)

    def tokens(purpose: str, num_tokens: int) -> torch.Tensor:
        length = profile.tokens.row_length
        return build_tokens(
            profile.corpus, parent.tokenizer, num_tokens=num_tokens, row_length=length, purpose=purpose, seed=0, root=Path()
        )

    rate = measure_matmul_rate()
    print(f"{torch.get_num_threads()} threads, matrix products of 2048^3 or alike in bf16: {rate / 1e9:.0f} GFLOP/s")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        collect_activations(parent, tokens("train", args.tokens), tokens("score", args.tokens), folder / "cache", dtype=profile.dtype)
        cache, store = ActivationCache(folder / "cache"), ArtifactStore(folder / "store")
        keys = {"activations_digest": cache.digest, "compute_dtype": profile.dtype}
        pieces: list[LayerPieces] = []
        flop, seconds = 0.0, 0.0
        for layer, space in enumerate(spaces):
            pieces.append(build_layer(parent, layer, space, cache, LibrarySettings(num_tokens=0), store, **keys)[0])
            started = time.perf_counter()
            score_layer(parent, layer, space, pieces[-1], cache, store, **keys)
            seconds += time.perf_counter() - started
            flop += score_flop(parent, layer, space, args.tokens)
        print(f"scores: {flop / seconds / 1e9:.0f} GFLOP/s, {flop / seconds / rate:.1%} of the machine's, {seconds:.1f} s")
        assemble_child(parent, (parent.block,) * parent.num_layers, pieces, folder / "child")
        report = uptrain_child(
            parent,
            folder / "child",
            tokens("uptrain", 4 * args.tokens),
            UptrainSettings(),
            folder / "healed",
            compute_dtype=profile.dtype,
            work_folder=folder / "work",
        )
        print(f"healing: {report.flops_per_s / 1e9:.0f} GFLOP/s, {report.flops_per_s / rate:.1%} of the machine's, {report.seconds:.1f} s")


if __name__ == "__main__":
    main()
