"""The benchmark that runs the demo in float32: what it copies, and that it starts from nothing."""

from pathlib import Path

import pytest

from benchmarks.slow_machine import copy_in_float32, main
from puzzle_dag.config import read_profile, read_target

ROOT = Path(__file__).resolve().parent.parent


def test_everything_that_the_demo_computes_in_is_float32_and_nothing_else_changes(tmp_path):
    num_changed = copy_in_float32(ROOT, tmp_path)
    before, after = (read_profile(root / "conf", "tiny") for root in (ROOT, tmp_path))
    assert (before.dtype, after.dtype) == ("bfloat16", "float32") and after == before.model_copy(update={"dtype": "float32"})
    for name in before.targets:
        was, found = (read_target(root / "conf", name) for root in (ROOT, tmp_path))
        assert (was.dtype, found.dtype) == ("bfloat16", "float32") and found == was.model_copy(update={"dtype": "float32"})
    assert num_changed > len(before.targets) and (tmp_path / "parents" / "tiny" / "config.json").is_file()
    assert "dtype: bfloat16" in (ROOT / "conf" / "profiles" / "tiny.yaml").read_text(), "the checkout's own files stay"


def test_a_folder_in_which_something_was_made_before_is_refused(tmp_path, capsys):
    (tmp_path / "var").mkdir()
    with pytest.raises(SystemExit):
        main(["--folder", str(tmp_path)])
    assert f"--folder {tmp_path} is not empty" in capsys.readouterr().err


@pytest.mark.parametrize("cores", ["0", "100000"])
def test_cores_that_are_not_there_are_refused(tmp_path, capsys, cores):
    with pytest.raises(SystemExit):
        main(["--folder", str(tmp_path / "new"), "--cores", cores])
    assert f"--cores {cores}: this machine has" in capsys.readouterr().err and not (tmp_path / "new").exists()
