"""A server under load: vLLM's own benchmark client against `vllm serve`, at one number of concurrent requests after another."""

import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from puzzle_dag.config import Target
from puzzle_dag.engine.environment import engine_environment
from puzzle_dag.engine.hardware import Hardware
from puzzle_dag.progress import Progress, silent
from puzzle_dag.serving.bench import PARTIAL
from puzzle_dag.serving.program import Program
from puzzle_dag.serving.server import HOST, Server

POINT_LIMIT_S = 900.0
"""Seconds that the client may take for one concurrency, its own start included."""
_POLL_S = 0.1
_MS = 1e-3


class LoadFailedError(RuntimeError):
    """The benchmark ended, hung, or had requests that failed; the message ends with the tails of both logs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadPoint:
    """What one run of vLLM's serve benchmark measured of one server; latencies are of single requests, seen by the client."""

    concurrency: int
    """Requests that were under way at any time."""
    num_requests: int
    """Requests that were answered, the warm-up's aside."""
    duration_s: float
    """Seconds from the first request to the last answer."""
    requests_per_s: float
    """Answered requests a second."""
    throughput_tokens_per_s: float
    """Input and output tokens a second."""
    output_tokens_per_s: float
    """Output tokens a second."""
    ttft_median_s: float
    """Median seconds from request to first token."""
    ttft_p99_s: float
    """99th percentile of it."""
    tpot_median_s: float
    """Median over the requests of the mean seconds a token after the first."""
    tpot_p99_s: float
    """99th percentile of it."""
    latency_median_s: float
    """Median seconds from request to last token."""
    latency_p99_s: float
    """99th percentile of it."""

    def to_json(self) -> dict[str, Any]:
        """Return JSON types only."""
        return asdict(self)


def write_prompts(path: Path, target: Target, num_requests: int, seed: int) -> None:
    """Write what vLLM's benchmark calls a trace: for each request its lengths and a number that its random tokens hang on.

    Its plain random prompts are text, which a server may cut into more tokens than asked for; a trace's are tokens.
    """
    request = {"timestamp": 0, "input_length": target.input_length, "output_length": target.output_length}
    lines = [json.dumps({**request, "hash_ids": [seed * num_requests + i]}) for i in range(num_requests)]
    path.write_text("\n".join(lines) + "\n")


def bench_arguments(server: Server, folder: Path, target: Target, concurrency: int, prompts: Path, num_requests: int) -> list[str]:
    """Return the arguments of `vllm bench serve` for one run: as many requests at once as `concurrency`, all answered in full, greedily.

    The result goes beside the prompts, as `<stem>.json`.
    """
    options = {
        "--backend": "openai",
        "--base-url": server.url,
        "--endpoint": "/v1/completions",
        "--model": server.name,
        "--tokenizer": folder.resolve(),
        "--dataset-name": "timed_trace",
        "--dataset-path": prompts,
        "--timed-trace-chunk-hash-size": target.input_length,
        "--num-prompts": num_requests,
        "--num-warmups": concurrency,
        "--max-concurrency": concurrency,
        "--temperature": 0,
        "--percentile-metrics": "ttft,tpot,itl,e2el",
        "--metric-percentiles": "99",
        "--result-dir": prompts.parent,
        "--result-filename": f"{prompts.stem}.json{PARTIAL}",
    }
    flags = ["--no-self-timed", "--ignore-eos", "--save-result", "--disable-tqdm"]
    return [*(str(x) for pair in options.items() for x in pair), *flags]


def read_point(result: dict[str, Any], *, num_requests: int, output_length: int) -> LoadPoint:
    """Return the point that a result file of vLLM's benchmark tells of.

    Raises:
        LoadFailedError: requests failed, or answers are shorter than asked for; their times would mean something else.
    """
    completed, output = result["completed"], result["total_output_tokens"]
    if completed != num_requests:
        raise LoadFailedError(f"{num_requests - completed} of {num_requests} requests failed")
    if output != num_requests * output_length:
        raise LoadFailedError(f"{num_requests} answers have {output} tokens; asked for were {output_length} each")
    return LoadPoint(
        concurrency=result["max_concurrency"],
        num_requests=completed,
        duration_s=result["duration"],
        requests_per_s=result["request_throughput"],
        throughput_tokens_per_s=result["total_token_throughput"],
        output_tokens_per_s=result["output_throughput"],
        **{
            f"{ours}_{statistic}_s": result[f"{statistic}_{theirs}_ms"] * _MS
            for ours, theirs in (("ttft", "ttft"), ("tpot", "tpot"), ("latency", "e2el"))
            for statistic in ("median", "p99")
        },
    )


def _wait_for(path: Path, client: Program, server: Server, limit_s: float) -> dict[str, Any]:
    end_s, what = time.monotonic() + limit_s, ""
    while not path.exists():
        if client.status is not None and not path.exists():
            what = f"`vllm bench serve` ended with status {client.status} before it had measured {path.stem}"
        elif server.program.status is not None:
            what = f"`vllm serve` ended with status {server.program.status} under load"
        elif time.monotonic() > end_s:
            what = f"`vllm bench serve` had not measured {path.stem} after {limit_s:.0f} s and was ended"
        if what:
            raise LoadFailedError(f"{server.name}: {what}\n{client.tail()}\n{server.program.tail()}")
        time.sleep(_POLL_S)
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def _client_environment(hardware: Hardware) -> dict[str, str]:
    """Return the client's environment: the same prompts in every process, and no proxy between it and this machine."""
    environment = engine_environment(hardware)
    without_proxy = ",".join(x for x in (environment.get("NO_PROXY", ""), HOST) if x)
    return {**environment, "PYTHONHASHSEED": "0", "NO_PROXY": without_proxy, "no_proxy": without_proxy}


def put_under_load(
    server: Server,
    folder: Path,
    target: Target,
    concurrencies: Sequence[int],
    *,
    rounds: int,
    seed: int,
    hardware: Hardware,
    on_point: Callable[[LoadPoint], None],
    point_limit_s: float = POINT_LIMIT_S,
    progress: Progress = silent,
) -> None:
    """Measure a server at several concurrencies, one after another.

    Args:
        server: a healthy server.
        folder: its checkpoint, whose tokenizer writes the prompts.
        target: lengths of prompts and answers.
        concurrencies: requests under way at any time.
        rounds: requests of each concurrency, as a multiple of it.
        seed: of the prompts.
        hardware: this machine.
        on_point: called with each point as soon as it is there, so that the caller can store it.
        point_limit_s: seconds that one concurrency may take.
        progress: called after each point.

    Raises:
        LoadFailedError: the benchmark or the server ended or hung, or requests failed.
    """
    with tempfile.TemporaryDirectory(prefix="puzzle-dag-load-") as scratch:
        prompts = {c: Path(scratch) / f"concurrency-{c}.jsonl" for c in concurrencies}
        for c, path in prompts.items():
            write_prompts(path, target, rounds * c, seed)
        runs = [bench_arguments(server, folder, target, c, path, rounds * c) for c, path in prompts.items()]
        (Path(scratch) / "runs.json").write_text(json.dumps(runs))
        command = [sys.executable, "-m", "puzzle_dag.serving.bench", str(Path(scratch) / "runs.json")]
        with Program(command, Path(scratch) / "client.log", _client_environment(hardware)) as client:
            for done, (concurrency, path) in enumerate(prompts.items(), 1):
                result = _wait_for(path.with_suffix(".json"), client, server, point_limit_s)
                try:
                    on_point(read_point(result, num_requests=rounds * concurrency, output_length=target.output_length))
                except LoadFailedError as error:
                    tails = f"{client.tail()}\n{server.program.tail()}"
                    raise LoadFailedError(f"{server.name}, concurrency {concurrency}: {error}\n{tails}") from error
                progress(done, len(prompts), "concurrencies")
