"""Heal a child: global knowledge distillation from its parent (Puzzle, section 5), resumable.

The loss is the sum over layers of 1 - cos(child's hidden state, parent's) plus KL(parent || child) on the logits,
and no language-model loss. Weights are float32 masters; with bfloat16 compute, matrix products are autocast.
"""

import copy
import json
import logging
import math
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from puzzle_dag.children.assemble import model_digest, num_parameters
from puzzle_dag.children.losses import cosine_loss, distillation_kl
from puzzle_dag.config import UptrainSettings
from puzzle_dag.model.checkpoint import load_checkpoint, save_checkpoint
from puzzle_dag.model.modeling_puzzle_dag import PuzzleDagForCausalLM
from puzzle_dag.model.parent import Parent
from puzzle_dag.progress import Progress, silent
from puzzle_dag.store import digest_tensors, fingerprint, write_tensor_file

VERSION = 1
"""Version of the training; part of the asset's code version."""

log = logging.getLogger(__name__)

_WARMUP_SHARE = 0.05
_FINAL_LR_SHARE = 0.05
_BETAS = (0.9, 0.95)
_MAX_GRAD_NORM = 1.0
_STATE_FILE = "state.safetensors"


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """The losses of one optimiser step."""

    step: int
    """Steps done, this one included."""
    tokens: int
    """Tokens trained on, this step's included."""
    kl: float
    """KL(parent || child) in nats a token, before the step."""
    cosine: float
    """Sum over layers of 1 - cos, before the step."""
    learning_rate: float
    """Learning rate of the step."""


@dataclass(frozen=True, slots=True)
class UptrainReport:
    """What an uptraining did. `num_tokens` 0 says that the child is a copy of the assembled one."""

    digest: str
    """Digest of the uptrained child."""
    num_tokens: int
    """Tokens trained on."""
    num_steps: int
    """Optimiser steps."""
    seconds: float
    """Seconds of training, over all runs where it was resumed."""
    flops: float
    """Floating-point operations: 6 a parameter and token for the child, 2 for the parent; attention products not counted."""
    curve: list[CurvePoint] = field(default_factory=list)
    """Every step."""

    @property
    def flops_per_s(self) -> float:
        """Achieved rate; 0 where nothing was trained."""
        return self.flops / self.seconds if self.seconds > 0 else 0.0


@dataclass(slots=True)
class _Run:
    """What changes while training."""

    model: PuzzleDagForCausalLM
    optimizer: torch.optim.Optimizer
    curve: list[CurvePoint] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def step(self) -> int:
        return len(self.curve)


def learning_rate_at(step: int, num_steps: int, peak: float) -> float:
    """Return the learning rate of a step: linear warm-up over 5 % of the steps, then a cosine down to 5 % of the peak."""
    warmup = max(1, round(_WARMUP_SHARE * num_steps))
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, num_steps - warmup)
    return peak * (_FINAL_LR_SHARE + (1 - _FINAL_LR_SHARE) * 0.5 * (1 + math.cos(math.pi * done)))


def _start(child: PuzzleDagForCausalLM, settings: UptrainSettings) -> _Run:
    model = child.float().train()
    parameters = list(model.parameters())
    return _Run(model, torch.optim.AdamW(parameters, lr=settings.learning_rate, betas=_BETAS, weight_decay=0.0, fused=True))


def _save_state(path: Path, run: _Run, key: str) -> None:
    """Write weights, optimiser and curve as one file, so that they can't disagree after a crash."""
    tensors = {f"model.{n}": p.detach() for n, p in run.model.named_parameters()}
    for index, state in run.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{k}": torch.as_tensor(v) for k, v in state.items()}
    metadata = {"key": key, "seconds": repr(run.seconds), "curve": json.dumps([asdict(p) for p in run.curve])}
    write_tensor_file(path, tensors, metadata)


def _load_state(path: Path, run: _Run, key: str) -> None:
    """Go on from a saved state of the same run, where there is one."""
    if not path.exists():
        return
    with safe_open(path, "pt") as f:
        metadata = f.metadata()
        if metadata["key"] != key:
            log.info("%s belongs to another training; starting anew", path)
            return
        tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118 (not a mapping)
    with torch.no_grad():
        for name, parameter in run.model.named_parameters():
            parameter.copy_(tensors[f"model.{name}"])
    states: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, index, what = name.split(".")
            states.setdefault(int(index), {})[what] = tensor
    run.optimizer.load_state_dict({"state": states, "param_groups": run.optimizer.state_dict()["param_groups"]})
    run.curve = [CurvePoint(**p) for p in json.loads(metadata["curve"])]
    run.seconds = float(metadata["seconds"])
    log.info("going on from step %d", run.step)


def _round_activations(model: PuzzleDagForCausalLM) -> list[RemovableHandle]:
    """Round norms' outputs and rotary factors to bfloat16 once, as a bfloat16 model does when it serves.

    Autocast would round a norm's output again for each projection and keep the rotary embedding in float32, forward and
    backward: 13 % of a step on a CPU.
    """
    handles = [model.model.rotary_emb.register_forward_hook(lambda _, __, factors: tuple(f.bfloat16() for f in factors))]
    norms = [m for m in model.modules() if isinstance(m, LlamaRMSNorm)]
    return handles + [norm.register_forward_hook(lambda _, __, output: output.bfloat16()) for norm in norms]


def _losses(teacher: PuzzleDagForCausalLM, student: PuzzleDagForCausalLM, batch: Tensor, autocast: bool) -> tuple[Tensor, Tensor]:
    with torch.autocast(batch.device.type, torch.bfloat16, enabled=autocast):
        with torch.no_grad():  # not inference_mode: the losses keep the parent's states for their gradient
            parent = teacher(input_ids=batch, output_hidden_states=True, use_cache=False)
        child = student(input_ids=batch, output_hidden_states=True, use_cache=False)
    # boundary 0 is the embedding's output, which is no layer's
    cosine = cosine_loss(child.hidden_states[1:], parent.hidden_states[1:])
    return distillation_kl(child.logits, parent.logits), cosine


def _run_key(parent: Parent, child_digest: str, rows: Tensor, settings: UptrainSettings, compute_dtype: str) -> str:
    return fingerprint(
        {
            "version": VERSION,
            "parent": parent.digest,
            "child": child_digest,
            "rows": digest_tensors({"rows": rows}),
            "settings": settings.model_dump(),
            "dtype": compute_dtype,
        }
    )


def _train(
    run: _Run, teacher: PuzzleDagForCausalLM, rows: Tensor, settings: UptrainSettings, *, autocast: bool, save: Any, progress: Progress
) -> None:
    generator = torch.Generator().manual_seed(settings.seed)
    batches = torch.randperm(len(rows), generator=generator).split(settings.rows_per_step)
    num_done = sum(len(b) for b in batches[: run.step]) * rows.shape[1]
    parameters = list(run.model.parameters())
    for indices in batches[run.step :]:
        started_s = time.perf_counter()
        learning_rate = learning_rate_at(run.step, len(batches), settings.learning_rate)
        for group in run.optimizer.param_groups:
            group["lr"] = learning_rate
        kl, cosine = _losses(teacher, run.model, rows[indices].to(run.model.device), autocast)
        (kl + cosine).backward()
        torch.nn.utils.clip_grad_norm_(parameters, _MAX_GRAD_NORM)
        run.optimizer.step()
        run.optimizer.zero_grad()
        num_done += len(indices) * rows.shape[1]
        run.curve.append(CurvePoint(run.step + 1, num_done, kl.item(), cosine.item(), learning_rate))
        run.seconds += time.perf_counter() - started_s
        progress(num_done, rows.numel(), "tokens")
        save(run)


def uptrain_child(
    parent: Parent,
    child_folder: Path,
    rows: Tensor,
    settings: UptrainSettings,
    folder: Path,
    *,
    compute_dtype: str,
    work_folder: Path,
    steps_per_save: int = 50,
    progress: Progress = silent,
) -> UptrainReport:
    """Train a child to do what its parent does, on one pass over `rows`, and write it to `folder`.

    A run that was interrupted goes on from its last state in `work_folder`; the result is that of an uninterrupted
    run, up to the order of floating-point sums. Without rows the child is copied, and the report says so.

    Memory: 16 bytes a parameter of the child (weights, gradients and two moments in float32), the parent, and the
    activations of `settings.rows_per_step` rows; one device. Compiling was tried and left out: on a CPU it takes 50 s and
    saves 9 % of a step.

    Args:
        parent: the teacher; runs in float32 for float32 compute, else in the dtype it is loaded in.
        child_folder: the assembled child's checkpoint.
        rows: token ids that nothing else was fitted to, integers [rows, row_length].
        settings: rows a step, peak learning rate, seed of the order.
        folder: where the uptrained child goes, in the child's own dtype.
        compute_dtype: "float32" or "bfloat16".
        work_folder: where the resumable state lies; deleted at the end.
        steps_per_save: optimiser steps between saved states.
        progress: told of the tokens trained on.
    """
    assert compute_dtype in ("float32", "bfloat16"), compute_dtype
    child = load_checkpoint(child_folder, device=parent.model.device)
    stored_dtype, child_digest = child.lm_head.weight.dtype, model_digest(child)
    if len(rows) == 0:
        save_checkpoint(child, parent.tokenizer, folder)
        return UptrainReport(child_digest, 0, 0, 0.0, 0.0)
    rows, teacher = rows.long(), parent.model
    if compute_dtype == "float32" and teacher.lm_head.weight.dtype != torch.float32:
        teacher = copy.deepcopy(teacher).float()
    key, path = _run_key(parent, child_digest, rows, settings, compute_dtype), work_folder / _STATE_FILE
    run = _start(child, settings)
    _load_state(path, run, key)
    num_steps = -(-len(rows) // settings.rows_per_step)

    def save(state: _Run) -> None:
        if state.step % steps_per_save == 0 and state.step < num_steps:
            _save_state(path, state, key)

    hooks = _round_activations(run.model) if compute_dtype == "bfloat16" else []
    _train(run, teacher, rows, settings, autocast=bool(hooks), save=save, progress=progress)
    for hook in hooks:
        hook.remove()
    model = run.model.to(stored_dtype).eval()
    save_checkpoint(model, parent.tokenizer, folder)
    path.unlink(missing_ok=True)
    flops = (6.0 * num_parameters(model) + 2.0 * num_parameters(teacher)) * rows.numel()
    return UptrainReport(model_digest(model), rows.numel(), num_steps, run.seconds, flops, run.curve)
