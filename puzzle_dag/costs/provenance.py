"""Where measured costs come from: what a cost file tells about itself, so that it can be trusted on another machine."""

from dataclasses import dataclass
from typing import Any

from puzzle_dag.model.configuration_puzzle_dag import PuzzleDagConfig
from puzzle_dag.store import fingerprint

_SHAPE_FIELDS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size",
    "hidden_act", "tie_word_embeddings", "qkv_bias", "o_bias", "mlp_bias", "qk_norm", "sliding_window", "layer_types",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """Which parent's shape was measured, on what, with what, when and how."""

    shape_digest: str
    """Digest of the parent's shape: two parents of one shape cost the same."""
    shape: dict[str, Any]
    """That shape: hidden size, heads, widths and what else decides what a block costs."""
    hardware: str
    """Processor or GPU."""
    driver: str | None
    """Version of the GPU's driver; None on CPUs and where an older version of this package measured."""
    engine_version: str
    """Distribution and version of the engine."""
    package: str | None
    """Version and commit of this package; None where an older version of it measured."""
    first_measured_at: str | None
    """When the oldest of the measurements was made, ISO 8601 in UTC; None where that was not kept."""
    last_measured_at: str | None
    """When the newest was made."""
    num_probes: int
    """Different models."""
    num_engines: int
    """Engines they were measured in."""
    engine_bytes: int | None
    """Memory that an engine took beside weights and KV cache: the median over the engines. On CPUs resident memory, vLLM's code and
    libraries included; on GPUs what was in use on one GPU."""
    engine_peak_bytes: int | None = None
    """Most memory that one engine's process held, weights and KV cache included; None where it was not kept."""
    capacity: tuple[dict[str, Any], ...] = ()
    """KV cache by arithmetic beside what the engine reported, an entry a model."""
    imported_from: str | None = None
    """Name of the file that was imported; None for what was measured here."""
    imported_at: str | None = None
    """When, ISO 8601 in UTC."""

    @staticmethod
    def from_json(content: dict[str, Any]) -> "Provenance":
        """Read what `dataclasses.asdict` and JSON made of one. Raises TypeError or KeyError for anything else."""
        return Provenance(**{**content, "capacity": tuple(content["capacity"])})


def describe_shape(shape: PuzzleDagConfig) -> dict[str, Any]:
    """Return what of a parent's configuration decides what its blocks cost."""
    fields = shape.to_dict()
    return {name: fields.get(name) for name in _SHAPE_FIELDS}


def digest_shape(shape: PuzzleDagConfig) -> str:
    """Return the digest of a parent's shape."""
    return fingerprint(describe_shape(shape))
