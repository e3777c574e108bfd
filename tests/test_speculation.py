"""A child as the draft model of its own parent: on real vLLM, and what is said where an engine can't."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from puzzle_dag.architecture import Block
from puzzle_dag.config import ParentSource, SpeculationSettings, Target
from puzzle_dag.engine.int8 import INT8
from puzzle_dag.model.checkpoint import child_config, load_checkpoint, save_checkpoint
from puzzle_dag.model.modeling_puzzle_dag import PuzzleDagForCausalLM
from puzzle_dag.model.parent import load_parent
from puzzle_dag.serving import draft_worker, speculate
from puzzle_dag.serving.speculate import SpeculationError, SpeculationFailedError, measure_speculation

TARGET = Target(
    version=1, name="draft", hardware="local-cpu", mode="eager", dtype="float32", input_length=16, output_length=4, batch_sizes=(2,)
)
# A turn less than may be asked for: what is tested here doesn't hang on the interval, and each engine takes seconds.
SETTINGS = SpeculationSettings(num_draft_tokens=3, batch_sizes=(1, 2), output_length=13, repeats=1).model_copy(update={"turns": 2})
PROMPTS = [list(range(20, 32)), list(range(40, 52))]


@pytest.fixture(scope="module")
def twins(save_parent: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A parent, and a child of another architecture (half the KV heads; a no-op) that computes the very same function."""
    folder = save_parent("llama")
    parent = load_parent(ParentSource(path=folder.name), folder.parent)
    first, last = parent.model.model.layers
    with torch.no_grad():
        for projection in (first.self_attn.k_proj, first.self_attn.v_proj):  # 4 heads of 32 channels, equal in pairs
            heads = projection.weight.view(4, 32, -1)
            heads[1], heads[3] = heads[0], heads[2]
        last.self_attn.o_proj.weight.zero_()
    state = dict(parent.model.state_dict())
    work = tmp_path_factory.mktemp("twins")
    save_checkpoint(parent.model, parent.tokenizer, work / "parent")
    for name in ("k_proj", "v_proj"):
        full = state[f"model.layers.0.self_attn.{name}.weight"]
        state[f"model.layers.0.self_attn.{name}.weight"] = full.view(4, 32, -1)[::2].reshape(64, -1).clone()
    child = PuzzleDagForCausalLM(child_config(parent.config, (Block.parse("kv2/w128"), Block.parse("noop/w128")))).eval()
    child.load_state_dict({name: state[name] for name in child.state_dict()})
    row = torch.tensor(PROMPTS)
    with torch.no_grad():
        torch.testing.assert_close(child(row).logits, parent.model(row).logits, atol=1e-5, rtol=0)
    save_checkpoint(child, parent.tokenizer, work / "child")
    return work / "parent", work / "child"


def test_vllm_accepts_all_that_a_childs_equal_proposes(twins: tuple[Path, Path]) -> None:
    pytest.importorskip("vllm")
    engines: list[int] = []
    report = measure_speculation(*twins, PROMPTS, TARGET, SETTINGS, progress=lambda done, total, unit: engines.append(done))
    assert report.unsupported is None, report.unsupported
    assert engines == [1, 2, 3, 4] and [b.batch for b in report.batches] == [1, 2]
    for found in report.batches:
        assert found.num_draft_tokens > 0 and found.acceptance_rate == 1.0 and found.tokens_per_step == 4.0
        assert found.same_tokens == 1.0
        assert found.parent_s > 0 and found.speculative_s > 0 and found.speedup_low <= found.speedup <= found.speedup_high


def result(total_s: float, tokens: list[list[int]], **counts: int) -> dict[str, Any]:
    counted = {"num_drafts": 0, "num_draft_tokens": 0, "num_accepted_tokens": 0, **counts}
    return {"times": {"1": {"prefill_s": [0.1] * 3, "total_s": [9.0, total_s, 0.0], "tokens": tokens, **counted}}}


def install(monkeypatch: pytest.MonkeyPatch, results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Let a worker that needs no engine give `results`; return the jobs, once it has run."""
    jobs: list[dict[str, Any]] = []
    real = speculate.Program

    def fake(command: list[str], log: Path, environment: dict[str, str]) -> Any:
        jobs.extend(json.loads(Path(command[-1]).read_text()))
        script = f"import json\nfor job, r in zip(json.load(open({command[-1]!r})), {results!r}): json.dump(r, open(job['result'], 'w'))"
        return real([sys.executable, "-c", f"{script}\nprint('so much for that')"], log, environment)

    monkeypatch.setattr(speculate, "Program", fake)
    monkeypatch.setattr(speculate, "read_engine_version", lambda: "vllm 1")
    return jobs


def test_rates_and_speed_ups_are_those_of_the_turns(twins: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    drafts = {"num_drafts": 10, "num_draft_tokens": 30}
    turns = [
        result(2.0, [[1, 2, 3, 4]]),
        result(1.0, [[1, 2, 9, 4]], **drafts, num_accepted_tokens=12),
        result(4.0, [[1, 2, 3, 4]]),
        result(1.0, [[1, 2, 3, 4]], **drafts, num_accepted_tokens=15),
    ]
    jobs = install(monkeypatch, turns)
    settings = SETTINGS.model_copy(update={"batch_sizes": (1,)})
    (found,) = measure_speculation(*twins, PROMPTS, TARGET, settings).batches
    assert [bool(j["draft"]) for j in jobs] == [False, True, False, True]
    assert jobs[1]["draft"]["model"] == str(twins[1]) and jobs[1]["folder"] == str(twins[0])
    assert (found.num_draft_tokens, found.num_accepted_tokens, found.acceptance_rate) == (60, 27, 0.45)
    assert found.tokens_per_step == 2.35 and found.speedup == pytest.approx(8**0.5)
    assert found.same_tokens == 0.75  # (2 of 4 + 4 of 4) / 2: what follows a difference is no answer to the same text


def test_an_engine_that_can_not_draft_is_quoted(twins: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, [result(2.0, [[1]]), {"error": "NotImplementedError: no drafts on abacuses"}])
    report = measure_speculation(*twins, PROMPTS, TARGET, SETTINGS)
    assert report.unsupported == "NotImplementedError: no drafts on abacuses" and report.batches == ()


def test_a_child_that_would_hang_its_engine_is_told_without_one(
    twins: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's CPU build drafts with one number of KV heads; it never returns where layers differ."""
    parent = load_checkpoint(twins[0])
    tokenizer = AutoTokenizer.from_pretrained(twins[0])
    mixed = child_config(parent.config, (Block.parse("kv2/w128"), Block.parse("kv4/w128")))
    save_checkpoint(PuzzleDagForCausalLM(mixed), tokenizer, tmp_path / "child")
    monkeypatch.setattr(speculate, "_run", lambda *_: pytest.fail("an engine was started"))
    report = measure_speculation(twins[0], tmp_path / "child", PROMPTS, TARGET, SETTINGS)
    assert report.unsupported is not None and report.unsupported.startswith("its layers have 2 and 4 KV heads") and report.batches == ()


def test_a_draft_engine_that_hangs_is_one_that_can_not(tmp_path: Path) -> None:
    worker = SimpleNamespace(status=None, tail=lambda: "so much for that")
    found = speculate._wait_for(tmp_path / "0.json", worker, {"draft": {}}, 0.0)  # type: ignore[arg-type]
    assert found == {"error": "an engine took more than 0 s and was ended\nso much for that"}
    with pytest.raises(SpeculationFailedError, match="took more than 0 s"):
        speculate._wait_for(tmp_path / "0.json", worker, {"draft": None}, 0.0)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("results", "message"),
    [
        ([{"error": "ValueError: out of cache"}], r"(?s)the parent alone failed: ValueError: out of cache.*so much for that"),
        ([], r"(?s)the parent's engine ended with status 0.*so much for that"),
        (
            [result(2.0, [[1]]), result(1.0, [[1]]), result(2.0, [[1]]), {"error": "OSError: gone"}],
            "served 1 turns, then failed: OSError: gone",
        ),
    ],
)
def test_any_other_failure_is_an_error(twins: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, results: Any, message: str) -> None:
    install(monkeypatch, results)
    with pytest.raises(SpeculationFailedError, match=message):
        measure_speculation(*twins, PROMPTS, TARGET, SETTINGS)


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        (PROMPTS[:1], {}, "batch_sizes asks for 2 prompts of one length; there are 1"),
        (PROMPTS, {"output_length": 501}, "output_length is 501; with prompts of 12 tokens that is 513, and the parent takes at most 512"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_runs(
    twins: tuple[Path, Path], prompts: Any, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(SpeculationError, match=message):
        measure_speculation(*twins, prompts, TARGET, SETTINGS.model_copy(update=settings))
    with pytest.raises(SpeculationError, match="nowhere is no checkpoint"):
        measure_speculation(twins[0], Path("nowhere"), PROMPTS, TARGET, SETTINGS)


def test_the_worker_writes_an_engines_own_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(job: dict[str, Any]) -> dict[str, Any]:
        raise NotImplementedError("no drafts on abacuses")

    monkeypatch.setattr(draft_worker, "_measure", refuse)
    monkeypatch.setattr(draft_worker, "_clean_up", lambda: None)
    (tmp_path / "jobs.json").write_text(json.dumps([{"result": str(tmp_path / "0.json")}]))
    draft_worker.main([str(tmp_path / "jobs.json")])
    assert json.loads((tmp_path / "0.json").read_text()) == {"error": "NotImplementedError: no drafts on abacuses"}


@pytest.mark.parametrize(("quantization", "given"), [(INT8, None), ("fp8_per_channel", "fp8_per_channel"), (None, None)])
def test_engines_with_and_without_a_draft_model_are_of_the_targets_precision_and_size(
    twins: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantization: str | None, given: str | None
) -> None:
    started: list[dict[str, Any]] = []

    def start(*, model: str, speculative_config: dict[str, Any] | None, **arguments: Any) -> None:
        folders = [model, *([speculative_config["model"]] if speculative_config else [])]
        are_int8 = ["quantization_config" in json.loads((Path(f) / "config.json").read_text()) for f in folders]
        assert are_int8 == [quantization == INT8] * len(folders)
        started.append(arguments)

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=start))
    target = TARGET.model_copy(update={"quantization": quantization, "kv_cache_dtype": "fp8", "tensor_parallel_size": 4})
    draft = {"model": str(twins[1]), "num_speculative_tokens": 3}
    for turn, drafting in enumerate((None, draft)):
        job = json.loads(json.dumps(speculate._job(twins[0], drafting, PROMPTS, target, SETTINGS)))
        draft_worker._start_engine(job, tmp_path / str(turn))
    assert [s["quantization"] for s in started] == [given] * 2 and {s["tensor_parallel_size"] for s in started} == {4}
    of_one_gpu = (2 * 2 + 8) * 128 * 2 * 2 * 32  # tokens, keys and values, layers, channels: one of the four heads, a byte each
    assert [s["kv_cache_memory_bytes"] for s in started] == [of_one_gpu, 2 * of_one_gpu]


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="must be positive and increasing"):
        SpeculationSettings(batch_sizes=(8, 1))
    with pytest.raises(ValueError, match="greater than or equal to 3"):
        SpeculationSettings(turns=2)
