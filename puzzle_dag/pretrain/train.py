"""Train a bundled parent, resumably: bf16 compute on float32 weights, Muon for matrices, AdamW for the rest."""

import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaForCausalLM

from puzzle_dag.corpus.mixture import mix_tokens
from puzzle_dag.corpus.skills import build_skills
from puzzle_dag.corpus.world import build_world
from puzzle_dag.pretrain.recipe import Recipe
from puzzle_dag.store import write_tensor_file

log = logging.getLogger(__name__)

_STEPS_PER_SHARD = 128
_STEPS_PER_CHECKPOINT = 100


def _lr_factor(step: int, recipe: Recipe) -> float:
    """Warm up, hold, then fall linearly to zero (a WSD schedule)."""
    warmup = max(1, round(recipe.warmup_share * recipe.num_steps))
    decay = max(1, round(recipe.decay_share * recipe.num_steps))
    return min(1.0, (step + 1) / warmup, (recipe.num_steps - step) / decay)


def _build_optimizers(model: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "layers." in n]
    rest = [p for n, p in model.named_parameters() if not (p.ndim == 2 and "layers." in n)]
    return [
        torch.optim.Muon(matrices, lr=recipe.muon_lr, weight_decay=0.01, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=recipe.adam_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def _rows(recipe: Recipe, tokenizer: Any, first_step: int) -> Iterator[Tensor]:
    """Yield [rows, row_length] int64 for each step from `first_step` on, a pure function of the step."""
    skills = build_skills(build_world(recipe.world_seed))
    for shard in range(first_step // _STEPS_PER_SHARD, -(-recipe.num_steps // _STEPS_PER_SHARD)):
        rows = mix_tokens(
            tokenizer,
            skills,
            num_tokens=_STEPS_PER_SHARD * recipe.rows_per_step * recipe.row_length,
            row_length=recipe.row_length,
            skill_share=recipe.skill_share,
            split="train",
            seed=recipe.seed * 1_000_000 + shard,
        )
        batches = torch.from_numpy(rows).long().split(recipe.rows_per_step)
        skip = max(0, first_step - shard * _STEPS_PER_SHARD)
        yield from batches[skip:]


def _save_state(path: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer], step: int) -> None:
    tensors = {f"model.{n}": p.detach().contiguous().clone() for n, p in model.named_parameters()}
    for i, optimizer in enumerate(optimizers):
        for j, state in optimizer.state_dict()["state"].items():
            for k, v in state.items():
                tensors[f"opt.{i}.{j}.{k}"] = torch.as_tensor(v).detach().clone()
    write_tensor_file(path, tensors, {"step": str(step)})


def _load_state(path: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> None:
    tensors = load_file(path)
    with torch.no_grad():
        for n, p in model.named_parameters():
            p.copy_(tensors[f"model.{n}"])
    for i, optimizer in enumerate(optimizers):
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith(f"opt.{i}."):
                _, _, j, k = key.split(".", 3)
                state.setdefault(int(j), {})[k] = value
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def train_parent(recipe: Recipe, tokenizer: Any, work: Path) -> tuple[LlamaForCausalLM, list[dict[str, float]]]:
    """Train the parent of `recipe`, or go on from the last checkpoint in `work`.

    Returns the model in float32 and the loss curve, a list of {step, tokens, loss, seconds}.
    """
    work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(recipe.seed)
    model = LlamaForCausalLM(recipe.shape.to_llama(tokenizer.eos_token_id)).train()
    optimizers = _build_optimizers(model, recipe)
    state_path, curve_path = work / "state.safetensors", work / "curve.json"
    curve: list[dict[str, float]] = []
    step = 0
    if state_path.exists():
        curve = json.loads(curve_path.read_text())
        step = int(curve[-1]["step"])
        _load_state(state_path, model, optimizers)
        log.info("going on from step %d", step)

    def loss_of(rows: Tensor) -> Tensor:
        hidden = model.model(input_ids=rows, use_cache=False).last_hidden_state[:, :-1]
        logits = model.lm_head(hidden).flatten(0, 1).float()
        return functional.cross_entropy(logits, rows[:, 1:].flatten())

    compiled = torch.compile(loss_of)
    base_lrs = [o.param_groups[0]["lr"] for o in optimizers]
    seconds = curve[-1]["seconds"] if curve else 0.0
    running, num_running, started = 0.0, 0, time.perf_counter()
    for rows in _rows(recipe, tokenizer, step):
        if step >= recipe.num_steps:
            break
        for optimizer, lr in zip(optimizers, base_lrs, strict=True):
            optimizer.param_groups[0]["lr"] = lr * _lr_factor(step, recipe)
        with torch.autocast("cpu", torch.bfloat16):
            loss = compiled(rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        step, running, num_running = step + 1, running + loss.item(), num_running + 1
        if step % _STEPS_PER_CHECKPOINT == 0 or step == recipe.num_steps:
            elapsed = time.perf_counter() - started
            seconds += elapsed
            rate = num_running * rows.numel() / elapsed
            curve.append({"step": step, "tokens": step * rows.numel(), "loss": running / num_running, "seconds": seconds})
            left = (recipe.num_steps - step) * rows.numel() / rate / 60
            log.info("step %d/%d loss %.4f %.0f tokens/s %.1f min left", step, recipe.num_steps, curve[-1]["loss"], rate, left)
            _save_state(state_path, model, optimizers, step)
            curve_path.write_text(json.dumps(curve))
            running, num_running, started = 0.0, 0, time.perf_counter()
    return model.eval(), curve
