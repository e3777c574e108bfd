"""What an asset reads that no Dagster edge tells of: configuration files, and fan-ins too wide or too coarse for one.

Each watch returns a JSON value. Its fingerprint is kept in the record of a materialisation; where the value of today
has another one, the refresh runs the asset again. For a configuration asset the watch is the asset's whole value.

- `cost_variants` hangs on every layer's space, but only on their union.
- `run_scores` of a layer are those of the runs that begin at it, and `task_scores` grades these, too; no other run makes them stale.
- `block_costs` may be analytic only where a scenario that its target is one of the targets of says so, and nobody measured it.
- `parent_accuracy` and `task_scores` may ask items that are drawn from the library of the Python that runs.
- `child` and `uptrained_child` inherit the parent's chat template, which nothing else reads.
- `block_costs` takes what was imported for a target that this machine can't measure.
- `uptrained_child` needs its scenario's budget, not its constraints; `serving` needs its target and
  batch sizes, and whether it bounds a time.
- What an engine measured (`block_costs`, `trial`, `parent_serving`, `serving`) holds for that version of it.
- `cost_table`, `predicted_frontier`, `frontier` and `tables` gather what there is, so a partition that went away counts, too.
"""

import json
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

from assets.engine_watches import watch_costs_and_engine, watch_engine, watch_serving, watch_trial
from assets.foreign.plan import ForeignPlan
from assets.foreign.watches import watch_foreign_frontier, watch_foreign_scenario, watch_library_file
from assets.plan import Plan
from puzzle_dag.architecture import LayerSpace, layer_index
from puzzle_dag.config import BundledCorpus, ConfigError, TextCorpus, with_earlier
from puzzle_dag.config.profile import ask_python_library
from puzzle_dag.model.chat_template import CHAT_TEMPLATE_FILE, digest_chat_template
from puzzle_dag.preflight import list_cost_variants, list_placed_blocks, list_runs, read_targets, resolve_spaces
from puzzle_dag.scenario_checks import check_scenario
from puzzle_dag.store import fingerprint
from resources.file_digests import digest_files
from resources.workspace import Workspace

Watch = Callable[[Plan, Workspace, str | None], Any]

_CHECKPOINT_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")


def watch_parent(plan: Plan, workspace: Workspace, _: str | None = None) -> dict[str, Any]:
    """Return the parent's source and, for a local folder, the digest of every file of the checkpoint."""
    source = workspace.read_profile().parent
    if source.path is None:
        return {"source": source.model_dump()}
    folder = workspace.root_folder / source.path
    files = sorted({p for pattern in _CHECKPOINT_FILES for p in folder.glob(pattern)})
    # training.json and the like tell about the checkpoint; they are not the checkpoint. The children watch the chat template.
    files = [p for p in files if p.name not in ("training.json", "README.md", CHAT_TEMPLATE_FILE)]
    return {"source": source.model_dump(), "files": digest_files(files, workspace.var / "hashes" / "parent.json")}


def watch_corpus(plan: Plan, workspace: Workspace, _: str | None = None) -> dict[str, Any]:
    """Return the corpus's settings and what its text hangs on: Python's version, or the digest of every file."""
    corpus = workspace.read_profile().corpus
    value: dict[str, Any] = {"settings": corpus.model_dump()}
    if isinstance(corpus, BundledCorpus):
        from puzzle_dag.corpus.stdlib import python_version

        value["python_version"] = python_version()
    elif isinstance(corpus, TextCorpus) and corpus.files is not None:
        paths = sorted(workspace.root_folder.glob(corpus.files))
        if not paths:
            raise ConfigError(f"corpus.files: {corpus.files} matches no file below the project's root; give another glob")
        value["files"] = digest_files(paths, workspace.var / "hashes" / "corpus.json")
    return value


def space_to_json(space: LayerSpace) -> dict[str, list[str]]:
    """Return a space as canonical names."""
    return {"attention": [a.name for a in space.attentions], "ffn": [f.name for f in space.ffns]}


def watch_search_space(plan: Plan, workspace: Workspace, partition: str | None) -> dict[str, Any]:
    """Return one layer's resolved space."""
    assert partition is not None
    spaces = resolve_spaces(workspace.read_profile(), plan.shape, file=workspace.profile_file)
    return space_to_json(spaces[layer_index(partition)])


def watch_run_scores(plan: Plan, workspace: Workspace, partition: str | None) -> dict[str, Any]:
    """Return the runs that begin at one layer."""
    assert partition is not None
    runs = list_runs(workspace.read_profile(), plan.shape, file=workspace.profile_file)
    return {"runs": [run.name for run in runs if run.first == layer_index(partition)]}


def _watch_python(tasks: Collection[str]) -> dict[str, str]:
    """Return Python's version where one of the tasks is drawn from its library, else {}."""
    from puzzle_dag.corpus.stdlib import python_version

    return {"python_version": python_version()} if ask_python_library(tasks) else {}


def watch_parent_accuracy(plan: Plan, workspace: Workspace, _: str | None = None) -> dict[str, Any] | None:
    """Return Python's version where items are drawn from its library: a text corpus says nothing of it."""
    return _watch_python(workspace.read_profile().accuracy.tasks) or None


def watch_task_scores(plan: Plan, workspace: Workspace, partition: str | None) -> dict[str, Any]:
    """Return the runs that begin at one layer, and Python's version where items are drawn from its library."""
    settings = workspace.read_profile().task_scores
    return {**watch_run_scores(plan, workspace, partition), **_watch_python(settings.tasks if settings else ())}


def watch_cost_variants(plan: Plan, workspace: Workspace, _: str | None = None) -> dict[str, Any]:
    """Return the sorted union of the layers' variants and of fused FFNs, and the shape of the model that they are measured in."""
    attentions, ffns = list_cost_variants(workspace.read_profile(), plan.shape, file=workspace.profile_file)
    ignored = ("transformers_version", "dtype", "_name_or_path", "architectures")
    shape = {k: v for k, v in json.loads(plan.shape.to_json_string(use_diff=False)).items() if k not in ignored}
    return {"attention": [a.name for a in attentions], "ffn": [f.name for f in ffns], "shape": shape}


def watch_target_spec(plan: Plan, workspace: Workspace, partition: str | None) -> dict[str, Any]:
    """Return one target, validated."""
    assert partition is not None
    return workspace.read_target(partition).model_dump(mode="json")


def watch_scenario_spec(plan: Plan, workspace: Workspace, partition: str | None) -> dict[str, Any]:
    """Return one scenario, validated, and under "earlier" those that it must differ from: an edit of theirs is one of its own.

    Raises ConfigError where it can't be solved at all.
    """
    assert partition is not None
    profile, scenario = workspace.read_profile(), workspace.read_scenario(partition)
    placed = partial(list_placed_blocks, profile, plan.shape, file=workspace.profile_file)
    earlier = check_scenario(workspace.conf, profile, scenario, read_targets(workspace.conf, profile), placed)
    return with_earlier(scenario, earlier)


def watch_chat_template(plan: Plan, workspace: Workspace, _: str | None = None) -> dict[str, Any]:
    """Return the digest of the chat template that children inherit from a local parent; {} where there is none."""
    source = workspace.read_profile().parent
    digest = None if source.path is None else digest_chat_template(workspace.root_folder / source.path)
    return {} if digest is None else {"chat_template": digest}


def watch_uptrain_budget(plan: Plan, workspace: Workspace, partition: str | None) -> dict[str, Any]:
    """Return how long a scenario's child is healed, and the chat template that it inherits."""
    assert partition is not None
    return {**workspace.read_scenario(partition).uptrain.model_dump(), **watch_chat_template(plan, workspace)}


def _versions(workspace: Workspace, asset: str, partitions: tuple[str, ...] | None = None) -> dict[str, str]:
    """Return what is on the shelf of an asset: partition -> DataVersion, value and all."""
    found = {p: workspace.shelf.find(asset, p) for p in partitions or (None,)}
    return {p or "": r.value_digest for p, r in found.items() if r is not None}


def watch_cost_table(plan: Plan, workspace: Workspace, _: str | None = None) -> dict[str, Any]:
    """Return the costs of the targets that the profile names today."""
    return _versions(workspace, "block_costs", workspace.read_profile().targets)


def watch_predicted_frontier(plan: Plan, workspace: Workspace, _: str | None = None) -> dict[str, Any]:
    """Return what the search chose for each scenario as it is today, at which batch size, and what a refinement or a trial made of it.

    Not how long it took: that is no other frontier.
    """
    found = {}
    for name in workspace.read_profile().scenarios:
        spec = workspace.shelf.find("scenario_spec", name)
        records = [workspace.shelf.find(asset, name) for asset in dict.fromkeys(("solution", plan.chosen))]
        of_today = [r for r in records if r is not None and spec is not None and r.value.get("scenario_spec") == fingerprint(spec.value)]
        if of_today:
            found[name] = [part for r in of_today for part in (r.data_version, r.value["solution"]["batch"])]
    return found


def watch_frontier(plan: Plan, workspace: Workspace, _: str | None = None) -> dict[str, Any]:
    """Return all that is known of the scenarios that the profile names today."""
    assets = ("scenario_spec", "solution", "uptrained_child", "accuracy", "serving", *plan.opted_in)
    known = {asset: _versions(workspace, asset, workspace.read_profile().scenarios) for asset in assets}
    return {**known, "predicted_frontier": _versions(workspace, "predicted_frontier")}


def watch_tables(plan: Plan, workspace: Workspace, _: str | None = None) -> dict[str, Any]:
    """Return what the tables are made of."""
    gathered = {asset: _versions(workspace, asset) for asset in ("score_table", "cost_table", "predicted_frontier", "frontier")}
    scenarios = workspace.read_profile().scenarios
    return gathered | {asset: _versions(workspace, asset, scenarios) for asset in plan.opted_in}


WATCHES: dict[str, Watch] = {
    "parent": watch_parent,
    "corpus": watch_corpus,
    "search_space": watch_search_space,
    "run_scores": watch_run_scores,
    "parent_accuracy": watch_parent_accuracy,
    "task_scores": watch_task_scores,
    "cost_variants": watch_cost_variants,
    "target_spec": watch_target_spec,
    "block_costs": watch_costs_and_engine,
    "scenario_spec": watch_scenario_spec,
    "child": watch_chat_template,
    "uptrained_child": watch_uptrain_budget,
    "trial": watch_trial,
    "parent_serving": watch_engine,
    "serving": watch_serving,
    "cost_table": watch_cost_table,
    "predicted_frontier": watch_predicted_frontier,
    "frontier": watch_frontier,
    "tables": watch_tables,
}
"""Asset -> its watch."""

GATHERERS = frozenset({"cost_table", "predicted_frontier", "frontier", "tables"})
"""Assets that gather what there is: one failed scenario doesn't keep the others out of the table."""

CHECKS_READ: dict[tuple[str, str], tuple[str, ...]] = {
    ("accuracy", "retention"): ("scenario_spec",),
    ("serving", "as_asked"): ("scenario_spec",),
}
"""(asset, check) -> assets of the same partition that the check goes by and its asset doesn't: another floor is no other grade."""


FOREIGN_WATCHES: dict[str, Callable[[ForeignPlan, Workspace, str | None], Any]] = {
    "library_file": watch_library_file,
    "scenario_spec": watch_foreign_scenario,
    "frontier": watch_foreign_frontier,
}
"""The same for a foreign library."""


def watch(plan: Plan | ForeignPlan, workspace: Workspace, asset: str, partition: str | None) -> Any:
    """Return what an asset reads beside its upstream assets, or None where that is nothing. Raises ConfigError."""
    if isinstance(plan, ForeignPlan):
        look_foreign = FOREIGN_WATCHES.get(asset)
        return None if look_foreign is None else look_foreign(plan, workspace, partition)
    look = WATCHES.get(asset)
    return None if look is None else look(plan, workspace, partition)


def watched_words(plan: Plan, asset: str, partition: str | None) -> str:
    """Return in words what changed where an asset's watch has another value than it had."""
    profile = f"conf/profiles/{plan.profile.name}.yaml"
    words = {
        "library_file": f"the library's file or {profile} changed",
        "parent": f"the parent's files or {profile} changed",
        "corpus": f"the corpus, its files or Python's version changed ({profile})",
        "search_space": f"{profile} changed",
        "run_scores": f"search_space.runs in {profile} changed",
        "parent_accuracy": "Python's version changed, whose library items are drawn from",
        "task_scores": f"search_space.runs in {profile} changed, or Python's version, whose library items are drawn from",
        "cost_variants": f"{profile} changed",
        "target_spec": f"conf/targets/{partition}.yaml changed",
        "scenario_spec": f"conf/scenarios/{partition}.yaml changed",
        "child": "the parent's chat template changed",
        "uptrained_child": f"the parent's chat template or the budget in conf/scenarios/{partition}.yaml changed",
        "block_costs": "vLLM's version changed, or whether costs may be analytic",
        "trial": "vLLM's version changed",
        "parent_serving": "vLLM's version changed",
        "serving": f"vLLM's version, or target, batch sizes or kinds of bounds on time in conf/scenarios/{partition}.yaml, changed",
    }
    return words.get(asset, "what it gathers changed")
