"""`vllm serve CHILD` over real HTTP: an OpenAI client's completions and chat, and vLLM's own benchmark against it.

One server for the whole file, started by the command that the README shows: the child of every kind of place, with the
engine core in a process of its own, as a server always has it; the weights are random, the model small.
"""

import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from puzzle_dag.config import Target
from puzzle_dag.engine.hardware import detect_hardware
from puzzle_dag.model.checkpoint import save_checkpoint
from puzzle_dag.model.modeling_puzzle_dag import PuzzleDagForCausalLM
from puzzle_dag.serving.load import LoadPoint, put_under_load
from puzzle_dag.serving.server import HOST, Server, ServerFailedError, serve, serve_command

pytest.importorskip("vllm")
openai = pytest.importorskip("openai")

_BLOCKS = ("noop/w64", "kv4/w128", "linear/noop", "kv2/linear")
_MAX_LENGTH = {"input_length": 40, "output_length": 24}
_NUM_NEW = 10
# What the README's command doesn't say: float32, since near-ties fall differently in bfloat16, and that answers may tell of all logits.
_EXACT = ["--dtype", "float32", "--logprobs-mode", "raw_logits", "--max-logprobs", "-1"]


def make_target(**changes: Any) -> Target:
    fields = {"version": 1, "name": "http", "hardware": "local-cpu", "dtype": "float32", "batch_sizes": (2,), **_MAX_LENGTH}
    return Target(**{**fields, **changes})


@pytest.fixture(scope="module")
def child(make_child: Callable[..., PuzzleDagForCausalLM], micro_tokenizer: Any) -> PuzzleDagForCausalLM:
    """A child that writes whole characters: a server holds back bytes that are none yet, so that texts could not be compared."""
    model = make_child("llama", *_BLOCKS)
    pieces = [micro_tokenizer.decode([token]) for token in range(len(micro_tokenizer))]
    with torch.no_grad():
        model.lm_head.weight[[not p.isascii() or p == micro_tokenizer.eos_token for p in pieces]] = 0
    return model


@pytest.fixture(scope="module")
def folder(child: PuzzleDagForCausalLM, micro_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("served") / "child"
    save_checkpoint(child, micro_tokenizer, path)
    return path


def shown_command(folder: Path, name: str, _: Target, __: int, port: int) -> list[str]:
    """Return the README's `.venv/bin/vllm serve CHECKPOINT ...` for a checkpoint, on a port of its own and with exact numbers."""
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    (arguments,) = re.findall(r"^\.venv/bin/vllm serve var/store/\S+ (.+)$", readme, re.MULTILINE)
    given = [*shlex.split(arguments), "--port", str(port), "--served-model-name", name, *_EXACT]
    return [str(Path(sys.executable).with_name("vllm")), "serve", str(folder), *given]


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    if detect_hardware().kind != "cpu":
        pytest.skip("the target of this test is the local CPU")
    with ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("puzzle_dag.serving.server.serve_command", shown_command)
            running = stack.enter_context(serve(folder, "child", make_target(), max_concurrency=2, start_limit_s=1800))
        yield running
        group = running.program.process_group
    with pytest.raises(ProcessLookupError):
        os.killpg(group, 0)  # nothing that the server started is left


@pytest.fixture(scope="module")
def client(server: Server) -> Any:
    direct = openai.DefaultHttpxClient(trust_env=False)  # no proxy between us and this machine
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=600, http_client=direct)


def greedy(model: PuzzleDagForCausalLM, prompt: list[int], num_new: int) -> list[int]:
    """Return what our PyTorch model goes on with, an uncached pass a token."""
    row = list(prompt)
    for _ in range(num_new):
        with torch.no_grad():
            row.append(int(model(torch.tensor([row]), use_cache=False).logits[0, -1].argmax()))
    return row[len(prompt) :]


def test_completions_are_those_of_our_model(server: Server, client: Any, child: PuzzleDagForCausalLM, micro_tokenizer: Any) -> None:
    assert server.url.startswith(f"http://{HOST}:") and [m.id for m in client.models.list()] == ["child"]
    for prompt in ("copy: fox dog =", "sum: 3 + 4 = 7; 5 + 1 ="):
        tokens = micro_tokenizer(prompt)["input_ids"]
        # The client passes on what is vLLM's own in `extra_body`.
        answer = client.completions.create(
            model="child", prompt=prompt, max_tokens=_NUM_NEW, temperature=0, extra_body={"ignore_eos": True, "return_token_ids": True}
        )
        expected = greedy(child, tokens, _NUM_NEW)
        assert answer.usage.prompt_tokens == len(tokens) and answer.usage.completion_tokens == _NUM_NEW
        assert answer.choices[0].model_dump()["token_ids"] == expected
        assert answer.choices[0].text == micro_tokenizer.decode(expected, skip_special_tokens=True)


def test_logits_are_those_of_our_model(client: Any, child: PuzzleDagForCausalLM) -> None:
    """Whole rows, of the prompt and of what is generated, from an engine core in a process of its own."""
    prompt, num_tokens = list(range(100, 120)), child.config.vocab_size
    wanted = {"prompt_logprobs": -1, "return_tokens_as_token_ids": True, "return_token_ids": True, "ignore_eos": True}
    answer = client.completions.create(
        model="child", prompt=prompt, max_tokens=_NUM_NEW, temperature=0, logprobs=num_tokens, extra_body=wanted
    )
    choice = answer.choices[0].model_dump()
    rows = [[entries[str(token)]["logprob"] for token in range(num_tokens)] for entries in choice["prompt_logprobs"][1:]]
    rows += [[entries[f"token_id:{token}"] for token in range(num_tokens)] for entries in choice["logprobs"]["top_logprobs"]]
    with torch.no_grad():
        expected = child(torch.tensor([prompt + choice["token_ids"]]), use_cache=False).logits[0, :-1]
    torch.testing.assert_close(torch.tensor(rows), expected, atol=1e-4, rtol=0)


def test_chat_goes_through_the_inherited_template(client: Any, child: PuzzleDagForCausalLM, micro_tokenizer: Any) -> None:
    messages = [
        {"role": "user", "content": "sum: 3 + 4 ="},
        {"role": "assistant", "content": "7"},
        {"role": "user", "content": "copy: fox dog ="},
    ]
    text = f"sum: 3 + 4 = 7{micro_tokenizer.eos_token}copy: fox dog ="
    tokens = micro_tokenizer(text)["input_ids"]
    options = {"model": "child", "messages": messages, "max_tokens": _NUM_NEW, "temperature": 0, "extra_body": {"ignore_eos": True}}
    answer = client.chat.completions.create(**options)
    expected = micro_tokenizer.decode(greedy(child, tokens, _NUM_NEW), skip_special_tokens=True)
    assert answer.usage.prompt_tokens == len(tokens) and answer.choices[0].message.content == expected
    parts = [c.choices[0].delta.content or "" for c in client.chat.completions.create(**options, stream=True) if c.choices]
    assert "".join(parts) == expected and len(parts) > 2  # it came in pieces


def test_vllms_benchmark_measures_the_server(server: Server, folder: Path) -> None:
    target, points = make_target(input_length=16, output_length=8), []
    put_under_load(server, folder, target, (1, 2), rounds=3, seed=0, hardware=detect_hardware(), on_point=points.append, point_limit_s=1800)
    assert [(p.concurrency, p.num_requests) for p in points] == [(1, 3), (2, 6)]
    for point in points:
        _check(point, target)


def _check(point: LoadPoint, target: Target) -> None:
    """Hold the benchmark's own numbers against each other."""
    tokens = point.num_requests * (target.input_length + target.output_length)
    assert point.throughput_tokens_per_s == pytest.approx(tokens / point.duration_s, rel=0.01)
    assert point.output_tokens_per_s == pytest.approx(point.num_requests * target.output_length / point.duration_s, rel=0.01)
    assert 0 < point.ttft_median_s <= point.ttft_p99_s and 0 < point.tpot_median_s <= point.tpot_p99_s
    assert point.ttft_median_s < point.latency_median_s <= point.latency_p99_s <= point.duration_s


def test_a_server_that_can_not_start_says_why(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real vLLM takes each of our arguments, and refuses a quantisation that it doesn't know before it starts an engine."""
    with (
        pytest.raises(ServerFailedError, match=r"(?s)ended with status 1 .*Unknown quantization method: int7"),
        serve(folder, "child", make_target(quantization="int7", kv_cache_dtype="fp8"), max_concurrency=2),
    ):
        pass
    monkeypatch.setattr("puzzle_dag.serving.server.serve_command", lambda *a: [serve_command(*a)[0], "-c", "import time; time.sleep(600)"])
    with (
        pytest.raises(ServerFailedError, match="was not healthy after 1 s"),
        serve(folder, "child", make_target(), max_concurrency=2, start_limit_s=1),
    ):
        pass
