"""A cache of hidden states held in memory, in the place of the parent's activations on disk, that keeps a record of what was read."""

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Cache:
    states: list[Tensor]
    rows: Tensor
    reads: list[int] = field(default_factory=list)
    digest: str = "activations"

    @property
    def num_layers(self) -> int:
        return len(self.states) - 1

    def num_rows(self, split: str) -> int:
        return len(self.rows)

    def tokens(self, split: str) -> Tensor:
        assert split == "score", "scores must not be taken on what was trained on"
        return self.rows

    def hidden(self, split: str, boundary: int, *, start: int = 0, stop: int | None = None) -> Tensor:
        assert split == "score"
        self.reads.append(boundary)
        return self.states[boundary][start:stop]
