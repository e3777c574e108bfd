import itertools
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from puzzle_dag.architecture import Block
from puzzle_dag.children import losses
from puzzle_dag.children.assemble import assemble_child, model_digest, num_parameters
from puzzle_dag.children.divergence import estimate, measure_divergence
from puzzle_dag.children.losses import cosine_loss, distillation_kl
from puzzle_dag.children.uptrain import learning_rate_at, uptrain_child
from puzzle_dag.config import ParentSource, UptrainSettings
from puzzle_dag.model.checkpoint import load_checkpoint
from puzzle_dag.model.parent import Parent, load_parent
from puzzle_dag.pieces import LayerPieces

SETTINGS = UptrainSettings(rows_per_step=8, learning_rate=2e-3)
GENERATOR = torch.Generator().manual_seed(0)
ROWS = torch.randint(0, 600, (164, 24), generator=GENERATOR)
HELDOUT = torch.randint(0, 600, (24, 24), generator=GENERATOR)


@pytest.fixture(scope="module")
def parent(micro_parent_folder: Path) -> Parent:
    return load_parent(ParentSource(path=str(micro_parent_folder)), Path("/"))


@pytest.fixture(scope="module")
def child_folder(parent: Parent, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The parent without its first attention and its second FFN."""
    pieces = [LayerPieces(i, {}, {"attention/kv4": "a", "ffn/w128": "f"}) for i in range(2)]
    folder = tmp_path_factory.mktemp("children") / "child"
    assemble_child(parent, (Block.parse("noop/w128"), Block.parse("kv4/noop")), pieces, folder)
    return folder


def test_kl_and_its_gradient_agree_with_autograd_in_float64() -> None:
    child = torch.randn(3, 5, 17, generator=torch.Generator().manual_seed(1), requires_grad=True)
    parent = 2 * torch.randn(3, 5, 17, generator=torch.Generator().manual_seed(2))
    (3 * distillation_kl(child, parent)).backward()
    exact = child.detach().double().requires_grad_()
    kl = functional.kl_div(exact.log_softmax(-1), parent.double().log_softmax(-1), reduction="none", log_target=True).sum(-1).mean()
    (3 * kl).backward()
    assert exact.grad is not None
    assert float(distillation_kl(child.detach(), parent)) == pytest.approx(kl.item(), rel=1e-5)
    torch.testing.assert_close(child.grad, exact.grad.float(), rtol=1e-4, atol=1e-7)


def test_cosine_loss_is_a_sum_over_layers_of_means_over_positions() -> None:
    right = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    left = torch.tensor([[[-1.0, 0.0], [0.0, 3.0]]])
    assert float(cosine_loss((right,), (right,))) == pytest.approx(0.0, abs=1e-6)
    assert float(cosine_loss((right, right), (left, left))) == pytest.approx(2.0)  # opposite: 2, same direction: 0


def test_cosine_gradient_agrees_with_autograd_in_float64() -> None:
    generator = torch.Generator().manual_seed(5)
    child = torch.randn(4, 7, 33, generator=generator, requires_grad=True)
    parent = child.detach() + torch.randn(4, 7, 33, generator=generator)
    (2 * cosine_loss((child, 3 * child), (parent, parent))).backward()
    exact = child.detach().double().requires_grad_()
    expected = sum((1 - functional.cosine_similarity(c, parent.double(), dim=-1)).mean() for c in (exact, 3 * exact))
    (2 * expected).backward()  # type: ignore[union-attr]
    assert exact.grad is not None
    torch.testing.assert_close(child.grad, exact.grad.float(), rtol=1e-4, atol=1e-7)


def test_kl_in_slices_is_the_kl_in_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    child, parent = torch.randn(2, 13, 50, 17, generator=torch.Generator().manual_seed(6))
    whole = distillation_kl(child, parent)
    monkeypatch.setitem(losses._SLICE_ELEMENTS, "cpu", 17 * 100)
    assert float(distillation_kl(child, parent)) == pytest.approx(float(whole), rel=1e-6)
    child.requires_grad_()
    distillation_kl(child, parent).backward()
    torch.testing.assert_close(child.grad, (child.softmax(-1) - parent.softmax(-1)).detach() / (13 * 50), rtol=1e-4, atol=1e-8)


def test_learning_rate_warms_up_and_falls() -> None:
    rates = [learning_rate_at(step, 100, 1.0) for step in range(100)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert all(a >= b for a, b in itertools.pairwise(rates[4:]))
    assert rates[-1] == pytest.approx(0.05, abs=2e-3)
    assert learning_rate_at(0, 1, 1.0) == 1.0


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_uptraining_brings_the_child_nearer_on_text_it_did_not_see(
    compute_dtype: str, parent: Parent, child_folder: Path, tmp_path: Path
) -> None:
    arguments = (parent, child_folder, ROWS, SETTINGS, tmp_path / "out")
    report = uptrain_child(*arguments, compute_dtype=compute_dtype, work_folder=tmp_path / "work")
    before = measure_divergence(parent.model, load_checkpoint(child_folder), HELDOUT)
    after = measure_divergence(parent.model, load_checkpoint(tmp_path / "out"), HELDOUT)
    assert after.kl.mean < 0.9 * before.kl.mean
    assert report.num_steps == len(report.curve) == 21 and report.num_tokens == ROWS.numel()
    assert report.curve[-1].tokens == ROWS.numel()
    assert report.curve[0].kl == pytest.approx(before.kl.mean, rel=0.2)
    assert report.curve[-1].cosine < report.curve[0].cosine
    assert report.flops == (6 * num_parameters(load_checkpoint(child_folder)) + 2 * num_parameters(parent.model)) * ROWS.numel()
    assert report.flops_per_s > 0
    assert report.digest == model_digest(load_checkpoint(tmp_path / "out"))
    assert load_checkpoint(tmp_path / "out").lm_head.weight.dtype == parent.model.lm_head.weight.dtype


class Interrupted(Exception):
    """Stands for a lost machine."""


def test_an_interrupted_run_ends_where_an_uninterrupted_one_does(parent: Parent, child_folder: Path, tmp_path: Path) -> None:
    def stop_late(done: int, total: int, unit: str) -> None:
        if done >= 0.7 * total:
            raise Interrupted

    options = {"compute_dtype": "float32", "steps_per_save": 4}
    whole = uptrain_child(parent, child_folder, ROWS, SETTINGS, tmp_path / "whole", work_folder=tmp_path / "w1", **options)
    arguments = (parent, child_folder, ROWS, SETTINGS, tmp_path / "resumed")
    with pytest.raises(Interrupted):
        uptrain_child(*arguments, work_folder=tmp_path / "w2", progress=stop_late, **options)
    assert not (tmp_path / "resumed").exists() and list((tmp_path / "w2").iterdir())
    steps: list[int] = []
    resumed = uptrain_child(*arguments, work_folder=tmp_path / "w2", progress=lambda done, *_: steps.append(done), **options)
    assert len(steps) == 21 - 12  # the last state before the interruption at step 15 is that of step 12
    assert [p.step for p in resumed.curve] == list(range(1, 22))
    assert [p.kl for p in resumed.curve] == pytest.approx([p.kl for p in whole.curve], rel=1e-4)
    weights = dict(load_checkpoint(tmp_path / "whole").named_parameters())
    for name, tensor in load_checkpoint(tmp_path / "resumed").named_parameters():
        torch.testing.assert_close(tensor, weights[name], rtol=1e-4, atol=1e-5)
    assert not list((tmp_path / "w2").iterdir())


def test_the_state_of_another_run_is_not_gone_on_from(parent: Parent, child_folder: Path, tmp_path: Path) -> None:
    def stop(done: int, total: int, unit: str) -> None:
        if done >= 0.5 * total:
            raise Interrupted

    options = {"compute_dtype": "float32", "work_folder": tmp_path / "work", "steps_per_save": 2}
    with pytest.raises(Interrupted):
        uptrain_child(parent, child_folder, ROWS, SETTINGS, tmp_path / "out", progress=stop, **options)
    other = SETTINGS.model_copy(update={"seed": 1})
    steps: list[int] = []
    uptrain_child(parent, child_folder, ROWS, other, tmp_path / "out", progress=lambda done, *_: steps.append(done), **options)
    assert len(steps) == 21


def test_no_tokens_means_a_copy_that_says_so(parent: Parent, child_folder: Path, tmp_path: Path) -> None:
    none = torch.zeros(0, 24, dtype=torch.int64)
    report = uptrain_child(parent, child_folder, none, SETTINGS, tmp_path / "out", compute_dtype="float32", work_folder=tmp_path / "work")
    assert (report.num_tokens, report.num_steps, report.curve, report.flops_per_s) == (0, 0, [], 0.0)
    assert report.digest == model_digest(load_checkpoint(child_folder)) == model_digest(load_checkpoint(tmp_path / "out"))


def test_tied_embeddings_stay_tied(family_parent_folder: dict[str, Path], tmp_path: Path) -> None:
    parent = load_parent(ParentSource(path=str(family_parent_folder["qwen3"])), Path("/"))
    pieces = [LayerPieces(i, {}, {"attention/kv4": "a", "ffn/w128": "f"}) for i in range(2)]
    assemble_child(parent, (parent.block, Block.parse("noop/w128")), pieces, tmp_path / "child")
    uptrain_child(parent, tmp_path / "child", ROWS[:32], SETTINGS, tmp_path / "out", compute_dtype="float32", work_folder=tmp_path / "work")
    child, before = load_checkpoint(tmp_path / "out"), load_checkpoint(tmp_path / "child")
    assert child.lm_head.weight is child.model.embed_tokens.weight
    assert not torch.equal(child.lm_head.weight, before.lm_head.weight)
    assert num_parameters(child) == num_parameters(before)


@torch.no_grad()
def test_divergence_is_what_plain_float64_gives(parent: Parent, child_folder: Path) -> None:
    child = load_checkpoint(child_folder)
    found = measure_divergence(parent.model, child, HELDOUT, rows_per_batch=5)
    logp, logq = (m(input_ids=HELDOUT).logits.double().log_softmax(-1) for m in (parent.model, child))
    kl = (logp.exp() * (logp - logq)).sum(-1)

    def loss(log_probabilities: Tensor) -> float:
        return float(functional.nll_loss(log_probabilities[:, :-1].flatten(0, 1), HELDOUT[:, 1:].flatten()))

    assert found.kl.mean == pytest.approx(float(kl.mean()), rel=1e-4)
    assert found.kl.stderr == pytest.approx(float(kl.mean(1).std()) / math.sqrt(24), rel=1e-3)
    assert found.lm_loss.mean == pytest.approx(loss(logq), rel=1e-5)
    assert found.parent_lm_loss.mean == pytest.approx(loss(logp), rel=1e-5)
    assert found.top1_agreement.mean == pytest.approx(float((logp.argmax(-1) == logq.argmax(-1)).double().mean()))
    assert found.num_tokens == HELDOUT.numel()
    same = measure_divergence(parent.model, parent.model, HELDOUT[:2])
    assert same.kl.mean == pytest.approx(0.0, abs=1e-7) and same.top1_agreement.mean == 1.0


def test_nothing_to_compare_is_an_error_and_one_row_has_no_error_bar(parent: Parent) -> None:
    with pytest.raises(ValueError, match="at least one row"):
        measure_divergence(parent.model, parent.model, HELDOUT[:0])
    assert math.isnan(estimate(torch.tensor([1.0])).stderr)
