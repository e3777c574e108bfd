"""A content-addressed store: what was expensive to make is kept under a key that says all that determined it.

An artifact is a folder `<root>/<kind>/<key[:2]>/<key>/` that is complete when it exists: it is written under a
temporary name, synced and renamed, so a crash leaves nothing half done. `manifest.json` inside holds the digest
of the content, the inputs that the key was made from, and free metadata. Every command and every code location
imports this module, so torch is imported by what touches tensors.
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

_KIND = re.compile(r"[a-z][a-z0-9_]*")
_TENSORS = "tensors.safetensors"


def fingerprint(value: Any) -> str:
    """Return the hex SHA-256 of `value` as canonical JSON (sorted keys; no NaN, nothing but JSON types)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def digest_file(path: Path) -> str:
    """Return the hex SHA-256 of a file's bytes, read in pieces."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def digest_tensors(tensors: "Mapping[str, Tensor]") -> str:
    """Return the hex SHA-256 of named tensors: names, dtypes, shapes and bytes, in sorted order."""
    import torch

    state = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        state.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        state.update(tensor.flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return state.hexdigest()


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write a file so that a reader sees the old content or the new one, never a part; synced before the rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as f:
            f.write(content.encode() if isinstance(content, str) else content)
            f.flush()
            os.fsync(f.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_tensor_file(path: Path, tensors: "Mapping[str, Tensor]", metadata: dict[str, str]) -> None:
    """Write a safetensors file as `write_atomically` writes any other; its folder is made where it is missing."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        save_file({n: t.detach().cpu().contiguous() for n, t in tensors.items()}, name, metadata=metadata)
        with Path(name).open("rb") as f:
            os.fsync(f.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


@dataclass(frozen=True, slots=True)
class Artifact:
    """A finished artifact: its folder, the digest of its content and what its manifest says."""

    folder: Path
    digest: str
    metadata: dict[str, Any]

    def tensors(self) -> "dict[str, Tensor]":
        """Read the artifact's tensors."""
        from safetensors.torch import load_file

        tensors: dict[str, Tensor] = load_file(self.folder / _TENSORS)
        return tensors


class ArtifactStore:
    """Artifacts on a local or shared file system, by kind and key."""

    def __init__(self, root: Path) -> None:
        """Use `root`, which need not exist yet."""
        self.root = root

    def folder(self, kind: str, key: str) -> Path:
        """Return where an artifact lies or would lie. Raises ValueError for a kind or key that is not a plain name."""
        if not _KIND.fullmatch(kind) or not re.fullmatch(r"[0-9a-f]{64}", key):
            raise ValueError(f"artifact kind {kind!r} or key {key!r} is not a plain name")
        return self.root / kind / key[:2] / key

    def find(self, kind: str, key: str) -> Artifact | None:
        """Return the artifact, or None where it was never finished or was deleted."""
        folder = self.folder(kind, key)
        try:
            manifest = json.loads((folder / "manifest.json").read_text())
        except FileNotFoundError:
            return None
        return Artifact(folder, manifest["digest"], manifest["metadata"])

    def write(
        self, kind: str, key: str, fill: Callable[[Path], str], *, inputs: Any, metadata: Mapping[str, Any] | None = None
    ) -> Artifact:
        """Make an artifact: `fill(folder)` writes its files into an empty folder and returns their digest.

        An existing artifact of the same key is replaced only after the new one is whole.
        """
        folder = self.folder(kind, key)
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".partial-"))
        try:
            manifest = {"digest": fill(temporary), "inputs": inputs, "metadata": dict(metadata or {})}
            write_atomically(temporary / "manifest.json", json.dumps(manifest, indent=1, sort_keys=True))
            for path in temporary.rglob("*"):
                if path.is_file():
                    with path.open("rb") as f:
                        os.fsync(f.fileno())
            if folder.exists():
                shutil.rmtree(folder)
            temporary.rename(folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        return Artifact(folder, manifest["digest"], manifest["metadata"])

    def write_tensors(
        self, kind: str, key: str, tensors: "Mapping[str, Tensor]", *, inputs: Any, metadata: Mapping[str, Any] | None = None
    ) -> Artifact:
        """Make an artifact of named tensors; its digest is that of their content."""
        from safetensors.torch import save_file

        def fill(folder: Path) -> str:
            save_file({n: t.detach().cpu().contiguous() for n, t in tensors.items()}, folder / _TENSORS)
            return digest_tensors(tensors)

        return self.write(kind, key, fill, inputs=inputs, metadata=metadata)
