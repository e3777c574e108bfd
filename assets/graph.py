"""`python -m assets.graph FILE.svg`: the asset graph as a picture, from the definitions themselves, for the README."""

import argparse
from pathlib import Path

import dagster as dg

from assets.plan import GROUPS
from puzzle_dag.report.graph import draw_graph
from puzzle_dag.store import write_atomically


def draw_definitions(definitions: dg.Definitions) -> str:
    """Return an SVG of all assets of one profile: who reads whom, group by colour, partitions by name."""
    graph = definitions.resolve_asset_graph()
    nodes = {graph.get(key).key.path[-1]: graph.get(key) for key in graph.get_all_asset_keys()}
    order = [name for names in GROUPS.values() for name in names if name in nodes]
    upstream = {name: sorted((k.path[-1] for k in nodes[name].parent_keys), key=order.index) for name in order}
    groups = {name: group.partition("_")[2] for group, names in GROUPS.items() for name in names if name in nodes}
    return draw_graph(upstream, groups=groups, partitions={n: p for n in order if (p := _partitioned_by(nodes[n].partitions_def))})


def _partitioned_by(definition: dg.PartitionsDefinition | None) -> str:
    """Return "layer", "group of layers", "target", "scenario" or ""."""
    if definition is None:
        return ""
    if isinstance(definition, dg.DynamicPartitionsDefinition):
        return (definition.name or "").rpartition("_")[2].rpartition("/")[2].rstrip("s")
    return "layer" if definition.get_partition_keys()[0].startswith("L") else "group of layers"


def main() -> None:
    """Draw the assets of the profile that $PUZZLE_DAG_PROFILE names (tiny by default)."""
    from assets import definitions

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    write_atomically(parser.parse_args().file, draw_definitions(definitions.defs))


if __name__ == "__main__":
    main()
