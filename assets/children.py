"""The children: assembled from the library, healed, graded and served beside their parent."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import dagster as dg

from assets.drawings import architecture_picture, page_link
from assets.materialise import Stopwatch, files_below, materialised, picture, table
from assets.plan import Plan
from assets.refinement import chosen_solution
from assets.run_scores import fused_pieces
from assets.versions import stage_version
from puzzle_dag.architecture import Architecture, Block, layer_key
from puzzle_dag.progress import ProgressLog
from puzzle_dag.store import Artifact
from resources.workspace import Workspace

CHECKPOINT = "checkpoint"
"""Folder of the checkpoint inside an artifact."""


def checkpoint_folder(workspace: Workspace, asset: str, child: Mapping[str, Any]) -> Path:
    """Return where the checkpoint lies that a record's value of `child` or `uptrained_child` speaks of."""
    return workspace.store.folder(asset, child["key"]) / CHECKPOINT


def chosen_architecture(solution: Mapping[str, Any]) -> Architecture:
    """Return the block of every layer that a solution chose."""
    return tuple(Block.parse(c["block"]) for c in solution["choices"])


class PiecesChangedError(ValueError):
    """The library holds other pieces than those that a solution was found with."""


def chosen_pieces(workspace: Workspace, choices: list[dict[str, Any]]) -> list[Any]:
    """Return the LayerPieces of each layer: the library's, or a run's. Raises PiecesChangedError, RunsChangedError where they changed."""
    from puzzle_dag.pieces import LayerPieces

    layers = []
    for choice in choices:
        if choice.get("run"):
            layers.append(fused_pieces(workspace, choice))
            continue
        key = layer_key(choice["layer"])
        library, scores = workspace.shelf.find("block_library", key), workspace.shelf.value("block_scores", key)
        scored = {s["block"]: s["digest"] for s in scores["scores"]}
        if library is None or scores["library"] != library.data_version or scored.get(choice["block"]) != choice["digest"]:
            raise PiecesChangedError(f"layer {key}: the library changed after the solution was found; run `python -m assets refresh`")
        layers.append(LayerPieces.from_json(workspace.store, library.value["pieces"]))
    return layers


def _divergence(workspace: Workspace, folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    from puzzle_dag.children.divergence import measure_divergence
    from puzzle_dag.model.checkpoint import load_checkpoint

    parent, rows = workspace.load_parent(), load_file(workspace.var / "tokens.safetensors")["heldout"]
    child = load_checkpoint(folder, device=parent.model.device)
    return asdict(measure_divergence(parent.model, child, rows.to(parent.model.device)))


def _divergence_metadata(divergence: dict[str, Any]) -> dict[str, Any]:
    return {
        "kl": divergence["kl"]["mean"],
        "lm_loss": divergence["lm_loss"]["mean"],
        "top1_agreement": divergence["top1_agreement"]["mean"],
    }


def _child_asset(plan: Plan) -> dg.AssetsDefinition:
    stages = ["puzzle_dag.children.assemble", "puzzle_dag.children.divergence"]

    @dg.asset(
        **plan.options(
            "child",
            deps=[plan.chosen, "parent", "tokens"],
            stages=stages,
            partitions=plan.partitions.scenarios,
            kinds=("huggingface", "safetensors"),
            device=True,
            description="The assembled child: the parent's embeddings and head around one chosen block a layer.",
        )
    )
    def child(context: dg.AssetExecutionContext, workspace: Workspace) -> dg.MaterializeResult:
        from puzzle_dag.children.assemble import assemble_child
        from puzzle_dag.model.chat_template import inherit_chat_template

        solution = chosen_solution(plan, workspace, context.partition_key)
        pieces = chosen_pieces(workspace, solution["choices"])
        architecture = chosen_architecture(solution)
        with workspace.device():
            time, parent = Stopwatch(), workspace.load_parent()
            inputs = {"version": stage_version(stages[0]), "parent": parent.digest, "choices": solution["digest"]}
            made = workspace.keep("child", inputs, lambda folder: (assemble_child(parent, architecture, pieces, folder / CHECKPOINT), {}))
            inherit_chat_template(parent.folder, made.folder / CHECKPOINT)
            divergence = _divergence(workspace, made.folder / CHECKPOINT)
        value = {"solution": solution["digest"], "key": made.folder.name, "digest": made.digest, "divergence": divergence}
        return materialised(
            context,
            plan,
            workspace,
            value,
            data_version=made.digest,
            files=files_below(made.folder),
            metadata={
                "folder": dg.MetadataValue.path(str(made.folder / CHECKPOINT)),
                **_divergence_metadata(divergence),
                "architecture": table([{"layer": c["layer"], "block": c["block"], "score": c["score"]} for c in solution["choices"]]),
                "picture": architecture_picture(
                    plan,
                    workspace,
                    [b.name for b in architecture],
                    runs=list(dict.fromkeys(c["run"] for c in solution["choices"] if c.get("run"))),
                    title=context.partition_key,
                ),
                "page": page_link(plan, context.partition_key),
            },
            time=time,
        )

    return child


_UPTRAINING = ["puzzle_dag.children.uptrain", "puzzle_dag.corpus.tokens"]


def _uptrain_settings(plan: Plan) -> dict[str, Any]:
    profile = plan.profile
    return {
        "uptrain": profile.uptrain.model_dump(),
        "dtype": profile.dtype,
        "row_length": profile.tokens.row_length,
        "seed": profile.seed,
    }


def _uptrain(plan: Plan, workspace: Workspace, scenario: str, child: dict[str, Any]) -> Artifact:
    """Return the healed child: from the store where just this child was healed just so before."""
    from puzzle_dag.children.uptrain import uptrain_child
    from puzzle_dag.corpus.tokens import build_tokens
    from puzzle_dag.store import digest_tensors

    profile, parent = plan.profile, workspace.load_parent()
    rows = build_tokens(
        profile.corpus,
        parent.tokenizer,
        num_tokens=workspace.read_scenario(scenario).uptrain.tokens,
        row_length=profile.tokens.row_length,
        purpose="uptrain",
        seed=profile.seed,
        root=plan.root,
    )
    inputs = {
        "versions": {s: stage_version(s) for s in _UPTRAINING},
        "parent": parent.digest,
        "child": child["digest"],
        "rows": digest_tensors({"rows": rows}),
        **_uptrain_settings(plan),
    }

    def train(folder: Path) -> tuple[str, dict[str, Any]]:
        report = uptrain_child(
            parent,
            checkpoint_folder(workspace, "child", child),
            rows,
            profile.uptrain,
            folder / CHECKPOINT,
            compute_dtype=profile.dtype,
            work_folder=workspace.var / "uptraining" / scenario,
            progress=ProgressLog(f"uptraining {scenario}"),
        )
        return report.digest, {**asdict(report), "flops_per_s": report.flops_per_s}

    return workspace.keep("uptrained_child", inputs, train)


def _uptrained_child_asset(plan: Plan) -> dg.AssetsDefinition:
    @dg.asset(
        **plan.options(
            "uptrained_child",
            deps=["child", "parent", "corpus", "tokens"],
            stages=[*_UPTRAINING, "puzzle_dag.children.divergence"],
            settings=_uptrain_settings(plan),
            partitions=plan.partitions.scenarios,
            kinds=("pytorch", "huggingface"),
            device=True,
            description="The child after global knowledge distillation (cosine of hidden states + KL of logits); a killed run goes on.",
        )
    )
    def uptrained_child(context: dg.AssetExecutionContext, workspace: Workspace) -> dg.MaterializeResult:
        from puzzle_dag.model.chat_template import inherit_chat_template

        child = workspace.shelf.value("child", context.partition_key)
        with workspace.device():
            time = Stopwatch()
            made = _uptrain(plan, workspace, context.partition_key, child)
            inherit_chat_template(workspace.load_parent().folder, made.folder / CHECKPOINT)
            divergence = _divergence(workspace, made.folder / CHECKPOINT)
        report = {k: v for k, v in made.metadata.items() if k != "curve"}
        value = {"child": child["digest"], "key": made.folder.name, "digest": made.digest, "divergence": divergence, "report": report}
        return materialised(
            context,
            plan,
            workspace,
            {**value, "curve": _thin(made.metadata["curve"])},
            data_version=made.digest,
            files=files_below(made.folder),
            metadata={
                "folder": dg.MetadataValue.path(str(made.folder / CHECKPOINT)),
                "num_tokens": report["num_tokens"],
                "gflop_per_s": report["flops_per_s"] / 1e9,
                **_divergence_metadata(divergence),
                **_curve_metadata(made.metadata["curve"]),
                "page": page_link(plan, context.partition_key),
            },
            time=time,
        )

    return uptrained_child


def _thin(curve: list[dict[str, Any]], num_points: int = 200) -> list[dict[str, Any]]:
    stride = max(1, len(curve) // num_points)
    return curve[::stride]


def _curve_metadata(curve: list[dict[str, Any]]) -> dict[str, Any]:
    from puzzle_dag.report.pictures import DISTILLATION_LOSSES, loss_curve

    if not curve:
        return {}
    drawn = loss_curve(loss_lines(curve), title="global knowledge distillation", y=DISTILLATION_LOSSES)
    return {"picture": picture(drawn, "losses of the global distillation")}


def loss_lines(curve: list[dict[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """Return a curve's losses by name, as (tokens, loss)."""
    return {name: [(p["tokens"], p[name]) for p in curve] for name in ("cosine", "kl")}


def child_assets(plan: Plan) -> list[dg.AssetsDefinition]:
    """Return child and uptrained_child."""
    return [_child_asset(plan), _uptrained_child_asset(plan)]
