"""The parent's side: token rows, hidden states, and how good and fast it is itself."""

from typing import TYPE_CHECKING

import dagster as dg

from assets.materialise import Stopwatch, files_below, materialised
from assets.plan import Plan
from puzzle_dag.config import TokenBudgets
from puzzle_dag.progress import ProgressLog
from resources.workspace import Workspace

if TYPE_CHECKING:
    from puzzle_dag.corpus.tokens import Purpose

_HELDOUT_TOKENS = 16_384


def token_budgets(budgets: TokenBudgets) -> "dict[Purpose, int]":
    """Return the tokens that the asset `tokens` takes, by purpose."""
    return {"train": budgets.activations, "score": budgets.scores, "heldout": min(budgets.activations, _HELDOUT_TOKENS)}


def _tokens_asset(plan: Plan) -> dg.AssetsDefinition:
    budgets, seed = plan.profile.tokens, plan.profile.seed
    settings = {"budgets": budgets.model_dump(), "seed": seed}

    @dg.asset(
        **plan.options(
            "tokens",
            deps=["corpus", "parent"],
            stages=["puzzle_dag.corpus.tokens"],
            settings=settings,
            kinds=("safetensors",),
            description="Rows of tokens to train variants on, to score blocks on, and held out; no text is in two of them.",
        )
    )
    def tokens(context: dg.AssetExecutionContext, workspace: Workspace) -> dg.MaterializeResult:
        from puzzle_dag.corpus.tokens import build_tokens
        from puzzle_dag.store import digest_tensors, write_tensor_file

        time, parent = Stopwatch(), workspace.load_parent()
        rows = {
            purpose: build_tokens(
                plan.profile.corpus,
                parent.tokenizer,
                num_tokens=num_tokens,
                row_length=budgets.row_length,
                purpose=purpose,
                seed=seed,
                root=plan.root,
            )
            for purpose, num_tokens in token_budgets(budgets).items()
        }
        path = workspace.var / "tokens.safetensors"
        write_tensor_file(path, rows, {})
        value = {"file": path.name, "num_tokens": {k: v.numel() for k, v in rows.items()}, "row_length": budgets.row_length}
        return materialised(
            context,
            plan,
            workspace,
            value,
            data_version=digest_tensors(rows),
            files=[path],
            metadata={**{f"num_tokens_{k}": v.numel() for k, v in rows.items()}, "sample": parent.tokenizer.decode(rows["train"][0][:120])},
            time=time,
        )

    return tokens


def _activations_asset(plan: Plan) -> dg.AssetsDefinition:
    profile = plan.profile

    @dg.asset(
        **plan.options(
            "parent_activations",
            deps=["parent", "tokens"],
            stages=["puzzle_dag.library.activations"],
            settings={"dtype": profile.dtype},
            kinds=("pytorch", "safetensors"),
            device=True,
            description="Hidden states at every layer boundary, channel contributions and head importances, in one pass.",
        )
    )
    def parent_activations(context: dg.AssetExecutionContext, workspace: Workspace) -> dg.MaterializeResult:
        from safetensors.torch import load_file

        from puzzle_dag.library.activations import ActivationCache, collect_activations

        rows, folder = load_file(workspace.var / "tokens.safetensors"), workspace.var / "activations"
        with workspace.device():
            time = Stopwatch()
            progress = ProgressLog("activations")
            collect_activations(workspace.load_parent(), rows["train"], rows["score"], folder, dtype=profile.dtype, progress=progress)
        cache, files = ActivationCache(folder), files_below(folder)
        value = {"folder": folder.name, "digest": cache.digest}
        return materialised(
            context,
            plan,
            workspace,
            value,
            data_version=cache.digest,
            files=files,
            metadata={"num_bytes": sum(f.stat().st_size for f in files), "num_boundaries": cache.num_layers + 1},
            time=time,
        )

    return parent_activations


def parent_assets(plan: Plan) -> list[dg.AssetsDefinition]:
    """Return tokens and parent_activations."""
    return [_tokens_asset(plan), _activations_asset(plan)]
