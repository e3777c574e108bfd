"""How much disk the large stages will write, so that a full one is found before the compute and not in the middle of it.

Estimates from the parent's shape: hidden states exactly, a library by its variants' parameters, a child as if it were as
large as its parent. Hidden states take the place of those that are there; pieces and checkpoints of former settings stay in the store.
"""

from collections.abc import Callable, Iterable, Sequence

from assets.costs import parent_architecture, parent_block
from assets.plan import Plan
from assets.staleness import Item
from puzzle_dag.architecture import layer_index, layer_key
from puzzle_dag.preflight import activations_bytes, require_disk, resolve_spaces
from resources.workspace import Workspace

_STATE_BYTES = 24
"""Bytes a parameter while a child heals: weights and two moments in float32, written whole before the former state goes."""
_WORDS = {
    "parent_activations": "the parent's activations",
    "block_library": "the library's variants",
    "child": "the assembled children",
    "uptrained_child": "the healed children and the state that a killed training goes on from",
}


def _value_bytes(plan: Plan) -> int:
    """Return the bytes of a stored parameter: variants and children are stored in the parent's type (bf16 where nobody says)."""
    return 2 if plan.shape.dtype is None else int(plan.shape.dtype.itemsize)


def _parent_parameters(plan: Plan) -> int:
    from puzzle_dag.costs.memory import size_model

    return size_model(plan.shape, parent_architecture(plan)).parameters


def _library_bytes(plan: Plan, layers: Iterable[int]) -> int:
    """Return what the layers' variants take, the parent's own aside, which are not stored again."""
    from puzzle_dag.costs.memory import size_attention, size_ffn

    own, spaces, total = parent_block(plan), resolve_spaces(plan.profile, plan.shape), 0
    for layer in layers:
        total += sum(size_attention(plan.shape, a).parameters for a in spaces[layer].attentions if a != own.attention)
        total += sum(size_ffn(plan.shape, f).parameters for f in spaces[layer].ffns if f != own.ffn)
    return total * _value_bytes(plan)


def _activations_bytes(plan: Plan, workspace: Workspace) -> int:
    budgets, folder = plan.profile.tokens, workspace.var / "activations"
    there = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return max(0, activations_bytes(plan.shape, budgets.activations + budgets.scores, plan.profile.dtype) - there)


def bytes_to_write(plan: Plan, workspace: Workspace, asset: str, partitions: Iterable[str | None]) -> int:
    """Return about how many bytes an asset adds to the disk when these partitions of it run; 0 for one that is not large."""
    partitions = list(partitions)
    if asset not in _WORDS or not partitions:
        return 0
    if asset == "parent_activations":
        return _activations_bytes(plan, workspace)
    if asset == "block_library":
        return _library_bytes(plan, [layer_index(p) for p in partitions if p])
    # Children heal one after the other, so there is one state at a time.
    state = _STATE_BYTES if asset == "uptrained_child" else 0
    return _parent_parameters(plan) * (len(partitions) * _value_bytes(plan) + state)


def _partitions(plan: Plan, asset: str) -> list[str | None]:
    if asset == "parent_activations":
        return [None]
    if asset == "block_library":
        return [layer_key(i) for i in range(plan.shape.num_hidden_layers)]
    return list(plan.profile.scenarios)


def _require(workspace: Workspace, needed: dict[str, int]) -> None:
    if sum(needed.values()):
        require_disk(workspace.var, sum(needed.values()), ", ".join(_WORDS[asset] for asset, size in needed.items() if size))


def require_disk_for_all(plan: Plan, workspace: Workspace, may_run: Callable[[str], bool]) -> None:
    """Check that there is room for all that was never made. Raises DiskFullError."""
    missing = {asset: [p for p in _partitions(plan, asset) if workspace.shelf.find(asset, p) is None] for asset in _WORDS if may_run(asset)}
    if "parent_activations" in missing:
        missing["parent_activations"] = [None]  # what is there counts by its bytes
    _require(workspace, {asset: bytes_to_write(plan, workspace, asset, found) for asset, found in missing.items()})


def require_disk_for(plan: Plan, workspace: Workspace, stale: Sequence[Item]) -> None:
    """Check that there is room for what the stale partitions of one asset will write. Raises DiskFullError."""
    if stale:
        asset = stale[0].asset
        _require(workspace, {asset: bytes_to_write(plan, workspace, asset, [item.partition for item in stale])})
