"""What an architecture must look like, whatever it costs: fixed or forbidden blocks, sameness, difference."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

from puzzle_dag.architecture import Architecture
from puzzle_dag.config import StructureSettings
from puzzle_dag.search.candidates import Candidates, num_different_layers
from puzzle_dag.search.limits import ScenarioError


@dataclass(frozen=True, slots=True)
class Structure:
    """Conditions on the blocks themselves.

    Patterns are block names with wildcards: "kv8/*" is any FFN beside the full attention, "*/noop" no FFN.

    Attributes:
        fixed: layer -> pattern that its block must match.
        forbidden: layer -> patterns that its block must not match; None stands for every layer.
        homogeneous: the same block in every layer.
        max_distinct: at most so many different blocks in the whole model.
        different_from: architectures that the answer must differ from in `min_different_layers` or more.
        min_different_layers: see there.
    """

    fixed: Mapping[int, str] = field(default_factory=dict)
    forbidden: Mapping[int | None, Sequence[str]] = field(default_factory=dict)
    homogeneous: bool = False
    max_distinct: int | None = None
    different_from: tuple[Architecture, ...] = ()
    min_different_layers: int = 1

    @staticmethod
    def of(settings: StructureSettings, candidates: Candidates, different_from: tuple[Architecture, ...] = ()) -> "Structure":
        """Return a scenario's structure.

        Args:
            settings: as written.
            candidates: all that there are; a pattern that forbids none of them is a mistake.
            different_from: the answers of the scenarios that `settings` names.

        Raises:
            ScenarioError: a forbidden pattern matches no block, or more layers must differ than there are.
        """
        num_layers = candidates.num_layers
        if settings.different_from and settings.min_different_layers > num_layers:
            raise ScenarioError(f"structure.min_different_layers is {settings.min_different_layers}; the parent has {num_layers} layers")
        forbidden = {None if layer == "all" else layer: patterns for layer, patterns in settings.forbidden.items()}
        for layer, patterns in forbidden.items():
            names = sorted({name for i, name in candidates.placed_names() if layer in (None, i)})
            for pattern in patterns:
                if names and not any(fnmatchcase(name, pattern) for name in names):
                    where = "all" if layer is None else layer
                    raise ScenarioError(f"structure.forbidden.{where}: {pattern!r} matches no block; there are {', '.join(names)}")
        return Structure(
            settings.fixed, forbidden, settings.homogeneous, settings.max_distinct, different_from, settings.min_different_layers
        )

    def allows(self, layer: int, block: str) -> bool:
        """Say whether a layer may have a block."""
        if not fnmatchcase(block, self.fixed.get(layer, "*")):
            return False
        forbidden = (*self.forbidden.get(None, ()), *self.forbidden.get(layer, ()))
        return not any(fnmatchcase(block, pattern) for pattern in forbidden)

    @property
    def words(self) -> str:
        """All that is asked, e.g. "layer 0 kv8/w768, no noop/noop, the same block in every layer"; empty where nothing is."""
        asked = [f"layer {layer} {pattern}" for layer, pattern in self.fixed.items()]
        for layer, patterns in self.forbidden.items():
            asked += [f"no {pattern}" + ("" if layer is None else f" in layer {layer}") for pattern in patterns]
        if self.homogeneous:
            asked.append("the same block in every layer")
        if self.max_distinct is not None:
            asked.append(f"at most {self.max_distinct} different blocks")
        asked += [f"{self.min_different_layers} layers or more different from another answer" for _ in self.different_from]
        return ", ".join(asked)

    def broken_by(self, architecture: Architecture) -> list[str]:
        """Return what an architecture has that isn't allowed, in words; nothing where it is as asked."""
        names = [block.name for block in architecture]
        ruled_out = [(layer, name) for layer, name in enumerate(names) if not self.allows(layer, name)]
        wrong = [f"layer {layer} has {name}, which `fixed` or `forbidden` rules out" for layer, name in ruled_out]
        most = 1 if self.homogeneous else self.max_distinct
        if most is not None and len(set(names)) > most:
            wrong.append(f"{len(set(names))} different blocks where {most} may be")
        for other in self.different_from:
            num_different = num_different_layers(architecture, other)
            if num_different < self.min_different_layers:
                wrong.append(f"{num_different} layers differ from an answer that {self.min_different_layers} must differ from")
        return wrong

    def apply(self, candidates: Candidates) -> Candidates:
        """Return the candidates that this structure leaves, its counts and differences with them.

        Raises:
            ScenarioError: a layer that isn't there, a layer that is left without any block, a count that isn't positive.
        """
        for layer in {*self.fixed, *(i for i in self.forbidden if i is not None)}:
            if not 0 <= layer < candidates.num_layers:
                raise ScenarioError(f"structure: layer {layer} isn't there; the parent has layers 0 to {candidates.num_layers - 1}")
        if self.max_distinct is not None and self.max_distinct < 1:
            raise ScenarioError(f"structure: max_distinct is {self.max_distinct}; a model has one block or more, so give 1 or more")
        kept = [
            i
            for i, (item, blocks) in enumerate(zip(candidates.items, candidates.blocks, strict=True))
            if all(self.allows(layer, block.name) for layer, block in zip(item.layers, blocks, strict=True))
        ]
        bare = sorted(set(range(candidates.num_layers)) - {layer for i in kept for layer in candidates.items[i].layers})
        if bare:
            names = ", ".join(dict.fromkeys(name for layer, name in candidates.placed_names() if layer == bare[0]))
            raise ScenarioError(f"structure: no block is left for layer {bare[0]}; it has {names}: loosen `fixed` or `forbidden`")
        restricted = candidates.restricted(kept, max_distinct=1 if self.homogeneous else self.max_distinct)
        for architecture in self.different_from:
            restricted = restricted.differing(architecture, self.min_different_layers)
        return replace(restricted, structure=self.words, free=candidates)
