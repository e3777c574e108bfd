"""Scores: what each pair of variants does to the parent, gathered from layers to groups to one table."""

from dataclasses import asdict

import dagster as dg

from assets.library import space_from_json
from assets.materialise import Stopwatch, materialised, picture, table
from assets.partitions import group_key
from assets.plan import Plan
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
            deps=[plan.dep("block_scores", plan.partitions.layers_to_groups)],
            partitions=plan.partitions.groups,
            description="The scores of 32 layers: Dagster's staleness check skips an edge with 100 or more upstream partitions.",
        )
    )
    def layer_group(context: dg.AssetExecutionContext, workspace: Workspace) -> dg.MaterializeResult:
        layers = [i for i in range(plan.shape.num_hidden_layers) if group_key(i) == context.partition_key]
        value = {"scores": {layer_key(i): workspace.shelf.value("block_scores", layer_key(i))["scores"] for i in layers}}
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

        groups = [workspace.shelf.value("layer_group", g)["scores"] for g in plan.partitions.groups.get_partition_keys()]
        # JSON sorts its keys, and "L100" comes before "L99".
        layers = dict(sorted(((layer, rows) for group in groups for layer, rows in group.items()), key=lambda entry: layer_index(entry[0])))
        rows = [row for layer in layers.values() for row in layer]
        heat_map = score_heat_map([{r["block"]: r["kl"] for r in layer} for layer in layers.values()], title=plan.profile.name)
        return materialised(
            context,
            plan,
            workspace,
            {"num_layers": len(layers), "num_pairs": len(rows), "file": "tables/score_table.parquet", "digest": fingerprint(rows)},
            files=[write_rows(workspace.tables / "score_table.parquet", rows)],
            metadata={"num_layers": len(layers), "num_pairs": len(rows), "picture": picture(heat_map, "KL of each pair and layer")},
        )

    return score_table


def score_assets(plan: Plan) -> list[dg.AssetsDefinition]:
    """Return block_scores, layer_group and score_table."""
    return [_block_scores_asset(plan), _layer_group_asset(plan), _score_table_asset(plan)]
