"""What the library makes and others use: a layer's trained variants, and the activations that they were made from.

A *piece* is one variant's tensors, under the parent's tensor names relative to the layer
(`self_attn.q_proj.weight`). Shared by the stages, so that search and children need not import the library.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from puzzle_dag.store import Artifact, ArtifactStore

if TYPE_CHECKING:
    from torch import Tensor

Place = Literal["attention", "ffn"]
Split = Literal["train", "score"]

PIECE_KIND = "piece"
"""Kind of a piece in the artifact store."""

NOOP = "noop"
"""Name and digest of the variant that has no tensors."""


class PieceMissingError(ValueError):
    """A piece that a manifest or a search names but the store doesn't have."""


def piece_name(place: Place, variant_name: str) -> str:
    """Return the name of a variant at its place: "attention/kv4", "ffn/w384"."""
    return f"{place}/{variant_name}"


@dataclass(frozen=True, slots=True)
class LayerPieces:
    """One layer's variants: those made by the library as artifacts, the parent's own by their digest only."""

    layer: int
    """Index of the layer."""
    artifacts: dict[str, Artifact]
    """"attention/kv4" -> artifact, for each variant that is neither the parent's own nor a no-op."""
    parents: dict[str, str] = field(default_factory=dict)
    """"attention/kv8" -> digest of the parent's layer and the place; two entries, one a place."""
    fused: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """"ffn/w1536" -> the layers whose own FFNs stand side by side as this one, where a run was fused into this layer."""

    def is_parent(self, place: Place, variant_name: str) -> bool:
        """Say whether the variant is the parent's own, whose tensors come from the parent."""
        return piece_name(place, variant_name) in self.parents

    def state(self, place: Place, variant_name: str) -> "dict[str, Tensor]":
        """Return a variant's tensors by layer-relative name; empty for a no-op.

        Raises:
            PieceMissingError: the variant is the parent's own or made of its FFNs (use `Parent.layer_state`), or was never made.
        """
        if variant_name == NOOP:
            return {}
        name = piece_name(place, variant_name)
        if name in self.parents:
            raise PieceMissingError(f"layer {self.layer}: {name} is the parent's own; read it with Parent.layer_state")
        return self._artifact(name).tensors()

    def digest(self, place: Place, variant_name: str) -> str:
        """Return the digest of a variant's tensors; "noop" for a no-op. Raises PieceMissingError."""
        if variant_name == NOOP:
            return NOOP
        name = piece_name(place, variant_name)
        return self.parents[name] if name in self.parents else self._artifact(name).digest

    def to_json(self) -> dict[str, Any]:
        """Return the manifest: what `from_json` needs to find the pieces again, free of paths."""
        return {
            "layer": self.layer,
            "artifacts": {n: {"key": a.folder.name, "digest": a.digest} for n, a in sorted(self.artifacts.items())},
            "parents": dict(sorted(self.parents.items())),
        }

    @staticmethod
    def from_json(store: ArtifactStore, content: Mapping[str, Any]) -> "LayerPieces":
        """Find the pieces of a manifest in the store.

        Raises:
            PieceMissingError: one is gone from the store, or was replaced since (another digest).
        """
        artifacts = {}
        for name, entry in content["artifacts"].items():
            artifact = store.find(PIECE_KIND, entry["key"])
            if artifact is None or artifact.digest != entry["digest"]:
                gone = "was deleted from" if artifact is None else "was replaced in"
                raise PieceMissingError(f"layer {content['layer']}: {name} {gone} the store; build the layer's library again")
            artifacts[name] = artifact
        return LayerPieces(content["layer"], artifacts, dict(content["parents"]))

    def _artifact(self, name: str) -> Artifact:
        if name not in self.artifacts:
            there = ", ".join(sorted({*self.artifacts, *self.parents}))
            raise PieceMissingError(f"layer {self.layer}: {name} was never made; there are: {there}")
        return self.artifacts[name]


class ActivationCacheLike(Protocol):
    """Cached hidden states of the parent; `puzzle_dag.library.activations.ActivationCache` is one."""

    @property
    def num_layers(self) -> int:
        """Number of the parent's layers; there are `num_layers + 1` boundaries."""
        ...

    @property
    def digest(self) -> str:
        """Digest of the content, both splits."""
        ...

    def num_rows(self, split: Split) -> int:
        """Return the number of rows of a split."""
        ...

    def tokens(self, split: Split) -> "Tensor":
        """Return the token ids, int64 [rows, row_length]."""
        ...

    def hidden(self, split: Split, boundary: int, *, start: int = 0, stop: int | None = None) -> "Tensor":
        """Return rows `start` to `stop` (all) of the states that enter layer `boundary`, [rows, row_length, hidden]."""
        ...
