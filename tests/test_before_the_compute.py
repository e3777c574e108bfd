"""What a refresh finds before any compute: a full disk, too little text, too few items. Nothing runs then."""

import random
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
from micro_project import Project, make_project

from assets.disk import bytes_to_write
from assets.plan import make_plan
from assets.shortage import check_text
from puzzle_dag.config import ConfigError
from puzzle_dag.corpus import tokens
from puzzle_dag.corpus.tokens import CorpusTooShortError
from puzzle_dag.preflight import DiskFullError

LIBRARY = ("corpus", "parent", "search_space", "tokens", "parent_activations", "block_library")


def test_a_full_disk_is_found_though_there_are_results_already(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    before, record = project.profile_file.read_text(), project.workspace.shelf.path("uptrained_child", "micro-light")
    made = record.read_text()
    # The margin is free, and not a byte more.
    monkeypatch.setattr("shutil.disk_usage", lambda _: namedtuple("usage", "total used free")(2**40, 0, 2**28))
    assert project.refresh().ran == [], "what is there needs no room"
    with project.instance() as instance:
        num_runs = instance.get_runs_count()
    record.unlink()
    with pytest.raises(DiskFullError, match=r"^the healed children and the state .* need 0\.2\d GiB"):
        project.refresh()
    record.write_text(made)
    project.edit(project.profile_file, tokens__scores=512)
    with pytest.raises(DiskFullError, match=r"^the parent's activations need"):
        project.refresh()
    project.profile_file.write_text(before)
    project.edit(project.profile_file, library__learning_rate=0.002)  # all pieces anew, beside those that are there
    refused = project.refresh(select=LIBRARY)
    assert [str(o.item) for o in refused.of("failed")] == ["block_library[L00]", "block_library[L01]"] and not refused.ran
    assert "DiskFullError: the library's variants need" in refused.of("failed")[0].reasons[0]
    project.profile_file.write_text(before)
    assert project.refresh(remake=["tables"]).ran == ["tables"], "what writes little is not kept from running"
    with project.instance() as instance:
        assert instance.get_runs_count() == num_runs + 1


def test_what_the_large_stages_write_is_estimated_from_the_parents_shape(project: Project) -> None:
    plan, parent = make_plan(project.root, "micro"), project.workspace.load_parent().model
    stored = sum(f.stat().st_size for f in (project.root / "var" / "store" / "piece").rglob("*.safetensors"))
    assert bytes_to_write(plan, project.workspace, "block_library", ["L00", "L01"]) == pytest.approx(stored, rel=0.05)
    num_parameters = sum(p.numel() for p in parent.parameters())
    children = ["micro-small", "micro-light"]
    assert bytes_to_write(plan, project.workspace, "child", children) == 2 * num_parameters * 4
    assert bytes_to_write(plan, project.workspace, "uptrained_child", children) == num_parameters * (2 * 4 + 24)
    assert bytes_to_write(plan, project.workspace, "parent_activations", [None]) == 0, "they take the place of those that are there"
    assert bytes_to_write(plan, project.workspace, "accuracy", children) == bytes_to_write(plan, project.workspace, "child", []) == 0


@pytest.fixture
def on_text(micro_parent_folder: Path, tmp_path: Path) -> Project:
    """A project on 40 small files of text, which is enough for everything but a long healing."""
    project, rng = make_project(tmp_path / "text", micro_parent_folder), random.Random(0)
    (project.root / "texts").mkdir()
    for i in range(40):
        (project.root / "texts" / f"{i}.txt").write_text(" ".join(str(rng.randint(0, 999)) for _ in range(120)))
    project.edit(project.profile_file, corpus={"kind": "text", "files": "texts/*.txt"})
    return project


def test_too_little_text_for_a_childs_healing_is_found_before_anything_runs(on_text: Project) -> None:
    file = on_text.root / "conf" / "scenarios" / "micro-light.yaml"
    on_text.edit(file, uptrain={"tokens": 1_000_000})
    with pytest.raises(CorpusTooShortError, match=r"light.yaml, line \d+: .*'uptrain' is 1000000 tokens, the corpus gives \d+; lower"):
        on_text.refresh()
    with on_text.instance() as instance:
        assert instance.get_runs_count() == 0
    assert on_text.refresh(select=["corpus"]).ran == ["corpus"], "what reads no text is not kept from running"
    on_text.edit(file, uptrain={"tokens": 20})
    with pytest.raises(ConfigError, match=r"light.yaml, line \d+: uptrain.tokens is 20, less than one row of 32; give 0, or at"):
        on_text.refresh()


def test_too_little_text_for_the_library_is_found_before_anything_runs(on_text: Project) -> None:
    on_text.edit(on_text.profile_file, tokens__scores=100_000)
    with pytest.raises(CorpusTooShortError, match=r"profiles/micro.yaml, line \d+: .*'score' is 100000 tokens"):
        on_text.refresh()


def test_too_few_items_are_found_before_anything_runs(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    before = project.profile_file.read_text()
    monkeypatch.setattr("puzzle_dag.children.tasks.read_stdlib_for", lambda _: iter([("m.py", "a = b\n")]))
    with project.instance() as instance:
        num_runs = instance.get_runs_count()
    try:
        project.edit(project.profile_file, accuracy__tasks=["skill_copy", "stdlib_cloze"])
        with pytest.raises(ConfigError, match=r"micro.yaml, line \d+: .*8 asked, the held-out library gives 0 cloze items"):
            project.refresh()
        project.edit(project.profile_file, accuracy__tasks=["skill_cook"])
        with pytest.raises(ConfigError, match=r"micro.yaml, line \d+: .*'skill_cook' is unknown"):
            project.refresh()
    finally:
        project.profile_file.write_text(before)
    with project.instance() as instance:
        assert instance.get_runs_count() == num_runs


def test_text_that_is_enough_is_not_read_again(on_text: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, asked, build = make_plan(on_text.root, "micro"), list[tuple[str, int]](), tokens.build_tokens

    def listen(*args: Any, **options: Any) -> Any:
        asked.append((options["purpose"], options["num_tokens"]))
        return build(*args, **options)

    monkeypatch.setattr(tokens, "build_tokens", listen)

    def check() -> list[tuple[str, int]]:
        asked.clear()
        check_text(plan, on_text.workspace, lambda _: True)
        return list(asked)

    assert check() == [("train", 1024), ("score", 256), ("heldout", 1024), ("uptrain", 256)] and check() == []
    on_text.edit(on_text.root / "conf" / "scenarios" / "micro-light.yaml", uptrain={"tokens": 192})
    assert check() == [], "a smaller budget is a part of the larger one"
    (on_text.root / "texts" / "0.txt").write_text("other text")
    assert len(check()) == 4
