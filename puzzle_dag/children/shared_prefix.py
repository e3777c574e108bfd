"""The parent's layers before a replaced one, run once for all replacements: their output on the same requests is the same.

lm-eval sends the requests of a task in the same order and batches each time, so the states are kept by their place in that
order. Where an answer is generated, what is sent depends on the model; then nothing is shared.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from puzzle_dag.model.modeling_puzzle_dag import PuzzleDagForCausalLM
from puzzle_dag.model.replacement import replaced_layers

MOST_BYTES = 4 * 2**30
"""States that are kept at most; requests with more are computed anew for every replacement."""


class OtherRequestsError(RuntimeError):
    """The requests are not those of the pass that was kept."""


class _Untouched(nn.Module):
    """A layer whose work is in what was kept."""

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        """Return what came in."""
        return hidden_states


class _Keeper(nn.Module):
    """The last layer before the replaced one; keeps what it gives."""

    def __init__(self, prefix: "SharedPrefix", layer: nn.Module) -> None:
        super().__init__()
        self.prefix, self.layer = prefix, layer

    def forward(self, hidden_states: Tensor, *args: Any, past_key_values: Any = None, **options: Any) -> Tensor:
        """Run the layer."""
        out: Tensor = self.layer(hidden_states, *args, past_key_values=past_key_values, **options)
        self.prefix.keep(out, is_generated=past_key_values is not None)
        return out


class _Replay(nn.Module):
    """Gives what the last layer before the replaced one gave."""

    def __init__(self, prefix: "SharedPrefix") -> None:
        super().__init__()
        self.prefix = prefix

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        """Return the states of the same request."""
        return self.prefix.next_like(hidden_states)


class SharedPrefix:
    """What enters layer `first` of a model in each forward pass: kept in one `using` context, given out in all later ones."""

    def __init__(self, model: PuzzleDagForCausalLM, first: int) -> None:
        """Share the layers of `model` before layer `first`."""
        self.model, self.first = model, first
        self.is_shareable = first > 0
        self._states: list[Tensor] = []
        self._num_bytes, self._position, self._is_complete = 0, 0, False

    def keep(self, states: Tensor, *, is_generated: bool) -> None:
        """Keep the states of the next forward pass, or give up sharing."""
        self._num_bytes += states.numel() * states.element_size()
        if is_generated or self._num_bytes > MOST_BYTES:
            self.is_shareable = False
            self._states.clear()
        if self.is_shareable:
            self._states.append(states)

    def next_like(self, hidden_states: Tensor) -> Tensor:
        """Return the states of the next forward pass. Raises OtherRequestsError where it can't be the one that was kept."""
        there = self._states[self._position] if self._position < len(self._states) else None
        if there is None or there.shape != hidden_states.shape:
            raise OtherRequestsError(f"forward pass {self._position}: other requests came than in the pass that was kept")
        self._position += 1
        return there

    @contextmanager
    def using(self) -> Iterator[None]:
        """Run the model's layers before `first`, or, from the second time on, give what they gave; the same requests each time."""
        layers: dict[int, nn.Module] = {}
        if self.is_shareable and self._is_complete:
            layers = {index: _Untouched() for index in range(self.first - 1)} | {self.first - 1: _Replay(self)}
            self._position = 0
        elif self.is_shareable:
            layers = {self.first - 1: _Keeper(self, self.model.model.layers[self.first - 1])}
            self._states.clear()
            self._num_bytes = 0
        with replaced_layers(self.model, layers):
            yield
        self._is_complete = self.is_shareable
