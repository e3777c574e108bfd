"""`vllm serve` as our users run it: a checkpoint behind vLLM's OpenAI server on 127.0.0.1, up when /health says so."""

import http.client
import json
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from puzzle_dag.config import Target
from puzzle_dag.engine.environment import engine_environment
from puzzle_dag.engine.hardware import Hardware, detect_hardware
from puzzle_dag.engine.int8 import prepare_checkpoint, quantization_argument
from puzzle_dag.engine.jobs import EngineSettings, Workload
from puzzle_dag.engine.kv_cache import size_kv_cache
from puzzle_dag.engine.worker import count_prefill_tokens
from puzzle_dag.serving.program import Program

HOST = "127.0.0.1"
START_LIMIT_S = 900.0
"""Seconds a server may take until it is healthy: compiling included."""
_POLL_S = 0.25


class ServerFailedError(RuntimeError):
    """A server ended or hung before it was healthy; the message ends with the tail of its log."""


@dataclass(frozen=True, slots=True)
class Server:
    """A healthy server."""

    url: str
    """http://127.0.0.1:PORT, without the /v1."""
    name: str
    """The model's name in requests."""
    program: Program
    """Its process."""


def find_free_port() -> int:
    """Return a port of 127.0.0.1 that nothing listens on at the moment."""
    with socket.socket() as s:
        s.bind((HOST, 0))
        port: int = s.getsockname()[1]
        return port


def serve_command(folder: Path, name: str, target: Target, max_concurrency: int, port: int) -> list[str]:
    """Return the command line of `vllm serve` that serves a checkpoint as a target says.

    Args:
        folder: the checkpoint, in the target's precision (`puzzle_dag.engine.int8.prepare_checkpoint`).
        name: the model's name in requests.
        target: mode, types and lengths; prompt and answer fill the model's length.
        max_concurrency: requests that the KV cache holds and the scheduler runs at once.
        port: where it listens, on 127.0.0.1 only.
    """
    workload = Workload(input_length=target.input_length, output_length=target.output_length, batch_sizes=(max_concurrency,), repeats=1)
    config = json.loads((folder / "config.json").read_text())
    options = {
        "--host": HOST,
        "--port": port,
        "--served-model-name": name,
        "--dtype": target.dtype,
        "--kv-cache-dtype": target.kv_cache_dtype,
        "--tensor-parallel-size": target.tensor_parallel_size,
        "--max-model-len": target.input_length + target.output_length,
        "--max-num-seqs": max_concurrency,
        "--max-num-batched-tokens": count_prefill_tokens(workload),
        "--kv-cache-memory-bytes": size_kv_cache(config, workload, EngineSettings.of(target)),
        "--load-format": "safetensors",
        "--seed": 0,
    }
    flags = ["--no-enable-prefix-caching", *(["--enforce-eager"] if target.mode == "eager" else [])]
    quantization = quantization_argument(target.quantization)
    flags += ["--quantization", quantization] if quantization else []
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(folder.resolve())]
    return [*command, *(str(x) for pair in options.items() for x in pair), *flags]


def _is_healthy(port: int) -> bool:
    connection = http.client.HTTPConnection(HOST, port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def _wait_until_healthy(program: Program, port: int, limit_s: float) -> None:
    end_s = time.monotonic() + limit_s
    while not _is_healthy(port):
        if program.status is not None:
            raise ServerFailedError(f"`vllm serve` ended with status {program.status} before it was healthy\n{program.tail()}")
        if time.monotonic() > end_s:
            raise ServerFailedError(f"`vllm serve` was not healthy after {limit_s:.0f} s and was ended\n{program.tail()}")
        time.sleep(_POLL_S)


@contextmanager
def serve(
    folder: Path,
    name: str,
    target: Target,
    *,
    max_concurrency: int,
    start_limit_s: float = START_LIMIT_S,
    hardware: Hardware | None = None,
) -> Iterator[Server]:
    """Serve a checkpoint over HTTP while the context lasts.

    Args:
        folder: the checkpoint.
        name: the model's name in requests.
        target: how it is served; its lengths are the longest prompt and answer.
        max_concurrency: requests served at once.
        start_limit_s: seconds until it must be healthy.
        hardware: this machine, by default as detected.

    Raises:
        QuantizationError: the target is int8 and the checkpoint can't be.
        ServerFailedError: it ended, or was not healthy in time.
    """
    port = find_free_port()
    with tempfile.TemporaryDirectory(prefix="puzzle-dag-server-") as scratch:
        served = prepare_checkpoint(folder, target.quantization, Path(scratch) / "int8")
        command = serve_command(served, name, target, max_concurrency, port)
        environment = engine_environment(hardware or detect_hardware())
        with Program(command, Path(scratch) / "server.log", environment) as program:
            _wait_until_healthy(program, port, start_limit_s)
            yield Server(f"http://{HOST}:{port}", name, program)
