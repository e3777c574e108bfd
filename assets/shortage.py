"""What only reading the text shows: too little of it for a budget, too few items for the grades. Found before any compute.

Counting takes seconds, so what was found to be enough is remembered under var/PROFILE/hashes, with all that it hangs on.
"""

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from assets.parent import token_budgets
from assets.plan import Plan
from assets.versions import stage_version
from assets.watches import watch_corpus, watch_parent
from puzzle_dag.config import AccuracySettings, ConfigError, locate, scenario_file
from puzzle_dag.store import fingerprint, write_atomically
from resources.workspace import Workspace

if TYPE_CHECKING:
    from puzzle_dag.corpus.tokens import Purpose

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Need:
    """Tokens that are needed for a purpose, and where a person asked for them."""

    purpose: "Purpose"
    num_tokens: int
    file: Path
    field: tuple[str, str]


def _memory(workspace: Workspace) -> Path:
    return workspace.var / "hashes" / "enough.json"


def _known(workspace: Workspace) -> dict[str, int]:
    path = _memory(workspace)
    found: dict[str, int] = json.loads(path.read_text()) if path.exists() else {}
    return found


def _remember(workspace: Workspace, key: str, value: int) -> None:
    write_atomically(_memory(workspace), json.dumps({**_known(workspace), key: value}))


def _needs(plan: Plan, workspace: Workspace, may_run: Callable[[str], bool]) -> Iterator[_Need]:
    """Yield what the stages that may run need; of the children the one that is healed longest, whose rows begin with the others'."""
    if may_run("tokens"):
        profile_file = workspace.conf / "profiles" / f"{plan.profile.name}.yaml"
        for purpose, num_tokens in token_budgets(plan.profile.tokens).items():
            yield _Need(purpose, num_tokens, profile_file, ("tokens", "scores" if purpose == "score" else "activations"))
    if may_run("uptrained_child"):
        budgets = {name: workspace.read_scenario(name).uptrain.tokens for name in plan.profile.scenarios}
        if budgets:
            longest = max(budgets, key=budgets.__getitem__)
            yield _Need("uptrain", budgets[longest], scenario_file(workspace.conf, longest), ("uptrain", "tokens"))


def check_text(plan: Plan, workspace: Workspace, may_run: Callable[[str], bool]) -> None:
    """Check that the corpus has the tokens that stages will ask it for, children's healing included.

    Args:
        plan: the profile's plan.
        workspace: the profile's folders.
        may_run: says of an asset whether this refresh may run it.

    Raises:
        CorpusTooShortError: it hasn't; the message says the budget's file and line, and how much text there is.
    """
    from puzzle_dag.corpus.tokens import CorpusTooShortError, build_tokens
    from puzzle_dag.model.parent import read_tokenizer

    profile, tokenizer = plan.profile, None
    text = {
        "version": stage_version("puzzle_dag.corpus.tokens"),
        "corpus": watch_corpus(plan, workspace),
        "parent": watch_parent(plan, workspace),
        "row_length": profile.tokens.row_length,
        "seed": profile.seed,
    }
    for need in _needs(plan, workspace, may_run):
        key = fingerprint({**text, "purpose": need.purpose})
        if need.num_tokens <= _known(workspace).get(key, 0):
            continue
        _LOG.info("reading the text: are there %d tokens for %r?", need.num_tokens, need.purpose)
        tokenizer = tokenizer or read_tokenizer(profile.parent, plan.root)
        try:
            build_tokens(
                profile.corpus,
                tokenizer,
                num_tokens=need.num_tokens,
                row_length=profile.tokens.row_length,
                purpose=need.purpose,
                seed=profile.seed,
                root=plan.root,
            )
        except CorpusTooShortError as error:
            raise CorpusTooShortError(f"{locate(need.file, need.field)}: {error}") from error
        _remember(workspace, key, need.num_tokens)


def check_items(plan: Plan, workspace: Workspace, may_run: Callable[[str], bool]) -> None:
    """Check that there are the items that parent, children and blocks will be graded on; arguments as for `check_text`.

    Raises:
        ConfigError: there are fewer than asked for, or a bundled task that there is none of.
    """
    from puzzle_dag.children.evaluate import draw_items
    from puzzle_dag.children.tasks import item_sources

    profile, asked = plan.profile, list[tuple[str, AccuracySettings, int]]()
    if may_run("parent_accuracy") or may_run("accuracy"):
        asked.append(("accuracy", profile.accuracy, profile.seed))
    if profile.task_scores is not None and may_run("task_scores"):
        asked.append(("task_scores", profile.task_scores.grading, profile.task_scores.seed))
    for field, settings, seed in asked:
        inputs: dict[str, Any] = {
            "version": stage_version("puzzle_dag.children.tasks"),
            "items": item_sources(settings.tasks),
            "settings": settings.model_dump(include={"tasks", "num_items", "task_items"}),
            "corpus": profile.corpus.model_dump(),
            "seed": seed,
        }
        key = fingerprint(inputs)
        if key not in _known(workspace):
            try:
                draw_items(settings.tasks, settings, profile.corpus, seed=seed)
            except ValueError as error:
                raise ConfigError(f"{locate(workspace.conf / 'profiles' / f'{profile.name}.yaml', (field,))}: {error}") from error
            _remember(workspace, key, 1)
