from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from puzzle_dag.architecture import Block
from puzzle_dag.children.assemble import PieceMismatchError, assemble_child, build_child, model_digest, num_parameters
from puzzle_dag.config import ParentSource
from puzzle_dag.model.checkpoint import load_checkpoint
from puzzle_dag.model.parent import Parent, load_parent
from puzzle_dag.pieces import LayerPieces, PieceMissingError
from puzzle_dag.store import ArtifactStore, fingerprint

ROWS = torch.randint(0, 600, (2, 20), generator=torch.Generator().manual_seed(0))


def load(folder: Path) -> Parent:
    return load_parent(ParentSource(path=str(folder)), Path("/"))


@pytest.fixture(scope="module")
def parent(micro_parent_folder: Path) -> Parent:
    return load(micro_parent_folder)


def own_pieces(parent: Parent) -> list[LayerPieces]:
    names = {f"attention/{parent.block.attention.name}": "a", f"ffn/{parent.block.ffn.name}": "f"}
    return [LayerPieces(layer, {}, names) for layer in range(parent.num_layers)]


def store_piece(store: ArtifactStore, pieces: list[LayerPieces], layer: int, name: str, state: dict[str, Tensor]) -> None:
    pieces[layer].artifacts[name] = store.write_tensors("piece", fingerprint([layer, name]), state, inputs=[layer, name])


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@torch.no_grad()
def test_parent_blocks_alone_give_the_parents_logits_bit_for_bit(
    family: str, family_parent_folder: dict[str, Path], tmp_path: Path
) -> None:
    parent = load(family_parent_folder[family])
    assemble_child(parent, (parent.block,) * 2, own_pieces(parent), tmp_path / "child")
    original = AutoModelForCausalLM.from_pretrained(family_parent_folder[family])
    child = load_checkpoint(tmp_path / "child")
    assert torch.equal(child(input_ids=ROWS).logits, original(input_ids=ROWS).logits)


@torch.no_grad()
def test_chosen_pieces_are_in_their_places(parent: Parent, tmp_path: Path) -> None:
    """Against the same child made by hand from the parent's own Hugging Face class."""
    generator = torch.Generator().manual_seed(3)
    store, pieces = ArtifactStore(tmp_path / "store"), own_pieces(parent)
    linear = 0.1 * torch.randn(64, 64, generator=generator)
    norm = 1 + 0.1 * torch.randn(64, generator=generator)
    store_piece(store, pieces, 0, "ffn/linear", {"post_attention_layernorm.weight": norm, "mlp.linear_mlp.weight": linear})
    narrow = {k: v for k, v in parent.layer_state(1, "ffn").items()}
    narrow["mlp.gate_proj.weight"], narrow["mlp.up_proj.weight"] = narrow["mlp.gate_proj.weight"][:32], narrow["mlp.up_proj.weight"][:32]
    narrow["mlp.down_proj.weight"] = narrow["mlp.down_proj.weight"][:, :32]
    store_piece(store, pieces, 1, "ffn/w32", narrow)
    architecture = (Block.parse("kv4/linear"), Block.parse("noop/w32"))
    assemble_child(parent, architecture, pieces, tmp_path / "child")
    child = load_checkpoint(tmp_path / "child")

    reference = LlamaForCausalLM.from_pretrained(parent.folder)
    first, second = reference.model.layers

    def linear_ffn(hidden: Tensor) -> Tensor:
        return torch.nn.functional.linear(hidden, linear)

    first.post_attention_layernorm.weight.copy_(norm)
    first.mlp.forward = linear_ffn
    second.mlp.down_proj.weight[:, 32:] = 0
    second.self_attn.o_proj.weight.zero_()
    torch.testing.assert_close(child(input_ids=ROWS).logits, reference(input_ids=ROWS).logits, rtol=0, atol=2e-5)
    assert not any("1.self_attn" in name or "1.input_layernorm" in name for name, _ in child.named_parameters())


def test_digest_is_that_of_the_saved_child_and_says_what_differs(parent: Parent, tmp_path: Path) -> None:
    pieces = own_pieces(parent)
    full, short = (parent.block,) * 2, (parent.block, Block.parse("kv4/noop"))
    digest = assemble_child(parent, full, pieces, tmp_path / "full")
    assert digest == model_digest(load_checkpoint(tmp_path / "full"))
    assert digest == assemble_child(parent, full, pieces, tmp_path / "again")
    assert digest != assemble_child(parent, short, pieces, tmp_path / "full")  # and the old folder is replaced
    assert num_parameters(load_checkpoint(tmp_path / "full")) < num_parameters(parent.model)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again", "full"]


def test_head_stays_tied(family_parent_folder: dict[str, Path], tmp_path: Path) -> None:
    parent = load(family_parent_folder["qwen3"])
    child = build_child(parent, (parent.block,) * 2, own_pieces(parent))
    assert child.lm_head.weight is child.model.embed_tokens.weight
    assert num_parameters(child) == num_parameters(AutoModelForCausalLM.from_pretrained(parent.folder))


def test_what_does_not_fit_is_refused(parent: Parent, tmp_path: Path) -> None:
    pieces = own_pieces(parent)
    with pytest.raises(PieceMissingError, match="layer 1: ffn/w32 was never made"):
        assemble_child(parent, (parent.block, Block.parse("kv4/w32")), pieces, tmp_path / "child")
    with pytest.raises(ValueError, match=r"layers \[0\] given"):
        assemble_child(parent, (parent.block,) * 2, pieces[:1], tmp_path / "child")
    with pytest.raises(ValueError, match="3 layers"):
        assemble_child(parent, (parent.block,) * 3, pieces, tmp_path / "child")
    store_piece(ArtifactStore(tmp_path / "store"), pieces, 1, "ffn/w32", {"mlp.linear_mlp.weight": torch.zeros(64, 64)})
    with pytest.raises(PieceMismatchError, match="don't fit"):
        assemble_child(parent, (parent.block, Block.parse("kv4/w32")), pieces, tmp_path / "child")
    assert not (tmp_path / "child").exists()


def test_a_failed_write_leaves_the_old_child(parent: Parent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = own_pieces(parent)
    digest = assemble_child(parent, (parent.block,) * 2, pieces, tmp_path / "child")

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    broken = replace(parent, tokenizer=type("Tokenizer", (), {"save_pretrained": full_disk})())
    with pytest.raises(OSError, match="No space"):
        assemble_child(broken, (Block.parse("noop/noop"),) * 2, pieces, tmp_path / "child")
    assert model_digest(load_checkpoint(tmp_path / "child")) == digest
    assert [p.name for p in tmp_path.iterdir()] == ["child"]
