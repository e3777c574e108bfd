"""Speculative decoding: a child drafts tokens that its own parent accepts or refuses, against the parent alone.

The answer is the parent's either way (Leviathan et al., arXiv 2211.17192); what a child buys is time, and only where
what it proposes is accepted often enough to pay for its own passes. Engines with and without it take turns, on the
same prompts: text that nothing was trained on, as acceptance depends on the text.
"""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from puzzle_dag.config import SpeculationSettings, Target
from puzzle_dag.engine.client import read_engine_version
from puzzle_dag.engine.environment import engine_environment
from puzzle_dag.engine.hardware import Hardware, check_hardware, detect_hardware
from puzzle_dag.engine.jobs import EngineSettings
from puzzle_dag.model.checkpoint import architecture_of
from puzzle_dag.model.configuration_puzzle_dag import PuzzleDagConfig
from puzzle_dag.paired_ratio import estimate_ratio
from puzzle_dag.progress import Progress, silent
from puzzle_dag.serving.program import Program

VERSION = 3

ENGINE_LIMIT_S = {"eager": 300.0, "compiled": 1200.0}
"""Mode -> seconds that one engine may take: its start, compiling included, and all its generations."""
_POLL_S = 0.2


class SpeculationError(ValueError):
    """The prompts, lengths or batch sizes can't be served."""


class SpeculationFailedError(RuntimeError):
    """The parent's engine failed, or a worker ended or hung; the message ends with the tail of its log."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Speculation:
    """A draft model at one batch size."""

    batch: int
    """Concurrent requests."""
    num_turns: int
    """Engines with, and as many without, the draft model."""
    parent_s: float
    """Median seconds of the batch, the parent alone."""
    speculative_s: float
    """Median seconds of the batch with the draft model."""
    speedup: float
    """parent_s / speculative_s by turns, geometric mean."""
    speedup_low: float
    """Lower end of its 95 % confidence interval."""
    speedup_high: float
    """Upper end."""
    num_draft_tokens: int
    """Tokens that the child proposed, over all turns."""
    num_accepted_tokens: int
    """Tokens of them that the parent accepted."""
    acceptance_rate: float
    """Accepted / proposed."""
    tokens_per_step: float
    """Tokens that a pass of the parent gave: 1 + accepted / drafts."""
    same_tokens: float
    """Share of generated tokens, up to each answer's first difference, that are the parent's own; below 1 only by rounding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculationReport:
    """A child as the draft model of its parent: what was measured, or why nothing could be."""

    target: str
    """Name of the target."""
    hardware: str
    """Processor or GPU."""
    engine_version: str
    """Distribution and version of the engine."""
    num_draft_tokens: int
    """Tokens proposed at a time."""
    prompt_length: int
    """Prompt tokens a request."""
    output_length: int
    """Generated tokens a request."""
    batches: tuple[Speculation, ...]
    """One entry a batch size; empty where the engine can't."""
    unsupported: str | None
    """The engine's own message, or why, where it can't run this child as a draft model; else None."""


def _job(
    folder: Path, draft: dict[str, Any] | None, prompts: Sequence[Sequence[int]], target: Target, settings: SpeculationSettings
) -> dict[str, Any]:
    return {
        "folder": str(folder.resolve()),
        "draft": draft,
        "prompts": [list(p) for p in prompts],
        "settings": asdict(EngineSettings.of(target)),
        "batch_sizes": settings.batch_sizes,
        "output_length": settings.output_length,
        "repeats": settings.repeats,
    }


def _check(parent_folder: Path, child_folder: Path, prompts: Sequence[Sequence[int]], settings: SpeculationSettings) -> None:
    for folder in (parent_folder, child_folder):
        if not (folder / "config.json").is_file() or not list(folder.glob("*.safetensors")):
            raise SpeculationError(f"{folder} is no checkpoint (config.json and *.safetensors); assemble it first")
    needed = max(settings.batch_sizes)
    if len(prompts) < needed or len({len(p) for p in prompts}) != 1:
        raise SpeculationError(f"speculation.batch_sizes asks for {needed} prompts of one length; there are {len(prompts)}")
    config = json.loads((parent_folder / "config.json").read_text())
    longest, total = config["max_position_embeddings"], len(prompts[0]) + settings.output_length
    if total > longest:
        raise SpeculationError(
            f"speculation.output_length is {settings.output_length}; with prompts of {len(prompts[0])} tokens that is {total}, "
            f"and the parent takes at most {longest}"
        )


def _find_refusal(child_folder: Path, hardware: Hardware) -> str | None:
    """Return why no engine can draft with a child, or None: told now, it costs no engine that hangs.

    vLLM 0.32 gives all attention layers of a draft model the metadata of its first one (`initialize_attn_backend` in
    v1/spec_decode/llm_base_proposer.py). On CPUs these hold the number of KV heads, and with others the kernel never returns.
    """
    if hardware.kind != "cpu" or json.loads((child_folder / "config.json").read_text())["model_type"] != PuzzleDagConfig.model_type:
        return None
    blocks = architecture_of(PuzzleDagConfig.from_pretrained(child_folder))
    heads = sorted({b.attention.kv_heads for b in blocks if b.attention.kind == "gqa"})
    if len(heads) < 2:
        return None
    return (
        f"its layers have {' and '.join(map(str, heads))} KV heads; vLLM's CPU build drafts with models whose attention layers all have "
        "as many, and hangs with others."
    )


def _run(jobs: Sequence[dict[str, Any]], environment: Mapping[str, str], limit_s: float, progress: Progress) -> list[dict[str, Any]]:
    """Run engines in one worker and return their results, in order; the first draft engine's failure is the last result."""
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="puzzle-dag-draft-") as scratch:
        paths = [Path(scratch) / f"{i}.json" for i in range(len(jobs))]
        (Path(scratch) / "jobs.json").write_text(json.dumps([{**j, "result": str(p)} for j, p in zip(jobs, paths, strict=True)]))
        command = [sys.executable, "-m", "puzzle_dag.serving.draft_worker", str(Path(scratch) / "jobs.json")]
        with Program(command, Path(scratch) / "worker.log", environment) as worker:
            for job, path in zip(jobs, paths, strict=True):
                result = _wait_for(path, worker, job, limit_s)
                if "error" in result and job["draft"] is None:
                    raise SpeculationFailedError(f"the parent alone failed: {result['error']}\n{worker.tail()}")
                if "error" in result and len(results) > 1:
                    raise SpeculationFailedError(f"the draft model served {len(results) // 2} turns, then failed: {result['error']}")
                results.append(result)
                progress(len(results), len(jobs), "engines")
                if "error" in result:
                    break
    return results


def _wait_for(path: Path, worker: Program, job: dict[str, Any], limit_s: float) -> dict[str, Any]:
    end_s = time.monotonic() + limit_s
    while not path.exists():
        if worker.status is not None and not path.exists():
            if job["draft"] is not None:  # a draft model that kills its engine is as unsupported as one that it refuses
                return {"error": f"the engine's process ended with status {worker.status}\n{worker.tail()}"}
            raise SpeculationFailedError(f"the parent's engine ended with status {worker.status}\n{worker.tail()}")
        if time.monotonic() > end_s:
            told = f"an engine took more than {limit_s:.0f} s and was ended\n{worker.tail()}"
            if job["draft"] is not None:  # nor is one that hangs
                return {"error": told}
            raise SpeculationFailedError(told)
        time.sleep(_POLL_S)
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def _count_same(ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> float:
    """Return the share of tokens before each pair's first difference."""
    same = sum(next((i for i, (a, b) in enumerate(zip(x, y, strict=True)) if a != b), len(x)) for x, y in zip(ours, theirs, strict=True))
    return same / sum(len(x) for x in ours)


def _summarise(batch: int, alone: Sequence[dict[str, Any]], drafted: Sequence[dict[str, Any]]) -> Speculation:
    own, with_draft = ([r["times"][str(batch)] for r in results] for results in (alone, drafted))
    parent_s, speculative_s = ([statistics.median(t["total_s"]) for t in times] for times in (own, with_draft))
    speedup, low, high = estimate_ratio(parent_s, speculative_s)
    drafts, proposed, accepted = (sum(t[n] for t in with_draft) for n in ("num_drafts", "num_draft_tokens", "num_accepted_tokens"))
    if not proposed:
        raise SpeculationFailedError(f"batch {batch}: the engine ran with the draft model, but reports no token that it proposed")
    return Speculation(
        batch=batch,
        num_turns=len(own),
        parent_s=statistics.median(parent_s),
        speculative_s=statistics.median(speculative_s),
        speedup=speedup,
        speedup_low=low,
        speedup_high=high,
        num_draft_tokens=proposed,
        num_accepted_tokens=accepted,
        acceptance_rate=accepted / proposed,
        tokens_per_step=1 + accepted / drafts,
        same_tokens=statistics.fmean(_count_same(a["tokens"], b["tokens"]) for a, b in zip(own, with_draft, strict=True)),
    )


def measure_speculation(
    parent_folder: Path,
    child_folder: Path,
    prompts: Sequence[Sequence[int]],
    target: Target,
    settings: SpeculationSettings,
    *,
    progress: Progress = silent,
) -> SpeculationReport:
    """Generate with the parent alone and with a child as its draft model, by turns.

    Args:
        parent_folder: the parent's checkpoint.
        child_folder: the child's; the same vocabulary.
        prompts: token ids, all of one length, as many as the largest batch size at least.
        target: how the engines are started; its lengths and batch sizes play no part.
        settings: batch sizes, tokens proposed at a time, turns.
        progress: called after each engine.

    Returns:
        What was measured; where the engine can't run this child as a draft model, its own message, or why, in `unsupported`.

    Raises:
        SpeculationError: a folder is no checkpoint, or prompts and lengths don't fit.
        VllmMissingError: vLLM is not installed.
        HardwareMismatchError: the target is for other hardware.
        SpeculationFailedError: the parent's own engine failed or hung, a draft model's did after a turn, or nothing was drafted.
    """
    _check(parent_folder, child_folder, prompts, settings)
    version, hardware = read_engine_version(), detect_hardware()
    check_hardware(target, hardware)
    draft = {
        "method": "draft_model",
        "model": str(child_folder.resolve()),
        "num_speculative_tokens": settings.num_draft_tokens,
        "draft_tensor_parallel_size": target.tensor_parallel_size,
    }
    turn = [_job(parent_folder, d, prompts, target, settings) for d in (None, draft)]
    error, results = _find_refusal(child_folder, hardware), list[dict[str, Any]]()
    if error is None:
        results = _run(turn * settings.turns, _environment(hardware, target), ENGINE_LIMIT_S[target.mode], progress)
        error = results[-1].get("error")
    batches = () if error else tuple(_summarise(b, results[::2], results[1::2]) for b in settings.batch_sizes)
    return SpeculationReport(
        target=target.name,
        hardware=hardware.name,
        engine_version=version,
        num_draft_tokens=settings.num_draft_tokens,
        prompt_length=len(prompts[0]),
        output_length=settings.output_length,
        batches=batches,
        unsupported=error,
    )


def _environment(hardware: Hardware, target: Target) -> dict[str, str]:
    return {**engine_environment(hardware), "VLLM_ENABLE_V1_MULTIPROCESSING": "1" if target.multiprocess else "0"}
