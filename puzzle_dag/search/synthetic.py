"""A library that nobody measured: plausible numbers by formula, to try the search and the UI without a model.

`python -m puzzle_dag.search.synthetic FILE.json` writes it. Every variant says `"source": "synthetic"`, so that no number of
it is ever taken for a measurement. The costs are those of a roofline-like arithmetic for one layer of an 8B-shaped
parent; the divergences fall with the share that is kept and are larger in the first and last layers, as on real parents.
"""

import argparse
import json
import math
import random
from pathlib import Path
from typing import Any

from puzzle_dag.store import write_atomically

_ATTENTIONS = (("kv8", 8.0), ("kv4", 4.0), ("kv2", 2.0), ("linear", 0.0), ("noop", 0.0))
_FFNS = (("w14336", 1.0), ("w7168", 0.5), ("w3584", 0.25), ("noop", 0.0))
_HIDDEN_SIZE, _WIDTH, _HEAD_SIZE = 4096, 14_336, 128
_MIB = 2**20
_BATCH, _LENGTH = 64, 2048
_MIB_PER_MS = 2_000.0
_CACHE_MIB_PER_MS = 1_400.0
_LAUNCH_MS = 0.012


def _attention_sizes(name: str, kv_heads: float) -> tuple[float, float]:
    """Return (weights, KV cache at batch 64 and 2,048 tokens) in MiB, two bytes a number."""
    if name == "noop":
        return 0.0, 0.0
    if name == "linear":
        return 2 * _HIDDEN_SIZE**2 / _MIB, 0.0
    weights = 2 * _HIDDEN_SIZE * (2 * _HIDDEN_SIZE + 2 * kv_heads * _HEAD_SIZE) / _MIB
    return weights, 2 * 2 * kv_heads * _HEAD_SIZE * _BATCH * _LENGTH / _MIB


def _divergence(attention: str, kv_heads: float, share: float, depth: float, noise: float) -> float:
    """Return a made-up KL divergence in nats a token: 0 for the parent's own, largest at both ends of the model."""
    lost_attention = {"linear": 1.1, "noop": 1.6}.get(attention, 0.35 * math.log2(8 / max(kv_heads, 1)))
    lost = lost_attention + 1.2 * math.pow(1 - share, 1.5)
    ends = 0.4 + 3.0 * math.exp(-depth * 12) + 1.2 * math.exp(-(1 - depth) * 10)
    return 0.02 * lost * ends * noise


def make_library(num_layers: int = 16, seed: int = 0) -> dict[str, dict[str, dict[str, Any]]]:
    """Return layer -> variant -> numbers: `stats.memory_mib`, `stats.runtime_ms`, `stats.num_params`, `metrics.kl_div`.

    Args:
        num_layers: layers; each has 20 variants, 5 attentions times 4 FFNs.
        seed: of the noise on the divergences; the same seed gives the same library.
    """
    rng, library = random.Random(seed), dict[str, dict[str, dict[str, Any]]]()
    for index in range(num_layers):
        variants = library.setdefault(f"layer_{index}", {})
        for attention, kv_heads in _ATTENTIONS:
            weights, cache = _attention_sizes(attention, kv_heads)
            for ffn, share in _FFNS:
                noise = math.exp(rng.gauss(0, 0.25))
                ffn_weights = 2 * 3 * _HIDDEN_SIZE * _WIDTH * share / _MIB
                num_launches = (attention != "noop") + (ffn != "noop")
                runtime_ms = (weights + ffn_weights) / _MIB_PER_MS + cache / _CACHE_MIB_PER_MS + num_launches * _LAUNCH_MS
                kl = _divergence(attention, kv_heads, share, index / max(1, num_layers - 1), noise)
                variants[f"{attention}/{ffn}"] = {
                    "source": "synthetic",
                    "stats": {
                        "memory_mib": round(weights + cache + ffn_weights, 1),
                        "runtime_ms": round(runtime_ms, 4),
                        "num_params": round((weights + ffn_weights) * _MIB / 2),
                    },
                    "metrics": {"kl_div": round(kl, 6)},
                }
    return library


def format_library(library: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Return a library as JSON, one variant a line, so that two versions can be compared by eye."""
    layers = []
    for layer, variants in library.items():
        lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(content)}" for name, content in variants.items())
        layers.append(f" {json.dumps(layer)}: {{\n{lines}\n }}")
    return "{\n" + ",\n".join(layers) + "\n}\n"


def main(arguments: list[str] | None = None) -> None:
    """Write the library to a file."""
    parser = argparse.ArgumentParser(prog="python -m puzzle_dag.search.synthetic", description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--layers", type=int, default=16, help="number of layers (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise (default: %(default)s)")
    args = parser.parse_args(arguments)
    write_atomically(args.file, format_library(make_library(args.layers, args.seed)))


if __name__ == "__main__":
    main()
