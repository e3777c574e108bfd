"""Parent and child answer the same items though the library that items are drawn from changed in between, as with another Python."""

import random
from pathlib import Path

import pytest
from micro_project import Project

from puzzle_dag.children.tasks import CLOZE, PERPLEXITY, item_sources, write_tasks
from puzzle_dag.corpus.stdlib import read_stdlib
from resources.rows import read_rows

NUM_ITEMS = 8


def make_library(folder: Path, seed: int) -> Path:
    """A library of modules that are alike but for their names: as many items, other ones."""
    rng = random.Random(seed)
    names = [f"{rng.choice('abcdefgh')}_name_{i}" for i in range(40)]
    folder.mkdir()
    for i in range(120):
        lines = [f"{rng.choice(names)} = {rng.choice(names)}({rng.choice(names)}, {rng.choice(names)})\n" for _ in range(40)]
        lines[20] += "\n"  # documents begin after an empty line
        (folder / f"m{i}.py").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("libraries")
    return [make_library(folder / str(seed), seed) for seed in range(2)]


def use(monkeypatch: pytest.MonkeyPatch, library: Path) -> None:
    monkeypatch.setattr("puzzle_dag.corpus.tokens.read_stdlib", lambda split: read_stdlib(split, library))


def test_only_tasks_that_are_drawn_from_the_library_hang_on_it(
    libraries: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for library in libraries:
        use(monkeypatch, library)
        files = write_tasks([CLOZE], tmp_path, num_items=NUM_ITEMS, world_seed=7)
        found.append((item_sources([CLOZE]), item_sources(["skill_copy", CLOZE]), item_sources(["skill_copy"]), files.digest))
    (cloze, both, skill, items), others = found
    assert cloze == both != others[0] and skill == others[2] == {} and items != others[3]
    use(monkeypatch, libraries[0])
    assert item_sources([CLOZE]) == cloze


def test_after_a_change_of_the_library_both_are_graded_again_and_never_paired_across(
    project: Project, libraries: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    graded = ["parent_accuracy", "accuracy[micro-small]"]
    project.edit(project.profile_file, accuracy={"tasks": ["skill_copy", CLOZE, PERPLEXITY], "num_items": NUM_ITEMS, "batch_size": 8})
    use(monkeypatch, libraries[0])
    record = project.refresh(select=graded)
    assert record.ran == graded and not record.of("failed")
    rows = read_rows(project.workspace.tables / "accuracy" / "micro-small.parquet")
    kept = {r["metric"]: r for r in rows if r["task"] == PERPLEXITY}
    told = {p["metric"]: p for p in project.workspace.shelf.value("accuracy", "micro-small")["perplexities"]}
    assert set(kept) == set(told) == {"nats_per_token", "bits_per_byte"} and {r["task"] for r in rows} == {"skill_copy", CLOZE, PERPLEXITY}
    of_parent = {r["metric"]: r["value"] for r in project.workspace.shelf.value("parent_accuracy")["results"] if r["task"] == PERPLEXITY}
    for metric, row in kept.items():
        assert (row["parent"], row["child"]) == (told[metric]["parent"], told[metric]["child"]) and row["parent"] == of_parent[metric]
        assert row["parent"] != row["child"] and row["chance"] is row["corrected"] is None
    use(monkeypatch, libraries[1])
    # The child is asked today's items, as many as its parent was; its parent was asked others.
    (failed,) = project.refresh(select=graded, remake=graded[1:]).of("failed")
    assert str(failed.item) == graded[1] and f"task {CLOZE}: the child was asked other items" in failed.reasons[0]
    assert project.refresh(select=graded, remake=graded[:1]).ran == graded


def test_another_python_is_seen_where_items_are_drawn_from_its_library(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    from assets.plan import make_plan
    from assets.watches import watch

    def watched(asset: str, partition: str | None = None) -> object:
        return watch(make_plan(project.root, "micro"), project.workspace, asset, partition)

    project.edit(project.profile_file, accuracy__tasks=["skill_copy", CLOZE], task_scores={"tasks": ["skill_copy"]})
    graded, scored = watched("parent_accuracy"), watched("task_scores", "L00")
    monkeypatch.setattr("puzzle_dag.corpus.stdlib.python_version", lambda: "3.99.0")
    assert watched("parent_accuracy") != graded and watched("task_scores", "L00") == scored
    project.edit(project.profile_file, accuracy__tasks=["skill_copy"], task_scores={"tasks": [CLOZE]})
    assert watched("parent_accuracy") is None and watched("task_scores", "L00") != scored
