"""A layer's library: what is made, what is found again, what a change makes anew, and what is said about it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from puzzle_dag.architecture import FFN, Attention, LayerSpace
from puzzle_dag.config import LibrarySettings, ParentSource
from puzzle_dag.library.activations import ActivationCache, collect_activations
from puzzle_dag.library.build import PieceReport, build_layer, report_rows
from puzzle_dag.model.parent import Parent, load_parent
from puzzle_dag.pieces import LayerPieces, PieceMissingError
from puzzle_dag.store import ArtifactStore

ROW_LENGTH = 16
SETTINGS = LibrarySettings(num_tokens=8 * 6 * ROW_LENGTH, rows_per_step=6, learning_rate=2e-3)
Build = Callable[..., tuple[LayerPieces, list[PieceReport]]]


def space_of(attentions: str, ffns: str) -> LayerSpace:
    return LayerSpace(tuple(map(Attention.parse, attentions.split())), tuple(map(FFN.parse, ffns.split())))


SPACE = space_of("kv1 kv4 linear noop", "w64 w128 linear noop")


@pytest.fixture(scope="module")
def parent(save_parent: Callable[..., Path]) -> Parent:
    folder = save_parent("llama", dtype=torch.bfloat16)
    return load_parent(ParentSource(path=folder.name), folder.parent)


@pytest.fixture(scope="module")
def cache(parent: Parent, tmp_path_factory: pytest.TempPathFactory) -> ActivationCache:
    folder = tmp_path_factory.mktemp("activations")
    rows = torch.randint(0, 500, (60, ROW_LENGTH), generator=torch.Generator().manual_seed(0))
    collect_activations(parent, rows, rows[:1], folder)
    return ActivationCache(folder)


@pytest.fixture
def build(parent: Parent, cache: ActivationCache, tmp_path: Path) -> Build:
    def run(layer: int = 1, space: LayerSpace = SPACE, **changes: Any) -> tuple[LayerPieces, list[PieceReport]]:
        settings = SETTINGS.model_copy(update=changes.pop("settings", {}))
        arguments = {"activations_digest": cache.digest, "compute_dtype": "bfloat16", **changes}
        return build_layer(parent, layer, space, cache, settings, ArtifactStore(tmp_path), **arguments)

    return run


def names(reports: list[PieceReport], *, was_cached: bool) -> set[str]:
    return {f"{r.place}/{r.variant}" for r in reports if r.was_cached is was_cached}


def test_every_variant_but_the_parents_own_is_made(build: Build, parent: Parent) -> None:
    pieces, reports = build()
    assert sorted(pieces.artifacts) == ["attention/kv1", "attention/linear", "ffn/linear", "ffn/w64"]
    assert [f"{r.place}/{r.variant}" for r in reports] == [
        *("attention/kv1", "attention/linear", "attention/noop"),
        *("ffn/w64", "ffn/linear", "ffn/noop"),
    ]
    shapes = {name: tuple(tensor.shape) for name, tensor in pieces.state("attention", "kv1").items()}
    assert shapes == {
        "input_layernorm.weight": (64,),
        "self_attn.q_proj.weight": (128, 64),
        "self_attn.k_proj.weight": (32, 64),
        "self_attn.v_proj.weight": (32, 64),
        "self_attn.o_proj.weight": (64, 128),
    }
    assert set(pieces.state("ffn", "linear")) == {"post_attention_layernorm.weight", "mlp.linear_mlp.weight"}
    assert all(t.dtype == torch.bfloat16 for a in pieces.artifacts.values() for t in a.tensors().values())
    assert pieces.state("ffn", "noop") == {} and pieces.digest("ffn", "noop") == "noop"
    assert pieces.is_parent("attention", "kv4") and pieces.is_parent("ffn", "w128") and not pieces.is_parent("ffn", "w64")
    with pytest.raises(PieceMissingError, match=r"ffn/w128 is the parent's own; read it with Parent\.layer_state"):
        pieces.state("ffn", "w128")
    with pytest.raises(PieceMissingError, match=r"ffn/w32 was never made; there are: .*ffn/w64"):
        pieces.digest("ffn", "w32")


def test_reports_say_how_each_variant_came_out(build: Build) -> None:
    _, reports = build(settings={"num_tokens": 40 * 6 * ROW_LENGTH})
    for report in reports:
        assert report.loss_trained <= report.loss_initial or report.kept == "initialised"
        assert 0 < report.loss_initial < report.branch_loss_initial
        assert report.seconds > 0
        assert (report.num_tokens == 0) == (report.variant == "noop") == (report.curve == [])
    assert any(report.kept == "trained" for report in reports)
    rows = report_rows(1, reports)
    assert len(rows) == 6 and rows[0]["layer"] == 1 and rows[0]["variant"] == "kv1" and "curve" not in rows[0]


def test_nothing_is_made_twice(build: Build) -> None:
    pieces, first = build()
    again, second = build(progress=lambda *_: pytest.fail("nothing is left to do"))
    assert again == pieces
    assert names(second, was_cached=False) == set()
    assert [(r.loss_initial, r.loss_trained, r.seconds, r.curve) for r in second] == [
        (r.loss_initial, r.loss_trained, r.seconds, r.curve) for r in first
    ]


def test_a_width_that_is_added_is_all_that_is_trained_and_comes_out_as_if_it_had_always_been_there(build: Build, tmp_path: Path) -> None:
    before, _ = build()
    wider = space_of("kv1 kv4 linear noop", "w64 w96 w128 linear noop")
    pieces, reports = build(space=wider)
    assert names(reports, was_cached=False) == {"ffn/w96"}
    assert before.artifacts.items() <= pieces.artifacts.items()
    together, reports = build(space=wider, retrain=True)
    assert names(reports, was_cached=True) == set()
    for name, artifact in together.artifacts.items():
        assert artifact.digest == pieces.artifacts[name].digest


def test_a_piece_that_was_deleted_is_missed_and_made_again(build: Build, tmp_path: Path) -> None:
    pieces, _ = build()
    manifest = pieces.to_json()
    assert LayerPieces.from_json(ArtifactStore(tmp_path), manifest) == pieces
    folder = pieces.artifacts["ffn/w64"].folder
    (folder / "manifest.json").unlink()
    with pytest.raises(PieceMissingError, match="layer 1: ffn/w64 was deleted from the store"):
        LayerPieces.from_json(ArtifactStore(tmp_path), manifest)
    _, reports = build()
    assert names(reports, was_cached=False) == {"ffn/w64"}
    assert LayerPieces.from_json(ArtifactStore(tmp_path), manifest).digest("ffn", "w64") == pieces.digest("ffn", "w64")


@pytest.mark.parametrize(
    "change",
    [
        {"settings": {"num_tokens": 0}},
        {"settings": {"learning_rate": 1e-3}},
        {"settings": {"seed": 1}},
        {"settings": {"rows_per_step": 4}},
        {"settings": {"initialisation": "closed_form"}},
        {"activations_digest": "another"},
        {"compute_dtype": "float32"},
        {"layer": 0},
    ],
    ids=lambda change: next(iter(change.get("settings", change))),
)
def test_whatever_determines_a_piece_is_in_its_key(build: Build, change: dict[str, Any]) -> None:
    space = space_of("kv4", "w128 linear")
    build(space=space)
    _, reports = build(space=space, **change)
    assert names(reports, was_cached=False) == {"ffn/linear"}


def test_a_manifest_notices_that_a_piece_was_replaced(build: Build, tmp_path: Path) -> None:
    pieces, _ = build()
    artifact = pieces.artifacts["ffn/w64"]
    ArtifactStore(tmp_path).write_tensors("piece", artifact.folder.name, {"x": torch.zeros(1)}, inputs={})
    with pytest.raises(PieceMissingError, match="ffn/w64 was replaced in the store"):
        LayerPieces.from_json(ArtifactStore(tmp_path), pieces.to_json())


def test_a_space_with_only_the_parents_own_makes_nothing(build: Build) -> None:
    pieces, reports = build(space=space_of("kv4", "w128"))
    assert pieces.artifacts == {} and reports == []
    assert set(pieces.parents) == {"attention/kv4", "ffn/w128"}
    assert pieces.digest("attention", "kv4") != pieces.digest("ffn", "w128")


def test_an_unknown_compute_type_is_refused(build: Build) -> None:
    with pytest.raises(ValueError, match="compute_dtype 'float16' not understood; use one of float32, bfloat16"):
        build(compute_dtype="float16")
