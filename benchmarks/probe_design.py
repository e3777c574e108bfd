"""How much of the engines' noise reaches a prediction, by the design of the probes? Arithmetic; nothing is measured.

    python -m benchmarks.probe_design --profile quality

Every engine's time is taken to be off by an independent share of itself, the same share for all. For each design the
weighted normal equations then give the error of what is predicted of random models, in units of that share: 0.4 says
that engines which are off by 5 % give predictions that are off by 2 %. Beside the planned probes stand the planned
models with fewer or more layers and with the parent's partner in every n-th layer, and the rival's
(benchmarks/repeated_layer.py), fitted by regression as well. The seconds of the variants are made up: four milliseconds
and a quarter for each KV head, one to four by an FFN's width, three for the engine.
"""

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from benchmarks.repeated_layer import RepeatedLayers
from puzzle_dag.architecture import FFN, Architecture, Attention, Block, variant_union
from puzzle_dag.config import read_profile
from puzzle_dag.costs.heldout import draw_models
from puzzle_dag.costs.probes import Variant, count_variants, list_unknowns, plan_probes
from puzzle_dag.model.parent import read_parent_shape
from puzzle_dag.preflight import resolve_spaces
from puzzle_dag.report.tables import text_table

_ENGINE_S = 3e-3
_NOTHING = {"attention": Attention("noop"), "ffn": FFN("noop")}


def make_up_seconds(variant: Variant, parent: Block) -> float:
    """Return plausible seconds of a variant; which ones hardly matters for the comparison."""
    place, name = variant
    if name == "linear":
        return 1e-3
    if place == "attention":
        return 4e-3 + 0.25e-3 * Attention.parse(name).kv_heads
    return 1e-3 + 3e-3 * FFN.parse(name).intermediate_size / parent.ffn.intermediate_size


def spread_of_predictions(
    models: Sequence[Architecture], predicted: Sequence[Architecture], parent: Block, engines: int
) -> tuple[float, float]:
    """Return the root mean square and the largest relative error of predictions, in units of one engine's relative error.

    Args:
        models: what is measured.
        predicted: what is predicted from it.
        parent: the parent's block.
        engines: engines each model is measured in.
    """
    unknowns = list_unknowns([*models, *predicted])
    seconds = np.array([*(make_up_seconds(v, parent) for v in unknowns), _ENGINE_S])
    design, wanted = (np.hstack([count_variants(m, unknowns), np.ones((len(m), 1))]) for m in (models, predicted))
    weighted = design / (design @ seconds)[:, None]
    covariance = np.linalg.inv(weighted.T @ weighted) / engines
    errors = np.sqrt(np.einsum("ij,jk,ik->i", wanted, covariance, wanted)) / (wanted @ seconds)
    return float(np.sqrt((errors**2).mean())), float(errors.max())


def _with_partner(parent: Block, variant: Attention | FFN, depth: int, every: int) -> Architecture:
    """Return one parent block and the variant in all other layers, with the parent's partner in every n-th (0: in none)."""
    blocks = [parent]
    for layer in range(1, depth):
        beside = every and layer % every == 0
        if isinstance(variant, Attention):
            blocks.append(Block(variant, parent.ffn if beside else FFN("noop")))
        else:
            blocks.append(Block(parent.attention if beside else Attention("noop"), variant))
    return tuple(blocks)


def list_designs(
    parent: Block, attentions: Iterable[Attention], ffns: Iterable[FFN], num_layers: int
) -> list[tuple[str, list[Architecture]]]:
    """Return every design's name and models; all but the rival's have as many models as ours."""
    attentions, ffns = set(attentions), set(ffns)
    ours = [p.architecture for p in plan_probes(parent, attentions, ffns, num_layers=num_layers)]
    designs = [("ours", ours), ("the rival's, by regression", RepeatedLayers.plan(parent, attentions, ffns).models)]
    variants = [*sorted(attentions - {parent.attention, _NOTHING["attention"]}), *sorted(ffns - {parent.ffn, _NOTHING["ffn"]})]
    for depth in (num_layers, 2 * num_layers):
        for single in (1, max(2, num_layers // 3)):
            for every in (0, 2, 4):
                anchors = [(parent,) * num_layers, (parent,) * single]
                anchors += [_with_partner(parent, v, depth, 0) for v in (parent.attention, parent.ffn)]
                name = f"{depth} deep, shortest anchor {single}, " + (f"partner every {every}" if every else "no partner")
                designs.append((name, anchors + [_with_partner(parent, v, depth, every) for v in variants]))
    return designs


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path(), help="the project's root")
    parser.add_argument("--profile", default="quality")
    parser.add_argument("--engines", type=int, default=2, help="engines a model (default: %(default)s)")
    parser.add_argument("--num-models", type=int, default=40, help="models that are predicted (default: %(default)s)")
    args = parser.parse_args()
    profile = read_profile(args.root / "conf", args.profile)
    shape = read_parent_shape(profile.parent, args.root)
    parent = Block.parse(f"kv{shape.num_key_value_heads}/w{shape.intermediate_size}")
    spaces = resolve_spaces(profile, shape)
    predicted = draw_models([s.blocks for s in spaces], args.num_models, known=[], seed=0)
    rows = []
    for name, models in list_designs(parent, *variant_union(spaces), shape.num_hidden_layers):
        mean, largest = spread_of_predictions(models, predicted, parent, args.engines)
        rows.append((name, str(len(models)), f"{mean:.2f}", f"{largest:.2f}"))
    print(text_table(("design", "models", "error", "largest"), rows))


if __name__ == "__main__":
    main()
