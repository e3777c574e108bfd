"""The machine's own pace: seconds of a fixed piece of work, beside which an engine's times say what is the model's and what the machine's.

On a shared machine the same model takes 10 to 20 % longer at one time than at another. The reference is the parent's kind of work,
matrix products in the engine's own type and processes, so that what slows an engine down slows it down, too. It depends on the kind
of device alone, never on the model: only then is it the same in all engines and sessions of a machine.
"""

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
    portion: int
    """Products between two looks at the clock; a slow machine does so many only, and what they took is scaled to all."""

    @property
    def flops(self) -> float:
        """Floating-point operations of it all, two a multiply-add."""
        return 2.0 * self.rows * self.inner * self.columns * self.num_products


ENOUGH_S = 0.03
"""How long a machine works on its reference before what is left is reckoned: longer would cost more than the engines that it is for."""
CPU_REFERENCE = Reference(1024, 384, 768, num_products=60, portion=10)
"""36 GFLOP: about 0.1 s of two shared cores without AMX. Small enough for the caches, as the layers of a small parent are."""
GPU_REFERENCE = Reference(4096, 4096, 4096, num_products=32, portion=32)
"""4.4 TFLOP, some milliseconds at published peaks, in 100 MB, which the engine's own `device_bytes` then has, too."""


def time_products(work: Reference, device: "torch.device", dtype: "torch.dtype") -> float:
    """Return the seconds that a piece of work takes on a device, by as many portions of it as take `ENOUGH_S`, or by all.

    One product goes before, untimed: it readies the library.
    """
    import torch

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
        start, num_done, seconds = time.perf_counter(), 0, 0.0
        while num_done < work.num_products and seconds < ENOUGH_S:
            for _ in range(work.portion):
                torch.nn.functional.linear(activation, weight)
            wait()
            num_done, seconds = num_done + work.portion, time.perf_counter() - start
        return seconds * work.num_products / num_done


def time_reference(worker: Any) -> float:
    """Return the seconds of the reference on a worker's own device, in the model's type; runs there."""
    work = CPU_REFERENCE if worker.device.type == "cpu" else GPU_REFERENCE
    return time_products(work, worker.device, worker.model_config.dtype)


def time_pace(llm: Any) -> float:
    """Return the seconds of the reference in an engine: of its slowest worker, since a step waits for all."""
    return float(max(llm.collective_rpc(time_reference)))
