"""The block library: every variant of a layer, initialised, trained, kept in the store."""

from typing import Any

import dagster as dg

from assets.materialise import Stopwatch, materialised, picture, table
from assets.plan import Plan
from puzzle_dag.architecture import FFN, Attention, LayerSpace, layer_index
from puzzle_dag.progress import ProgressLog
from puzzle_dag.store import fingerprint
from resources.rows import write_rows
from resources.workspace import Workspace

_LOSS = "loss (share of the output's energy)"


def space_from_json(value: dict[str, list[str]]) -> LayerSpace:
    """Return the space that a record of `search_space` says."""
    return LayerSpace(tuple(map(Attention.parse, value["attention"])), tuple(map(FFN.parse, value["ffn"])))


def _metadata(layer: str, rows: list[dict[str, Any]], curves: dict[str, list[tuple[int, float]]]) -> dict[str, Any]:
    from puzzle_dag.report.pictures import loss_bars, loss_curve

    losses = {f"{r['place']}/{r['variant']}": (r["loss_initial"], r["loss_trained"]) for r in rows}
    return {
        "num_variants": len(rows),
        "num_trained": sum(not r["was_cached"] for r in rows),
        "losses": table([{k: r[k] for k in ("place", "variant", "loss_initial", "loss_trained", "was_cached")} for r in rows]),
        "picture": picture(loss_bars(losses, title=layer), "loss before and after training"),
        **(
            {"training": picture(loss_curve(curves, title=f"{layer}: block-wise distillation", y=_LOSS), "training loss of each variant")}
            if any(curves.values())
            else {}
        ),
    }


def library_assets(plan: Plan) -> list[dg.AssetsDefinition]:
    """Return block_library."""
    profile = plan.profile
    settings = {"library": profile.library.model_dump(), "dtype": profile.dtype}
    stages = ["puzzle_dag.library.build", "puzzle_dag.library.activations"]

    @dg.asset(
        **plan.options(
            "block_library",
            deps=["search_space", "parent", "parent_activations"],
            stages=stages,
            settings=settings,
            partitions=plan.partitions.layers,
            kinds=("pytorch", "safetensors"),
            device=True,
            description="All variants of one layer, initialised and trained to do what the parent's do (BLD), in one pass.",
        )
    )
    def block_library(context: dg.AssetExecutionContext, workspace: Workspace) -> dg.MaterializeResult:
        from puzzle_dag.library.activations import ActivationCache
        from puzzle_dag.library.build import build_layer, report_rows

        layer = layer_index(context.partition_key)
        space = workspace.shelf.value("search_space", context.partition_key)
        cache = ActivationCache(workspace.var / "activations")
        with workspace.device():
            time = Stopwatch()
            pieces, reports = build_layer(
                workspace.load_parent(),
                layer,
                space_from_json(space),
                cache,
                profile.library,
                workspace.store,
                activations_digest=cache.digest,
                compute_dtype=profile.dtype,
                retrain=workspace.anew,
                progress=ProgressLog(f"library {context.partition_key}"),
            )
        rows = report_rows(layer, reports)
        manifest = pieces.to_json()
        digests = {**{n: a["digest"] for n, a in manifest["artifacts"].items()}, **manifest["parents"]}
        return materialised(
            context,
            plan,
            workspace,
            {"space": space, "pieces": manifest, "reports": rows},
            data_version=fingerprint({"space": space, "pieces": digests}),
            files=[
                write_rows(workspace.tables / "library" / f"{context.partition_key}.parquet", rows),
                *(a.folder / "tensors.safetensors" for a in pieces.artifacts.values()),
            ],
            metadata=_metadata(context.partition_key, rows, {f"{r.place}/{r.variant}": r.curve for r in reports}),
            time=time,
        )

    return [block_library]
