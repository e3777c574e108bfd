"""Load curves: whose turn it is, what an interrupted run goes on with, and what the points add up to."""

import itertools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from puzzle_dag.config import LoadCurveSettings, Target
from puzzle_dag.engine.client import VllmMissingError
from puzzle_dag.engine.int8 import INT8
from puzzle_dag.report.load import LoadMark, load_curves
from puzzle_dag.serving import curve, server
from puzzle_dag.serving.curve import LoadCurveError, PredictedLoad, measure_load_curve
from puzzle_dag.serving.load import LoadFailedError, LoadPoint, read_point
from puzzle_dag.serving.server import serve, serve_command

TARGET = Target(version=1, name="chat", hardware="local-cpu", mode="eager", input_length=64, output_length=11, batch_sizes=(1, 8))
SETTINGS = LoadCurveSettings(concurrencies=(1, 4), rounds=2, turns=3)


def make_point(concurrency: int, tokens_per_s: float) -> LoadPoint:
    latency_s = concurrency * 75 / tokens_per_s
    return LoadPoint(
        concurrency=concurrency,
        num_requests=2 * concurrency,
        duration_s=2 * latency_s,
        requests_per_s=concurrency / latency_s,
        throughput_tokens_per_s=tokens_per_s,
        output_tokens_per_s=tokens_per_s * 11 / 75,
        ttft_median_s=latency_s / 4,
        ttft_p99_s=latency_s / 2,
        tpot_median_s=latency_s / 20,
        tpot_p99_s=latency_s / 10,
        latency_median_s=latency_s,
        latency_p99_s=2 * latency_s,
    )


class Bench:
    """Takes the place of servers and clients: the parent gives 100 tokens/s at a concurrency of 1, the child 150; a turn adds 10 %."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.servers: list[tuple[str, int, tuple[int, ...]]] = []
        self.breaks_at: tuple[str, int, int] | None = None
        patch.setattr(curve, "serve", self.serve)
        patch.setattr(curve, "put_under_load", self.load)
        patch.setattr(curve, "read_engine_version", lambda: "vllm 1")

    @contextmanager
    def serve(self, folder: Path, name: str, target: Target, **options: Any) -> Iterator[str]:
        assert options["max_concurrency"] == 4 and (folder / "config.json").is_file()
        yield name

    def load(
        self, server: str, folder: Path, target: Target, concurrencies: Any, *, seed: int, on_point: Callable[[LoadPoint], None], **_: Any
    ) -> None:
        self.servers.append((server, seed, tuple(concurrencies)))
        for c in concurrencies:
            if (server, seed, c) == self.breaks_at:
                raise LoadFailedError("the server ended")
            on_point(make_point(c, (100 if server == "parent" else 150) * c * (1 + 0.1 * seed)))


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(monkeypatch)


def test_parent_and_child_take_turns_and_are_compared(micro_parent_folder: Path, bench: Bench) -> None:
    predicted = {"parent": {1: PredictedLoad(prefill_s=0.25, decode_s=0.5)}}
    told: list[int] = []
    found = measure_load_curve(
        micro_parent_folder,
        {"fast": micro_parent_folder},
        TARGET,
        SETTINGS,
        predicted=predicted,
        progress=lambda done, *_: told.append(done),
    )
    assert bench.servers == [(model, turn, (1, 4)) for turn in range(3) for model in ("parent", "fast")]
    assert told == list(range(13))
    parent, _, child, wide = found.levels
    assert [(x.model, x.concurrency, x.num_requests) for x in found.levels] == [
        ("parent", 1, 2),
        ("parent", 4, 8),
        ("fast", 1, 2),
        ("fast", 4, 8),
    ]
    assert parent.throughput_tokens_per_s == pytest.approx(110) and parent.speedup is None
    assert (parent.predicted_ttft_s, parent.predicted_tpot_s, parent.predicted_throughput_tokens_per_s) == (0.25, 0.05, 100.0)
    assert child.predicted_ttft_s is None and child.predicted_throughput_tokens_per_s is None
    assert (child.speedup, child.speedup_low, child.speedup_high) == (pytest.approx(1.5),) * 3  # both are 10 % up in each further turn
    assert wide.throughput_tokens_per_s == pytest.approx(660) and wide.ttft_p99_s > wide.ttft_median_s


def test_an_interrupted_run_goes_on_where_it_was(micro_parent_folder: Path, bench: Bench) -> None:
    kept: dict[Any, LoadPoint] = {}
    bench.breaks_at = ("fast", 0, 4)
    options: dict[str, Any] = {"on_point": kept.__setitem__, "known": kept}
    with pytest.raises(LoadFailedError):
        measure_load_curve(micro_parent_folder, {"fast": micro_parent_folder}, TARGET, SETTINGS, **options)
    assert sorted(kept) == [("fast", 0, 1), ("parent", 0, 1), ("parent", 0, 4)]
    bench.breaks_at, bench.servers = None, []
    found = measure_load_curve(micro_parent_folder, {"fast": micro_parent_folder}, TARGET, SETTINGS, **options)
    assert bench.servers == [("fast", 0, (4,)), *((model, turn, (1, 4)) for turn in (1, 2) for model in ("parent", "fast"))]
    assert len(found.levels) == 4


def test_bad_input_is_refused_before_a_server_starts(micro_parent_folder: Path, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LoadCurveError, match="a child is named 'parent'"):
        measure_load_curve(micro_parent_folder, {"parent": micro_parent_folder}, TARGET, SETTINGS)
    with pytest.raises(LoadCurveError, match="fast: nowhere is no checkpoint"):
        measure_load_curve(micro_parent_folder, {"fast": Path("nowhere")}, TARGET, SETTINGS)
    with pytest.raises(ValueError, match=r"\[4, 1\] must be positive and increasing"):
        LoadCurveSettings(concurrencies=(4, 1))
    with pytest.raises(ValueError, match="turns\n  Input should be greater than or equal to 3"):
        LoadCurveSettings(concurrencies=(1,), turns=2)

    def missing() -> str:
        raise VllmMissingError("vLLM is not installed")

    monkeypatch.setattr(curve, "read_engine_version", missing)
    with pytest.raises(VllmMissingError):
        measure_load_curve(micro_parent_folder, {"fast": micro_parent_folder}, TARGET, SETTINGS)
    assert bench.servers == []


RESULT = {
    "max_concurrency": 4,
    "completed": 8,
    "duration": 2.0,
    "total_output_tokens": 88,
    "request_throughput": 4.0,
    "output_throughput": 44.0,
    "total_token_throughput": 300.0,
    **{f"{s}_{m}_ms": value for s, value in (("median", 250.0), ("p99", 500.0)) for m in ("ttft", "tpot", "e2el")},
}


def test_a_result_is_read_in_seconds_and_whole_answers_only_count() -> None:
    point = read_point(RESULT, num_requests=8, output_length=11)
    assert (point.concurrency, point.num_requests, point.ttft_median_s, point.latency_p99_s) == (4, 8, 0.25, 0.5)
    with pytest.raises(LoadFailedError, match="1 of 9 requests failed"):
        read_point(RESULT, num_requests=9, output_length=11)
    with pytest.raises(LoadFailedError, match="8 answers have 88 tokens; asked for were 12 each"):
        read_point(RESULT, num_requests=8, output_length=12)


def test_a_server_is_started_as_the_target_says_and_listens_to_this_machine_only(micro_parent_folder: Path) -> None:
    def options(**changes: Any) -> list[str]:
        return serve_command(micro_parent_folder, "fast", TARGET.model_copy(update=changes), 4, 8123)

    command = options(quantization="fp8", tensor_parallel_size=2)
    given = dict(itertools.pairwise(command))
    assert (given["--host"], given["--port"], given["--served-model-name"]) == ("127.0.0.1", "8123", "fast")
    assert (given["--max-model-len"], given["--max-num-seqs"], given["--max-num-batched-tokens"]) == ("75", "4", "256")
    assert (given["--quantization"], given["--tensor-parallel-size"], given["--dtype"]) == ("fp8", "2", "bfloat16")
    assert "--enforce-eager" in command and "--trust-remote-code" not in command
    assert "--enforce-eager" not in options(mode="compiled") and "--quantization" not in options()


def test_a_server_of_several_gpus_gets_the_cache_of_one(micro_parent_folder: Path) -> None:
    def cache_bytes(**changes: Any) -> int:
        command = serve_command(micro_parent_folder, "fast", TARGET.model_copy(update=changes), 4, 8123)
        return int(dict(itertools.pairwise(command))["--kv-cache-memory-bytes"])

    whole = cache_bytes()
    assert whole == (4 * 2 + 8) * 128 * 2 * 2 * 4 * 32 * 2  # tokens, keys and values, layers, heads, channels, bytes
    assert (cache_bytes(tensor_parallel_size=2), cache_bytes(tensor_parallel_size=4)) == (whole // 2, whole // 4)
    assert (cache_bytes(tensor_parallel_size=8), cache_bytes(kv_cache_dtype="fp8")) == (whole // 4, whole // 2)


def test_an_int8_server_gets_an_int8_checkpoint_and_no_name_that_vllm_does_not_know(
    micro_parent_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Started:
        """Looks at the command while the checkpoint that it names is there."""

        def __init__(self, command: list[str], *_: Any) -> None:
            self.command = command
            self.config = json.loads((Path(command[4]) / "config.json").read_text())
            self.tensors = load_file(Path(command[4]) / "model.safetensors")

        def __enter__(self) -> "Started":
            return self

        def __exit__(self, *_: Any) -> None:
            pass

    monkeypatch.setattr(server, "Program", Started)
    monkeypatch.setattr(server, "_wait_until_healthy", lambda *_: None)
    for quantization in (INT8, None):
        target = TARGET.model_copy(update={"quantization": quantization})
        with serve(micro_parent_folder, "fast", target, max_concurrency=4) as running:
            program: Any = running.program
        assert "--quantization" not in program.command and INT8 not in program.command
        weight = program.tensors["model.layers.0.mlp.up_proj.weight"]
        assert (weight.dtype == torch.int8) == ("quantization_config" in program.config) == (quantization == INT8)


def test_the_picture_has_a_line_a_model_and_its_predictions() -> None:
    marks = [LoadMark(1, 0.1, 750.0, 0.11, 700.0), LoadMark(4, 0.2, 1500.0)]
    measured = load_curves({"parent": marks[1:], "fast": marks[1:]}, title="load")
    assert measured.startswith(b"\x89PNG") and load_curves({"parent": marks, "fast": marks[1:]}, title="load") != measured
