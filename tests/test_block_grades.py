"""Grades of blocks against lm-eval on whole assembled children, and what of it is run once, stored, and refused."""

from pathlib import Path

import pytest
import torch

from puzzle_dag.architecture import FFN, Attention, Block, LayerSpace, Run
from puzzle_dag.children import shared_prefix
from puzzle_dag.children.assemble import build_child
from puzzle_dag.children.block_grades import BlockGrade, Replacement, TaskScoreError, grade_blocks, list_replacements
from puzzle_dag.children.evaluate import TaskResult, evaluate_model, make_result
from puzzle_dag.children.shared_prefix import OtherRequestsError, SharedPrefix
from puzzle_dag.config import BundledCorpus, ParentSource, TaskScoreSettings
from puzzle_dag.model.parent import Parent, load_parent
from puzzle_dag.pieces import LayerPieces
from puzzle_dag.store import Artifact, ArtifactStore, digest_tensors

CORPUS = BundledCorpus(kind="bundled")
SETTINGS = TaskScoreSettings(tasks=("skill_copy", "skill_recall"), num_items=6, batch_size=4)
SPACE = LayerSpace((Attention("gqa", 4), Attention("noop")), (FFN("swiglu", 128), FFN("linear")))
RUN = Run(0, 1, "fuse")


@pytest.fixture(scope="module")
def parent(micro_parent_folder: Path) -> Parent:
    return load_parent(ParentSource(path=str(micro_parent_folder)), Path())


def make_pieces(layer: int, folder: Path) -> LayerPieces:
    generator = torch.Generator().manual_seed(layer)
    tensors = {"post_attention_layernorm.weight": torch.ones(64), "mlp.linear_mlp.weight": torch.randn(64, 64, generator=generator) * 0.3}
    artifact: Artifact = ArtifactStore(folder / "pieces").write_tensors("piece", digest_tensors(tensors), tensors, inputs=None)
    return LayerPieces(layer, {"ffn/linear": artifact}, {"attention/kv4": f"attention {layer}", "ffn/w128": f"ffn {layer}"})


def replacements(parent: Parent, layer: int, folder: Path) -> list[Replacement]:
    return list_replacements(parent, layer, SPACE, make_pieces(layer, folder), [RUN] if layer == 0 else [])


def plain_grades(parent: Parent, replacement: Replacement, folder: Path) -> dict[str, float]:
    """Assemble the whole child and let lm-eval grade it."""
    names = {"attention/kv4": "a", "ffn/w128": "f"}
    blocks, pieces = [parent.block] * 2, [LayerPieces(i, {}, names) for i in range(2)]
    for offset, (block, own) in enumerate(zip(replacement.blocks, replacement.pieces, strict=True)):
        blocks[replacement.layer + offset], pieces[replacement.layer + offset] = block, own
    child = build_child(parent, tuple(blocks), pieces)
    found = evaluate_model(child, parent.tokenizer, SETTINGS.tasks, SETTINGS.grading, CORPUS, folder / "plain", seed=SETTINGS.seed)
    return {r.task: r.value for r in found}


def grade(parent: Parent, asked: list[Replacement], folder: Path, **options: object) -> list[BlockGrade]:
    settings = options.pop("settings", SETTINGS)
    return grade_blocks(parent, asked, settings, CORPUS, ArtifactStore(folder / "store"), folder / "data", **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("layer", [0, 1])
def test_grades_are_those_of_whole_children(parent: Parent, tmp_path: Path, layer: int) -> None:
    before = {n: t.clone() for n, t in parent.model.state_dict().items()}
    asked = replacements(parent, layer, tmp_path)
    assert asked[0].name == parent.block.name
    grades = grade(parent, asked, tmp_path)
    assert [(g.block, g.task) for g in grades] == [(r.name, t) for r in asked for t in SETTINGS.tasks]
    assert {g.num_items for g in grades} == {SETTINGS.num_items} and {g.layer for g in grades} == {layer}
    for replacement in asked:
        found = {g.task: g.value for g in grades if g.block == replacement.name}
        assert found == plain_grades(parent, replacement, tmp_path), replacement.name
    assert len({g.value for g in grades}) > 1, "blocks that all grade alike would show nothing"
    after = parent.model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before), "the parent is left as it was"


def test_layers_before_the_block_run_once(parent: Parent, tmp_path: Path) -> None:
    calls = {0: 0, 1: 0}
    hooks = [parent.model.model.layers[i].register_forward_hook(lambda *_, i=i: calls.__setitem__(i, calls[i] + 1)) for i in calls]
    try:
        asked = replacements(parent, 1, tmp_path)
        grade(parent, asked[:1], tmp_path)
        one_pass, calls[0] = calls[0], 0
        grade(parent, asked, tmp_path, regrade=True)
        assert one_pass > 0 and calls[0] == one_pass, f"{len(asked)} blocks, one pass through layer 0"
    finally:
        for hook in hooks:
            hook.remove()


def test_only_missing_grades_are_computed(parent: Parent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, told = replacements(parent, 0, tmp_path), list[tuple[int, int, str]]()
    first = grade(parent, asked, tmp_path, progress=lambda *said: told.append(said))
    assert told[0] == (0, len(asked), "blocks") and told[-1] == (len(asked), len(asked), "blocks")
    monkeypatch.setattr("puzzle_dag.children.block_grades.evaluate_model", lambda *_, **__: pytest.fail("all is in the store"))
    assert grade(parent, asked, tmp_path) == first
    # The parent's own block is one model in every layer.
    own = grade(parent, replacements(parent, 1, tmp_path)[:1], tmp_path)
    assert [(g.value, g.block) for g in own] == [(g.value, g.block) for g in first[:2]] and {g.layer for g in own} == {1}


def test_grades_of_another_library_are_not_those_of_todays(parent: Parent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = TaskScoreSettings(tasks=("skill_copy", "stdlib_cloze"), num_items=2)
    asked, graded = replacements(parent, 0, tmp_path)[:1], list[tuple[str, ...]]()

    def answer(model: object, tokenizer: object, names: tuple[str, ...], *_: object, **__: object) -> list[TaskResult]:
        graded.append(names)
        return [make_result(name, "acc", [1.0, 0.0], chance=0.25) for name in names]

    monkeypatch.setattr("puzzle_dag.children.block_grades.evaluate_model", answer)
    for text in ("a = 1", "a = 1", "b = 2"):
        monkeypatch.setattr("puzzle_dag.children.tasks.read_stdlib_for", lambda _, text=text: iter([("m.py", text)]))
        grade(parent, asked, tmp_path, settings=settings)
    assert graded == [("skill_copy", "stdlib_cloze"), ("stdlib_cloze",)]


def test_a_killed_run_goes_on(parent: Parent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, graded = replacements(parent, 1, tmp_path), list[int]()

    def die(done: int, total: int, unit: str) -> None:
        graded.append(done)
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        grade(parent, asked, tmp_path, progress=die)
    rest = list[tuple[int, int, str]]()
    found = grade(parent, asked, tmp_path, progress=lambda *said: rest.append(said))
    assert rest[0] == (0, len(asked) - 2, "blocks") and len(found) == len(asked) * len(SETTINGS.tasks)


def test_a_task_without_accuracy_is_refused(parent: Parent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = make_result("wikitext", "bits_per_byte", [1.0, 2.0], chance=None)
    monkeypatch.setattr("puzzle_dag.children.block_grades.evaluate_model", lambda *_, **__: [result])
    settings = TaskScoreSettings(tasks=("wikitext",), num_items=2)
    with pytest.raises(TaskScoreError, match=r"task_scores\.tasks: wikitext gives bits_per_byte"):
        grade(parent, replacements(parent, 0, tmp_path), tmp_path, settings=settings)
    for tasks, message in ((("stdlib_perplexity",), "no accuracy"), (("kl",), "can't be called 'kl'"), ((), "at least 1")):
        with pytest.raises(ValueError, match=message):
            TaskScoreSettings(tasks=tasks)


def test_a_prefix_gives_up_where_requests_may_differ(parent: Parent, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.arange(3, 19).view(2, 8)
    model = parent.model
    prefix = SharedPrefix(model, 1)
    with torch.inference_mode():
        expected = model(input_ids=rows, use_cache=False).logits
        with prefix.using():
            assert torch.equal(model(input_ids=rows, use_cache=False).logits, expected)
        with prefix.using():
            assert torch.equal(model(input_ids=rows, use_cache=False).logits, expected)
            with pytest.raises(OtherRequestsError):
                model(input_ids=rows[:1], use_cache=False)
        generating = SharedPrefix(model, 1)
        with generating.using():
            model(input_ids=rows, use_cache=True)
        monkeypatch.setattr(shared_prefix, "MOST_BYTES", 100)
        large = SharedPrefix(model, 1)
        with large.using():
            model(input_ids=rows, use_cache=False)
    assert prefix.is_shareable and not generating.is_shareable and not large.is_shareable and not SharedPrefix(model, 0).is_shareable
    with torch.inference_mode(), large.using():
        assert torch.equal(model(input_ids=rows, use_cache=False).logits, expected)


def test_blocks_of_layers_and_runs_are_listed(parent: Parent, tmp_path: Path) -> None:
    asked = replacements(parent, 0, tmp_path)
    assert [r.name for r in asked] == ["kv4/w128", "kv4/linear", "noop/linear", "noop/w128", "fuse_0-1"]
    assert asked[-1].blocks[0] == Block.parse("kv4/w256") and len({r.digest for r in asked}) == len(asked)
    assert asked[0].digest == "" == replacements(parent, 1, tmp_path)[0].digest
