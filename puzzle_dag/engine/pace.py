"""The machine's own pace: seconds of a fixed piece of work, beside which an engine's times say what is the model's and what the machine's.

On a shared machine the same model takes 10 to 20 % longer at one time than at another. The reference is the parent's kind of work,
matrix products in the engine's own type and processes, so that what slows an engine down slows it down, too. It depends on the kind
of device alone, never on the model: only then is it the same in all engines and sessions of a machine.
"""

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Reference:
    """The fixed work: so many products of an activation [rows, inner] by a weight [columns, inner]."""

    rows: int
    """Tokens of the activation."""
    inner: int
    """Width that is summed over."""
    columns: int
    """Width of the result."""
    num_products: int
    """How often it is done: what the seconds are told for."""

    @property
    def flops(self) -> float:
        """Floating-point operations of it all, two a multiply-add."""
        return 2.0 * self.rows * self.inner * self.columns * self.num_products


_ENOUGH_S = 0.03
"""Where all of the reference takes longer, an engine does as many of its products as take so long, and scales what they took to
all: the references of small engines would else take as long as what they stand beside."""
_NUM_TRIES, _NUM_TRIED = 3, 10
CPU_REFERENCE = Reference(1024, 384, 768, num_products=60)
"""36 GFLOP: about 0.1 s of two shared cores without AMX. Small enough for the caches, as the layers of a small parent are."""
GPU_REFERENCE = Reference(4096, 4096, 4096, num_products=32)
"""4.4 TFLOP, some milliseconds at published peaks, in 100 MB, which the engine's own `device_bytes` then has, too."""


def time_products(work: Reference, device: "torch.device", dtype: "torch.dtype", num_products: int | None = None) -> float:
    """Return the seconds that a piece of work takes on a device. One product goes before, untimed: it readies the library.

    Args:
        work: what the seconds are told for.
        device: where it runs.
        dtype: type of both operands.
        num_products: how many are done, whose seconds are scaled to all of the work; all by default.
    """
    import torch

    num_products = num_products or work.num_products
    # Its own: the engine's random numbers stay as they were. On the device: this stands between any two timed generations.
    generator = torch.Generator(device).manual_seed(0)
    activation = torch.randn(work.rows, work.inner, generator=generator, device=device, dtype=dtype)
    weight = torch.randn(work.columns, work.inner, generator=generator, device=device, dtype=dtype)

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    with torch.inference_mode():
        torch.nn.functional.linear(activation, weight)
        wait()
        start = time.perf_counter()
        for _ in range(num_products):
            torch.nn.functional.linear(activation, weight)
        wait()
        return (time.perf_counter() - start) * work.num_products / num_products


def _reference_of(worker: Any) -> Reference:
    return CPU_REFERENCE if worker.device.type == "cpu" else GPU_REFERENCE


def count_enough(worker: Any) -> int:
    """Return how many products of the reference take `_ENOUGH_S` on a worker's own device, or all; runs there."""
    work = _reference_of(worker)
    all_s = min(time_products(work, worker.device, worker.model_config.dtype, _NUM_TRIED) for _ in range(_NUM_TRIES))
    return min(work.num_products, math.ceil(work.num_products * _ENOUGH_S / all_s))


def time_reference(worker: Any, num_products: int) -> float:
    """Return the seconds of the reference on a worker's own device, in the model's type, by so many of its products; runs there."""
    return time_products(_reference_of(worker), worker.device, worker.model_config.dtype, num_products)


class Pace:
    """The pace of an engine's machine. How much of the reference is done is chosen once, so that no slow moment has a say in it."""

    def __init__(self, llm: Any) -> None:
        """Choose how many products are enough, by the engine's fastest worker."""
        self._llm = llm
        self._num_products: int = max(llm.collective_rpc(count_enough))

    def time(self) -> float:
        """Return the seconds of the reference now: of the slowest worker, since a step waits for all."""
        return float(max(self._llm.collective_rpc(time_reference, args=(self._num_products,))))
