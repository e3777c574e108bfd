"""Partition keys: layer, target and scenario, plus groups of 32 layers.

Dagster's staleness check skips an edge with 100 or more upstream partitions, so no edge may have them: layers reach
the unpartitioned tables through groups. Names of dynamic sets are global to an instance, hence the prefix.
"""

from dataclasses import dataclass

import dagster as dg

from puzzle_dag.architecture import layer_key

LAYERS_PER_GROUP = 32


def group_key(layer: int) -> str:
    """Return the partition key of a layer's group: "G0" for layers 0 to 31."""
    return f"G{layer // LAYERS_PER_GROUP}"


@dataclass(frozen=True, slots=True)
class Partitions:
    """The partition sets of one profile."""

    layers: dg.StaticPartitionsDefinition
    groups: dg.StaticPartitionsDefinition
    targets: dg.DynamicPartitionsDefinition
    scenarios: dg.DynamicPartitionsDefinition
    layers_to_groups: dg.StaticPartitionMapping

    @staticmethod
    def of(profile: str, num_layers: int) -> "Partitions":
        """Return the sets of a profile whose parent has `num_layers` layers."""
        groups = {layer_key(i): group_key(i) for i in range(num_layers)}
        return Partitions(
            layers=dg.StaticPartitionsDefinition(list(groups)),
            groups=dg.StaticPartitionsDefinition(list(dict.fromkeys(groups.values()))),
            targets=dg.DynamicPartitionsDefinition(name=f"{profile}/target"),
            scenarios=dg.DynamicPartitionsDefinition(name=f"{profile}/scenario"),
            layers_to_groups=dg.StaticPartitionMapping(groups),
        )


NO_PARTITIONS = dg.SpecificPartitionsPartitionMapping([])
"""An edge that is drawn but never makes stale: the refresh compares digests itself there."""
