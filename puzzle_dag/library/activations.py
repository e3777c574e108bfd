"""The parent's hidden states at every layer boundary, and how much each channel and head matters, in one pass.

A cache is a folder of safetensors shards: per split `train-00000.safetensors`, ..., each with its rows' `tokens`
and one tensor per boundary, so that one layer is read without the others. A shard also carries its partial sums
of the importances and the fingerprint of what it was made from, so that a pass that was interrupted goes on where
it stopped. `manifest.json` is written last: a cache that has one is whole.
"""

import copy
import json
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from puzzle_dag.library.importance import ImportanceSums, importances, is_sum
from puzzle_dag.pieces import Split
from puzzle_dag.progress import Progress, silent
from puzzle_dag.store import digest_file, digest_tensors, fingerprint, write_atomically, write_tensor_file

if TYPE_CHECKING:
    from puzzle_dag.model.parent import Parent

VERSION = 1
_MANIFEST = "manifest.json"
_ROWS_PER_BATCH = 8
_SPLITS: tuple[Split, ...] = ("train", "score")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class ActivationCacheError(ValueError):
    """A cache that isn't there, isn't whole, or doesn't have what was asked for."""


def _boundary_name(boundary: int) -> str:
    return f"hidden.{boundary:03d}"


def _is_made_from(path: Path, inputs: str) -> bool:
    if not path.exists():
        return False
    with safe_open(path, framework="pt") as shard:
        return bool((shard.metadata() or {}).get("inputs") == inputs)


@torch.no_grad()
def _run_shard(model: nn.Module, rows: Tensor, *, dtype: torch.dtype, with_importance: bool) -> dict[str, Tensor]:
    """Return a shard's tensors: tokens, boundaries [rows, row_length, hidden] and, if asked for, importance sums."""
    backbone, device = model.get_submodule("model"), next(model.parameters()).device
    sums = ImportanceSums(backbone)
    boundaries: list[list[Tensor]] = []
    with sums.watching() if with_importance else nullcontext():
        for batch in rows.split(_ROWS_PER_BATCH):
            outputs = backbone(input_ids=batch.to(device), use_cache=False, output_hidden_states=True)
            boundaries.append([h.to("cpu", dtype) for h in outputs.hidden_states])
    tensors = {_boundary_name(i): torch.cat(states) for i, states in enumerate(zip(*boundaries, strict=True))}
    return {"tokens": rows, **tensors, **sums.sums}


def collect_activations(
    parent: "Parent",
    train_rows: Tensor,
    score_rows: Tensor,
    folder: Path,
    *,
    dtype: str = "bfloat16",
    rows_per_shard: int = 64,
    progress: Progress = silent,
) -> None:
    """Run the parent once over both splits and keep what it computes; a pass that was cut short goes on.

    Args:
        parent: the parent; run on the device that it is on, in `dtype` (a copy of it, where its weights have another).
        train_rows: token ids [rows, row_length] that variants are initialised from and trained on.
        score_rows: token ids [rows, row_length] that blocks are scored on.
        folder: where the cache goes; what another pass (other rows, parent or dtype) left there is replaced.
        dtype: "bfloat16" or "float32": what is computed in and stored.
        rows_per_shard: rows a file; what is lost at most when the pass is killed.
        progress: told the tokens done.

    Raises:
        ActivationCacheError: rows that are no matrix of token ids, or a dtype that isn't known.
    """
    if dtype not in DTYPES:
        raise ActivationCacheError(f"dtype {dtype!r} not understood; use one of {', '.join(DTYPES)}")
    splits: dict[Split, Tensor] = {"train": train_rows.long().cpu(), "score": score_rows.long().cpu()}
    for split, rows in splits.items():
        if rows.ndim != 2 or rows.shape[0] == 0:
            raise ActivationCacheError(f"{split}_rows has shape {tuple(rows.shape)}; give token ids [rows, row_length], one row or more")
    folder.mkdir(parents=True, exist_ok=True)
    inputs = {"version": VERSION, "parent": parent.digest, "dtype": dtype, "rows_per_shard": rows_per_shard}
    # One copy for the whole pass: a bfloat16 parent can't be run in float32 by autocast.
    same = next(parent.model.parameters()).dtype == DTYPES[dtype]
    model = parent.model if same else copy.deepcopy(parent.model).to(DTYPES[dtype])
    total, done = sum(r.numel() for r in splits.values()), 0
    shards: dict[str, list[dict[str, Any]]] = {}
    for split, rows in splits.items():
        shards[split] = []
        for index, chunk in enumerate(rows.split(rows_per_shard)):
            path = folder / f"{split}-{index:05d}.safetensors"
            made_from = fingerprint({**inputs, "split": split, "tokens": digest_tensors({"tokens": chunk})})
            if not _is_made_from(path, made_from):
                (folder / _MANIFEST).unlink(missing_ok=True)
                tensors = _run_shard(model, chunk, dtype=DTYPES[dtype], with_importance=split == "train")
                write_tensor_file(path, tensors, {"inputs": made_from})
            shards[split].append({"file": path.name, "rows": len(chunk), "digest": digest_file(path)})
            done += chunk.numel()
            progress(done, total, "tokens")
    _remove_leftovers(folder, {entry["file"] for entries in shards.values() for entry in entries})
    manifest = {**inputs, "num_layers": parent.num_layers, "shards": shards}
    _write_importances(parent, folder, manifest)
    manifest["digest"] = fingerprint(manifest)
    write_atomically(folder / _MANIFEST, json.dumps(manifest, indent=1))


def _remove_leftovers(folder: Path, kept: set[str]) -> None:
    """Remove shards of a longer pass and what a killed one left half written."""
    for split in _SPLITS:
        for path in (*folder.glob(f"{split}-*.safetensors"), *folder.glob(f".{split}-*.safetensors.*")):
            if path.name not in kept:
                path.unlink()


def _write_importances(parent: "Parent", folder: Path, manifest: dict[str, Any]) -> None:
    num_tokens, sums = 0, dict[str, Tensor]()
    for entry in manifest["shards"]["train"]:
        with safe_open(folder / entry["file"], framework="pt") as shard:
            num_tokens += shard.get_tensor("tokens").numel()
            for name in filter(is_sum, shard.keys()):
                sums[name] = sums[name] + shard.get_tensor(name) if name in sums else shard.get_tensor(name)
    down = [parent.layer_state(layer, "ffn")["mlp.down_proj.weight"] for layer in range(parent.num_layers)]
    tensors = importances(sums, down, num_tokens)
    write_tensor_file(folder / "importance.safetensors", tensors, {"inputs": ""})
    manifest["importance"] = digest_tensors(tensors)


class ActivationCache:
    """Reads a cache that `collect_activations` made; tensors are mapped, not loaded, until they are used."""

    def __init__(self, folder: Path) -> None:
        """Open a cache. Raises ActivationCacheError where there is none that is whole."""
        self.folder = folder
        try:
            self._manifest = json.loads((folder / _MANIFEST).read_text())
        except FileNotFoundError:
            raise ActivationCacheError(f"{folder} holds no finished activations; collect them first") from None

    @property
    def num_layers(self) -> int:
        """Number of the parent's layers."""
        return int(self._manifest["num_layers"])

    @property
    def digest(self) -> str:
        """Digest of the content: both splits and the importances."""
        return str(self._manifest["digest"])

    @property
    def dtype(self) -> torch.dtype:
        """Type of the hidden states."""
        return DTYPES[self._manifest["dtype"]]

    def num_rows(self, split: Split) -> int:
        """Return the number of rows of a split."""
        return sum(entry["rows"] for entry in self._manifest["shards"][split])

    def tokens(self, split: Split) -> Tensor:
        """Return the token ids, int64 [rows, row_length]."""
        return self._read(split, "tokens", 0, None)

    def hidden(self, split: Split, boundary: int, *, start: int = 0, stop: int | None = None) -> Tensor:
        """Return rows `start` to `stop` (all) of the states that enter layer `boundary`, [rows, row_length, hidden].

        Boundary `num_layers` is what leaves the last layer, before the final norm. Raises ActivationCacheError.
        """
        if not 0 <= boundary <= self.num_layers:
            raise ActivationCacheError(f"boundary {boundary} isn't there; the parent has boundaries 0 to {self.num_layers}")
        return self._read(split, _boundary_name(boundary), start, stop)

    def gather(self, split: Split, boundary: int, rows: Tensor) -> Tensor:
        """Return the given rows (int64 [n]) in the given order, [n, row_length, hidden], reading only those."""
        return torch.cat([self.hidden(split, boundary, start=row, stop=row + 1) for row in rows.tolist()])

    def channel_contribution(self, layer: int) -> Tensor:
        """Return each FFN channel's contribution, float64 [intermediate_size] (Puzzle, section 3)."""
        return self._importance(f"channel_contribution.{layer}")

    def head_importance(self, layer: int) -> Tensor:
        """Return the mean L2 norm of each query head's share of the attention's output, float64 [heads]."""
        return self._importance(f"head_importance.{layer}")

    def _importance(self, name: str) -> Tensor:
        with safe_open(self.folder / "importance.safetensors", framework="pt") as shard:
            tensor: Tensor = shard.get_tensor(name)
        return tensor

    def _read(self, split: Split, name: str, start: int, stop: int | None) -> Tensor:
        pieces, first = [], 0
        stop = self.num_rows(split) if stop is None else stop
        for entry in self._manifest["shards"][split]:
            low, high = max(start - first, 0), min(stop - first, entry["rows"])
            first += entry["rows"]
            if low < high:
                with safe_open(self.folder / entry["file"], framework="pt") as shard:
                    pieces.append(shard.get_slice(name)[low:high])
        if not pieces:
            raise ActivationCacheError(f"rows {start} to {stop} of {split!r} aren't there; it has {self.num_rows(split)}")
        return torch.cat(pieces)
