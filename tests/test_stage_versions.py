"""A stage whose source changed has another VERSION; else old results would pass for the new code's."""

import json
from pathlib import Path

import pytest
import stage_sources


def test_a_changed_stage_has_another_version() -> None:
    recorded, now = json.loads(stage_sources.RECORD.read_text()), stage_sources.current()
    assert set(recorded) == set(now), "a stage came or went; run `python tests/stage_sources.py`"
    changed = [m for m in now if now[m]["source"] != recorded[m]["source"] and now[m]["version"] == recorded[m]["version"]]
    assert not changed, (
        f"{', '.join(changed)} changed, and VERSION did not: raise it if stored results would come out differently, "
        "then run `python tests/stage_sources.py`"
    )
    assert now == recorded, "run `python tests/stage_sources.py`"


def test_code_counts_and_documentation_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "puzzle_dag" / "stage"
    package.mkdir(parents=True)
    monkeypatch.setattr(stage_sources, "CHECKOUT", tmp_path)
    stage, part = package / "build.py", package / "part.py"
    stage.write_text('"""A stage."""\nfrom puzzle_dag.stage.part import f\nVERSION = 1\nx = f(1)\n')
    part.write_text("def f(x: int) -> int:\n    return x\n")
    before = stage_sources.current()
    assert before["puzzle_dag.stage.build"]["version"] == 1
    stage.write_text('"""Another word."""\nfrom puzzle_dag.stage.part import f\n\n# a comment\nVERSION = 1\nx = f(1)\n')
    assert stage_sources.current() == before
    part.write_text("def f(x: int) -> int:\n    return x + 1\n")
    assert stage_sources.current() != before
