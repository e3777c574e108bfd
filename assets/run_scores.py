"""Scores of runs: what replacing several layers at once does to the parent; only where the profile asks for runs."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg

from assets.materialise import Stopwatch, materialised, picture, table
from assets.plan import Plan
from assets.watches import watch_run_scores
from puzzle_dag.architecture import Run, layer_index, layer_key
from puzzle_dag.progress import ProgressLog
from puzzle_dag.store import fingerprint
from resources.rows import read_rows, write_rows
from resources.workspace import Workspace

if TYPE_CHECKING:
    from puzzle_dag.search.run_score import RunScore

RUNS_FILE = "score_table_runs.parquet"
"""The runs of all layers, beside score_table.parquet."""


class RunsChangedError(ValueError):
    """The runs' scores are others than those that a solution was found with."""


def write_or_remove(path: Path, rows: list[dict[str, Any]]) -> list[Path]:
    """Write rows, or take the former file away where there are none; return the files that there are then."""
    if rows:
        return [write_rows(path, rows)]
    path.unlink(missing_ok=True)
    return []


def read_run_scores(workspace: Workspace) -> "list[RunScore]":
    """Return the score table's runs; none where the profile didn't ask for any when the table was made."""
    from puzzle_dag.search.run_score import RunScore

    if "runs" not in workspace.shelf.value("score_table"):
        return []
    path = workspace.tables / RUNS_FILE
    return [RunScore.of_row(row) for row in read_rows(path)] if path.exists() else []


def fused_pieces(workspace: Workspace, choice: dict[str, Any]) -> Any:
    """Return the LayerPieces of a layer that a solution replaced as a part of a run: nothing, or the parent's FFNs side by side.

    Raises:
        RunsChangedError: the run was scored anew since, and is another one now.
    """
    from puzzle_dag.architecture import Block
    from puzzle_dag.pieces import LayerPieces, piece_name

    run = Run.parse(choice["run"])
    record = workspace.shelf.find("run_scores", layer_key(run.first))
    rows = {row["run"]: row for row in (record.value["scores"] if record is not None else [])}
    digests = rows[run.name]["digests"].split() if run.name in rows else []
    if choice["digest"] not in digests[choice["layer"] - run.first : choice["layer"] - run.first + 1]:
        raise RunsChangedError(f"run {run.name}: it changed after the solution was found; run `python -m assets refresh`")
    is_fused = run.kind == "fuse" and choice["layer"] == run.first
    own = piece_name("ffn", Block.parse(choice["block"]).ffn.name)
    return LayerPieces(choice["layer"], {}, fused={own: tuple(run.layers)} if is_fused else {})


def _metadata(rows: list[dict[str, Any]]) -> dict[str, Any]:
    from puzzle_dag.report.pictures import score_heat_map

    if not rows:
        return {"num_runs": 0}
    shown = [{k: row[k] for k in ("run", "blocks", "kl", "lm_loss", "top1_agreement")} for row in rows]
    drawn = score_heat_map([{label_run(row): row["kl"] for row in rows}], title=layer_key(rows[0]["layer"]))
    return {"num_runs": len(rows), "scores": table(shown), "picture": picture(drawn, "KL of each run")}


def label_run(row: dict[str, Any]) -> str:
    """Return what tells a run from the others that begin at its layer: "drop 2"."""
    return f"{Run.parse(row['run']).kind} {row['num_layers']}"


def run_score_assets(plan: Plan) -> list[dg.AssetsDefinition]:
    """Return run_scores, where the profile asks for runs."""
    if "run_scores" not in plan.further_scores:
        return []
    dtype = plan.profile.dtype

    @dg.asset(
        **plan.options(
            "run_scores",
            deps=["parent", "parent_activations"],
            stages=["puzzle_dag.search.run_score", "puzzle_dag.library.activations"],
            settings={"dtype": dtype},
            partitions=plan.partitions.layers,
            kinds=("pytorch", "parquet"),
            device=True,
            description="KL divergence, LM loss and top-1 agreement of each run that begins at a layer: left out as a whole, or with its "
            "FFNs fused.",
        )
    )
    def run_scores(context: dg.AssetExecutionContext, workspace: Workspace) -> dg.MaterializeResult:
        from puzzle_dag.library.activations import ActivationCache
        from puzzle_dag.search.run_score import score_runs

        runs = [Run.parse(name) for name in watch_run_scores(plan, workspace, context.partition_key)["runs"]]
        cache = ActivationCache(workspace.var / "activations")
        with workspace.device():
            time = Stopwatch()
            scores = score_runs(
                workspace.load_parent(),
                runs,
                cache,
                workspace.store,
                activations_digest=cache.digest,
                compute_dtype=dtype,
                rescore=workspace.anew,
                progress=ProgressLog(f"run scores {context.partition_key}"),
            )
        rows = [score.to_row() for score in scores]
        return materialised(
            context,
            plan,
            workspace,
            {"layer": layer_index(context.partition_key), "scores": rows},
            data_version=fingerprint(rows),
            files=write_or_remove(workspace.tables / "run_scores" / f"{context.partition_key}.parquet", rows),
            metadata=_metadata(rows),
            time=time,
        )

    return [run_scores]
