"""Scores: what each pair of variants does to the parent, gathered from layers to groups to one table.

What a profile asks for beside them goes the same way: the scores of runs, and the grades on lm-eval tasks.
"""

from dataclasses import asdict
from typing import Any

import dagster as dg

from assets.library import space_from_json
from assets.materialise import Stopwatch, materialised, picture, table
from assets.partitions import group_key
from assets.plan import Plan
from assets.run_scores import RUNS_FILE, label_run, write_or_remove
from puzzle_dag.architecture import layer_index, layer_key
from puzzle_dag.progress import ProgressLog
from puzzle_dag.store import fingerprint
from resources.rows import write_rows
from resources.workspace import Workspace


def _block_scores_asset(plan: Plan) -> dg.AssetsDefinition:
    dtype = plan.profile.dtype

    @dg.asset(
        **plan.options(
            "block_scores",
            deps=["block_library", "parent", "parent_activations"],
            stages=["puzzle_dag.search.score", "puzzle_dag.library.activations"],
            settings={"dtype": dtype},
            partitions=plan.partitions.layers,
            kinds=("pytorch", "parquet"),
            device=True,
            description="KL divergence, LM loss and top-1 agreement of each pair of one layer, alone in the parent, on unseen tokens.",
        )
    )
    def block_scores(context: dg.AssetExecutionContext, workspace: Workspace) -> dg.MaterializeResult:
        from puzzle_dag.library.activations import ActivationCache
        from puzzle_dag.pieces import LayerPieces
        from puzzle_dag.report.pictures import score_heat_map
        from puzzle_dag.search.score import score_layer

        record = workspace.shelf.find("block_library", context.partition_key)
        library, version = workspace.shelf.value("block_library", context.partition_key), record.data_version if record else ""
        cache = ActivationCache(workspace.var / "activations")
        with workspace.device():
            time = Stopwatch()
            scores = score_layer(
                workspace.load_parent(),
                layer_index(context.partition_key),
                space_from_json(library["space"]),
                LayerPieces.from_json(workspace.store, library["pieces"]),
                cache,
                workspace.store,
                activations_digest=cache.digest,
                compute_dtype=dtype,
                rescore=workspace.anew,
                progress=ProgressLog(f"scores {context.partition_key}"),
            )
        rows = [asdict(s) for s in scores]
        heat_map = score_heat_map([{s.block: s.kl for s in scores}], title=context.partition_key)
        return materialised(
            context,
            plan,
            workspace,
            {"library": version, "scores": rows},
            data_version=fingerprint(rows),
            files=[write_rows(workspace.tables / "scores" / f"{context.partition_key}.parquet", rows)],
            metadata={
                "num_pairs": len(rows),
                "worst_kl": max(s.kl for s in scores),
                "scores": table([{k: r[k] for k in ("block", "kl", "lm_loss", "top1_agreement")} for r in rows]),
                "picture": picture(heat_map, "KL of each pair"),
            },
            time=time,
        )

    return block_scores


def _layer_group_asset(plan: Plan) -> dg.AssetsDefinition:
    @dg.asset(
        **plan.options(
            "layer_group",
            deps=[plan.dep(name, plan.partitions.layers_to_groups) for name in ("block_scores", *plan.further_scores)],
            partitions=plan.partitions.groups,
            description="The scores of 32 layers: Dagster's staleness check skips an edge with 100 or more upstream partitions.",
        )
    )
    def layer_group(context: dg.AssetExecutionContext, workspace: Workspace) -> dg.MaterializeResult:
        layers = [i for i in range(plan.shape.num_hidden_layers) if group_key(i) == context.partition_key]
        sources = {"scores": "block_scores", **{name: name for name in plan.further_scores}}
        value = {
            name: {layer_key(i): workspace.shelf.value(asset, layer_key(i))["scores"] for i in layers} for name, asset in sources.items()
        }
        return materialised(context, plan, workspace, value, metadata={"num_layers": len(layers)})

    return layer_group


def _score_table_asset(plan: Plan) -> dg.AssetsDefinition:
    @dg.asset(
        **plan.options(
            "score_table",
            deps=["layer_group"],
            kinds=("parquet",),
            description="Every pair of every layer with its scores and the digest of its pieces: what the search chooses from.",
        )
    )
    def score_table(context: dg.AssetExecutionContext, workspace: Workspace) -> dg.MaterializeResult:
        from puzzle_dag.report.pictures import score_heat_map

        layers, graded = _gather(plan, workspace, "scores"), _gather(plan, workspace, "task_scores")
        rows = _with_tasks([row for layer in layers for row in layer], "block", graded)
        heat_map = score_heat_map([{r["block"]: r["kl"] for r in layer} for layer in layers], title=plan.profile.name)
        value = {"num_layers": len(layers), "num_pairs": len(rows), "file": "tables/score_table.parquet", "digest": fingerprint(rows)}
        metadata = {"num_layers": len(layers), "num_pairs": len(rows), "picture": picture(heat_map, "KL of each pair and layer")}
        files = [write_rows(workspace.tables / "score_table.parquet", rows)]
        if "run_scores" in plan.further_scores:
            by_layer = _gather(plan, workspace, "run_scores")
            runs = _with_tasks([row for layer in by_layer for row in layer], "run", graded)
            drawn = score_heat_map([{label_run(r): r["kl"] for r in layer} for layer in by_layer], title=f"{plan.profile.name}: runs")
            value["runs"] = {"num_runs": len(runs), "digest": fingerprint(runs)}
            metadata |= {"num_runs": len(runs), "runs": picture(drawn, "KL of each run by its first layer, kind and number of layers")}
            files += write_or_remove(workspace.tables / RUNS_FILE, runs)
        return materialised(context, plan, workspace, value, files=files, metadata=metadata)

    return score_table


def _gather(plan: Plan, workspace: Workspace, name: str) -> list[list[dict[str, Any]]]:
    """Return the rows of every layer, in order; none where the profile doesn't ask for them."""
    groups = [workspace.shelf.value("layer_group", g).get(name, {}) for g in plan.partitions.groups.get_partition_keys()]
    # JSON sorts its keys, and "L100" comes before "L99".
    layers = sorted(((layer, rows) for group in groups for layer, rows in group.items()), key=lambda entry: layer_index(entry[0]))
    return [rows for _, rows in layers]


def _with_tasks(rows: list[dict[str, Any]], name: str, graded: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return rows with a column more a task: what the parent with this block or run (in column `name`) scores there."""
    columns: dict[tuple[int, str], dict[str, float]] = {}
    for grade in (grade for layer in graded for grade in layer):
        columns.setdefault((grade["layer"], grade["block"]), {})[grade["task"]] = grade["value"]
    return [{**row, **columns.get((row["layer"], row[name]), {})} for row in rows]


def score_assets(plan: Plan) -> list[dg.AssetsDefinition]:
    """Return block_scores, layer_group and score_table."""
    return [_block_scores_asset(plan), _layer_group_asset(plan), _score_table_asset(plan)]
