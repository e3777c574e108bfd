"""Children in other schemas than our own: Deci / Nemotron-NAS, for stock vLLM and other engines that read it.

Both schemas name tensors as the parent does, so the tensor files are copied as they are; only config.json differs.
"""

import json
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors import safe_open

from puzzle_dag.model import configuration_deci
from puzzle_dag.model.checkpoint import CheckpointMismatchError
from puzzle_dag.model.configuration_puzzle_dag import PuzzleDagConfig
from puzzle_dag.model.deci import to_deci_config
from puzzle_dag.model.modeling_puzzle_dag import PuzzleDagForCausalLM
from puzzle_dag.store import write_atomically

_OURS = ("config.json", "configuration_puzzle_dag.py", "modeling_puzzle_dag.py")


def _check_tensors(folder: Path, config: PuzzleDagConfig) -> None:
    """Raise CheckpointMismatchError unless the files hold the tensors of the configuration; reads headers alone."""
    found: dict[str, tuple[int, ...]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as f:
            found.update({name: tuple(f.get_slice(name).get_shape()) for name in f.keys()})  # noqa: SIM118 (not a mapping)
    with torch.device("meta"):
        expected = {name: tuple(tensor.shape) for name, tensor in PuzzleDagForCausalLM(config).state_dict().items()}
    if config.tie_word_embeddings:
        expected.pop("lm_head.weight", None)
        found.pop("lm_head.weight", None)
    wrong = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
    if wrong:
        name = wrong[0]
        raise CheckpointMismatchError(
            f"{folder}: {name} is {found.get(name, 'missing')}, the configuration asks for {expected.get(name, 'none')} "
            f"({len(wrong)} tensors differ); is the checkpoint complete?"
        )


def read_child_config(folder: Path) -> PuzzleDagConfig:
    """Return the configuration of a child's checkpoint. Raises ValueError where `folder` holds none of ours."""
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} is no checkpoint: it holds no config.json")
    model_type = json.loads(path.read_text()).get("model_type")
    if model_type != PuzzleDagConfig.model_type:
        raise ValueError(f"{folder} is of model_type {model_type!r}, not {PuzzleDagConfig.model_type!r}; only children are exported")
    config: PuzzleDagConfig = PuzzleDagConfig.from_pretrained(folder)
    return config


def export_deci(folder: Path, out: Path, *, as_ffn_mult: bool = False) -> None:
    """Write the child in `folder` to `out` in the Deci / Nemotron-NAS schema; `out` appears whole or not at all.

    Args:
        folder: a child's checkpoint.
        out: a folder that doesn't exist.
        as_ffn_mult: give FFN widths as `ffn_mult` instead of `intermediate_size`.

    Raises:
        ValueError: `folder` is no child's checkpoint, or `out` exists.
        NotDeciError: a layer doesn't fit the schema; the message names it.
        CheckpointMismatchError: the checkpoint's tensors are not those of its configuration.
    """
    if out.exists():
        raise ValueError(f"{out} exists; name a folder that doesn't")
    config = read_child_config(folder)
    fields = to_deci_config(config, as_ffn_mult=as_ffn_mult)
    _check_tensors(folder, config)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        for path in folder.iterdir():
            if path.is_file() and path.name not in _OURS:
                shutil.copyfile(path, temporary / path.name)
        source = Path(str(configuration_deci.__file__))
        shutil.copyfile(source, temporary / source.name)
        write_atomically(temporary / "config.json", json.dumps(fields, indent=2, sort_keys=True) + "\n")
        temporary.chmod(0o755)
        temporary.rename(out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
