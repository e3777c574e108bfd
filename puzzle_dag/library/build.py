"""A layer's library: each variant from the store where it is there, the missing ones trained together and stored."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from puzzle_dag.architecture import LayerSpace
from puzzle_dag.config import LibrarySettings
from puzzle_dag.library.activations import DTYPES, ActivationCache
from puzzle_dag.library.block import ParentLayer, Variant, place_of
from puzzle_dag.library.distill import Distilled, distill_pieces
from puzzle_dag.library.initialise import State, initialise_pieces
from puzzle_dag.pieces import PIECE_KIND, LayerPieces, Place, piece_name
from puzzle_dag.progress import Progress, silent
from puzzle_dag.store import Artifact, ArtifactStore, fingerprint

if TYPE_CHECKING:
    from puzzle_dag.model.parent import Parent

VERSION = 1


@dataclass(frozen=True, slots=True)
class PieceReport:
    """How one variant came out; the same whether it was made now or before."""

    place: Place
    """Attention or FFN."""
    variant: str
    """Name of the variant."""
    loss_initial: float
    """Held-out MSE(o_parent, o_child) / MSE(o_parent, 0) as initialised."""
    loss_trained: float
    """The same after training (as initialised where nothing was trained)."""
    branch_loss_initial: float
    """The same error over what the block adds to its input, as initialised."""
    branch_loss_trained: float
    """The same after training."""
    kept: Literal["trained", "initialised"]
    """Which of the two is stored: the one with the lower loss."""
    num_tokens: int
    """Tokens it was trained on."""
    seconds: float
    """What it took when it was made."""
    was_cached: bool
    """Whether it was in the store already."""
    curve: list[tuple[int, float]]
    """(tokens, training loss) at up to 50 points."""


def _piece_inputs(
    parent: "Parent", layer: int, variant: Variant, settings: LibrarySettings, activations_digest: str, compute_dtype: str
) -> dict[str, Any]:
    """Return all that determines a piece; its fingerprint is the piece's key."""
    return {
        "version": VERSION,
        "parent_layer": parent.layer_digest(layer),
        "activations": activations_digest,
        "layer": layer,
        "place": place_of(variant),
        "variant": variant.name,
        "settings": settings.model_dump(mode="json"),
        "compute_dtype": compute_dtype,
        "store_dtype": str(next(parent.model.parameters()).dtype),
    }


def _report(variant: Variant, metadata: dict[str, Any], *, was_cached: bool) -> PieceReport:
    curve = [(int(tokens), float(loss)) for tokens, loss in metadata["curve"]]
    return PieceReport(place_of(variant), variant.name, **{**metadata, "curve": curve}, was_cached=was_cached)


def _metadata(result: Distilled) -> dict[str, Any]:
    return {
        "loss_initial": result.initial.block,
        "loss_trained": result.trained.block,
        "branch_loss_initial": result.initial.branch,
        "branch_loss_trained": result.trained.branch,
        "kept": result.kept,
        "num_tokens": result.num_tokens,
        "seconds": result.seconds,
        "curve": [[tokens, loss] for tokens, loss in result.curve],
    }


def _make(
    parent: "Parent",
    layer: int,
    missing: Sequence[Variant],
    cache: ActivationCache,
    settings: LibrarySettings,
    *,
    compute_dtype: str,
    progress: Progress,
) -> dict[Variant, Distilled]:
    frozen = ParentLayer(parent, layer, dtype=DTYPES[compute_dtype], row_length=cache.tokens("train").shape[1])
    started = initialise_pieces(frozen, [v for v in missing if v.kind != "noop"], cache, settings.initialisation)
    states: dict[Variant, State] = {variant: started.get(variant, {}) for variant in missing}
    store_dtype = next(parent.model.parameters()).dtype
    return distill_pieces(frozen, states, cache, settings, store_dtype=store_dtype, progress=progress)


def build_layer(
    parent: "Parent",
    layer: int,
    space: LayerSpace,
    cache: ActivationCache,
    settings: LibrarySettings,
    store: ArtifactStore,
    *,
    activations_digest: str,
    compute_dtype: str,
    retrain: bool = False,
    progress: Progress = silent,
) -> tuple[LayerPieces, list[PieceReport]]:
    """Return all variants of a layer, making those that the store doesn't have, together, in one pass.

    Args:
        parent: the loaded parent; trained pieces get the type of its weights.
        layer: index of the layer.
        space: the layer's variants; the parent's own are taken as they are and never trained.
        cache: the parent's activations.
        settings: initialisation and training.
        store: where pieces are kept, under a key of all that determines them.
        activations_digest: digest of the activations, which goes into the keys.
        compute_dtype: "float32" or "bfloat16".
        retrain: make every variant anew and replace what is stored.
        progress: told the tokens done.

    Returns:
        The pieces, and a report for each variant that isn't the parent's own, no-ops included, in the space's order.

    Raises:
        ValueError: the compute type isn't known, or the activations have one row only.
    """
    if compute_dtype not in DTYPES:
        raise ValueError(f"compute_dtype {compute_dtype!r} not understood; use one of {', '.join(DTYPES)}")
    candidates: tuple[Variant, ...] = space.attentions + space.ffns
    variants = [v for v in candidates if v not in (parent.block.attention, parent.block.ffn)]
    inputs = {v: _piece_inputs(parent, layer, v, settings, activations_digest, compute_dtype) for v in variants}
    found = {} if retrain else {v: a for v in variants if (a := store.find(PIECE_KIND, fingerprint(inputs[v]))) is not None}
    missing = [v for v in variants if v not in found]
    artifacts: dict[Variant, Artifact] = dict(found)
    if missing:
        made = _make(parent, layer, missing, cache, settings, compute_dtype=compute_dtype, progress=progress)
        for variant, result in made.items():
            key = fingerprint(inputs[variant])
            # A no-op has no tensors; it is stored for its losses, so that it isn't judged again.
            artifacts[variant] = store.write_tensors(PIECE_KIND, key, result.state, inputs=inputs[variant], metadata=_metadata(result))
    places: tuple[Place, ...] = ("attention", "ffn")
    own = {"attention": parent.block.attention.name, "ffn": parent.block.ffn.name}
    pieces = LayerPieces(
        layer,
        {piece_name(place_of(v), v.name): a for v, a in artifacts.items() if v.kind != "noop"},
        {piece_name(place, own[place]): fingerprint({"layer": parent.layer_digest(layer), "place": place}) for place in places},
    )
    return pieces, [_report(v, artifacts[v].metadata, was_cached=v in found) for v in variants]


def report_rows(layer: int, reports: Sequence[PieceReport]) -> list[dict[str, Any]]:
    """Return reports as flat rows for a table: one a variant, without the curve."""
    return [{"layer": layer, **{k: v for k, v in asdict(report).items() if k != "curve"}} for report in reports]
