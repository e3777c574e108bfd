"""Configuration assets: what a person wrote, validated and resolved; the refresh runs them only where that changed."""

from functools import partial
from typing import Any

import dagster as dg

from assets.drawings import page_link
from assets.materialise import materialised, partition_of, table
from assets.partitions import NO_PARTITIONS
from assets.plan import Plan
from assets.watches import watch
from resources.workspace import Workspace


def _configuration_asset(plan: Plan, name: str, metadata: Any = None, **options: Any) -> dg.AssetsDefinition:
    @dg.asset(**plan.options(name, kinds=("yaml",), **options))
    def read_configuration(context: dg.AssetExecutionContext, workspace: Workspace) -> dg.MaterializeResult:
        value = watch(plan, workspace, name, partition_of(context))
        return materialised(
            context, plan, workspace, value, metadata=metadata(value) if metadata else {"value": dg.MetadataValue.json(value)}
        )

    return read_configuration


def _space_metadata(value: dict[str, Any]) -> dict[str, Any]:
    num_pairs = len(value["attention"]) * len(value["ffn"])
    return {"attention": ", ".join(value["attention"]), "ffn": ", ".join(value["ffn"]), "num_pairs": num_pairs}


def _field_rows(value: dict[str, Any], prefix: str = "") -> list[dict[str, Any]]:
    """Return a row for each field that is set, nested ones by dotted name."""
    rows: list[dict[str, Any]] = []
    for name, content in value.items():
        if isinstance(content, dict):
            rows += _field_rows(content, f"{prefix}{name}.")
        elif content is not None:
            rows.append({"field": prefix + name, "value": ", ".join(map(str, content)) if isinstance(content, list) else content})
    return rows


def _fields_metadata(value: dict[str, Any]) -> dict[str, Any]:
    return {"fields": table(_field_rows(value)), "value": dg.MetadataValue.json(value)}


def _parent_metadata(plan: Plan, value: dict[str, Any]) -> dict[str, Any]:
    names = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size")
    shape = [{"field": n, "value": getattr(plan.shape, n)} for n in (*names, "max_position_embeddings")]
    files = [{"file": name, "SHA-256": digest} for name, digest in value.get("files", {}).items()]
    return {"shape": table(shape), "files": table(files), "source": dg.MetadataValue.json(value["source"])}


def _scenario_metadata(plan: Plan, value: dict[str, Any]) -> dict[str, Any]:
    return {**_fields_metadata(value), "page": page_link(plan, value["name"])}


def configuration_assets(plan: Plan) -> list[dg.AssetsDefinition]:
    """Return corpus, parent, search_space, cost_variants, target_spec and scenario_spec."""
    parts = plan.partitions
    return [
        _configuration_asset(
            plan, "corpus", description="The text: settings, and what the text itself hangs on (Python's version, file digests)."
        ),
        _configuration_asset(
            plan,
            "parent",
            partial(_parent_metadata, plan),
            description="The model to compress: its source and the digest of each file of the checkpoint.",
        ),
        _configuration_asset(
            plan,
            "search_space",
            _space_metadata,
            partitions=parts.layers,
            description="The variants that one layer may take, overrides resolved.",
        ),
        _configuration_asset(
            plan,
            "cost_variants",
            lambda value: {"attention": ", ".join(value["attention"]), "ffn": ", ".join(value["ffn"])},
            # The edge is drawn, but only a change of the union makes this stale: refresh compares the union itself.
            deps=[plan.dep("search_space", NO_PARTITIONS)],
            description="Sorted union of the variants over the layers: what costs must be known for.",
        ),
        _configuration_asset(
            plan,
            "target_spec",
            _fields_metadata,
            partitions=parts.targets,
            description="Hardware, engine, mode and workload that costs are measured for.",
        ),
        _configuration_asset(
            plan,
            "scenario_spec",
            partial(_scenario_metadata, plan),
            partitions=parts.scenarios,
            description="The constraints of one deployment (conf/scenarios/NAME.yaml).",
        ),
    ]
