"""The command that people are shown: the flags of the target's mode, and the one that the README and docs/ tell of."""

import re
from pathlib import Path
from typing import Any

import pytest

from puzzle_dag.config import Target
from puzzle_dag.config.target import read_target
from puzzle_dag.engine.int8 import INT8
from puzzle_dag.serving.command import typed_command

ROOT = Path(__file__).parents[1]


def make_target(**changes: Any) -> Target:
    fields = {"version": 1, "name": "t", "hardware": "h100", "mode": "compiled", "input_length": 8, "output_length": 8, "batch_sizes": (1,)}
    return Target(**{**fields, **changes})


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "vllm serve child --host 127.0.0.1 --dtype bfloat16"),
        ({"mode": "eager"}, "vllm serve child --host 127.0.0.1 --dtype bfloat16 --enforce-eager"),
        ({"hardware": "local-cpu"}, "vllm serve child --host 127.0.0.1 --dtype bfloat16 --kv-cache-memory-bytes 1G"),
        ({"tensor_parallel_size": 4}, "vllm serve child --host 127.0.0.1 --dtype bfloat16 --tensor-parallel-size 4"),
        (
            {"quantization": "fp8_per_channel", "kv_cache_dtype": "fp8"},
            "vllm serve child --host 127.0.0.1 --dtype bfloat16 --quantization fp8_per_channel --kv-cache-dtype fp8",
        ),
        ({"quantization": INT8}, "puzzle-dag quantize child child-int8 && vllm serve child-int8 --host 127.0.0.1 --dtype bfloat16"),
    ],
)
def test_a_child_is_served_as_its_target_was_measured(changes: dict[str, Any], expected: str) -> None:
    assert typed_command("child", make_target(**changes)) == expected


def test_a_folder_with_a_space_stays_one_word() -> None:
    assert typed_command("my child", make_target()).startswith("vllm serve 'my child' --host")


@pytest.mark.parametrize("page", ["README.md", "docs/serving.md"])
def test_the_commands_that_are_shown_fit_the_shipped_cpu_targets(page: str) -> None:
    shown = re.findall(r"vllm serve (?:FOLDER|var/store/\S+) (--host .+)$", (ROOT / page).read_text(), re.MULTILINE)
    assert shown
    for name in ("cpu-chat", "cpu-prefill", "cpu-chat-precise", "cpu-prefill-precise"):
        wanted = typed_command("FOLDER", read_target(ROOT / "conf", name)).removeprefix("vllm serve FOLDER ")
        assert {arguments.replace(" --served-model-name child", "") for arguments in shown} == {wanted}
