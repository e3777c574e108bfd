"""A small parent, its library and its hidden states, held in memory, for the tests of scores."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from puzzle_dag.architecture import FFN, Attention, Block, LayerSpace
from puzzle_dag.model.checkpoint import child_config
from puzzle_dag.model.configuration_puzzle_dag import PuzzleDagConfig
from puzzle_dag.model.modeling_puzzle_dag import PuzzleDagForCausalLM
from puzzle_dag.model.parent import Parent
from puzzle_dag.pieces import LayerPieces
from puzzle_dag.store import Artifact, ArtifactStore, digest_tensors

PARENT_BLOCK = Block(Attention("gqa", 4), FFN("swiglu", 96))
SPACE = LayerSpace(
    (Attention("gqa", 2), Attention("gqa", 4), Attention("linear"), Attention("noop")),
    (FFN("linear"), FFN("noop"), FFN("swiglu", 32), FFN("swiglu", 96)),
)


@dataclass
class Cache:
    """Hidden states in the place of those on disk, with a record of what was read."""

    states: list[Tensor]
    rows: Tensor
    reads: list[int] = field(default_factory=list)
    digest: str = "activations"

    @property
    def num_layers(self) -> int:
        return len(self.states) - 1

    def num_rows(self, split: str) -> int:
        return len(self.rows)

    def tokens(self, split: str) -> Tensor:
        assert split == "score", "scores must not be taken on what was trained on"
        return self.rows

    def hidden(self, split: str, boundary: int, *, start: int = 0, stop: int | None = None) -> Tensor:
        assert split == "score"
        self.reads.append(boundary)
        return self.states[boundary][start:stop]


def make_parent(*, sliding: bool = False) -> Parent:
    torch.manual_seed(0)
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    extra = {"sliding_window": 5, "layer_types": kinds} if sliding else {}
    config = PuzzleDagConfig(
        vocab_size=61,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=16,
        initializer_range=0.15,
        tie_word_embeddings=False,
        **extra,
    )
    model = PuzzleDagForCausalLM(child_config(config, (PARENT_BLOCK,) * 3)).eval()
    return Parent(model, None, PARENT_BLOCK, "parent", Path(), ("a", "b", "c"))


def make_pieces(parent: Parent, layer: int, folder: Path, *, seed: int = 3) -> LayerPieces:
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "attention/kv2": {
            "input_layernorm.weight": (64,),
            "self_attn.q_proj.weight": (64, 64),
            "self_attn.k_proj.weight": (32, 64),
            "self_attn.v_proj.weight": (32, 64),
            "self_attn.o_proj.weight": (64, 64),
        },
        "attention/linear": {"input_layernorm.weight": (64,), "self_attn.linear_attn.weight": (64, 64)},
        "ffn/w32": {
            "post_attention_layernorm.weight": (64,),
            "mlp.gate_proj.weight": (32, 64),
            "mlp.up_proj.weight": (32, 64),
            "mlp.down_proj.weight": (64, 32),
        },
        "ffn/linear": {"post_attention_layernorm.weight": (64,), "mlp.linear_mlp.weight": (64, 64)},
    }
    store, artifacts = ArtifactStore(folder / "pieces"), dict[str, Artifact]()
    for name, entries in shapes.items():
        tensors = {n: torch.randn(s, generator=generator) * (1.0 if len(s) == 1 else 0.1) for n, s in entries.items()}
        artifacts[name] = store.write_tensors("piece", digest_tensors(tensors), tensors, inputs=None)
    return LayerPieces(layer, artifacts, {"attention/kv4": "own attention", "ffn/w96": "own ffn"})
