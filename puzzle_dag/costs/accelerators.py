"""Published peaks of the accelerators that costs can be estimated for, each with its source; nothing here was measured.

Sources: "NVIDIA H100 Tensor Core GPU" and "NVIDIA H200 Tensor Core GPU" data sheets (SXM columns) and the H100 architecture white
paper, whose tensor-core rates are halved where they are given with 2:4 sparsity; "NVIDIA Ada GPU Architecture" white
paper V2, appendix A (GeForce RTX 4090), rates with FP32 accumulation.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Accelerator:
    """One accelerator's published peaks."""

    name: str
    """Product name."""
    flops_per_s: Mapping[str, float]
    """Number type -> dense operations a second of matrix products; a multiply-add counts two. float32 is without tensor cores."""
    bytes_per_s: float
    """Bandwidth of the device memory."""
    link_bytes_per_s: float
    """Bandwidth between two accelerators, one direction."""
    source: str
    """Where the numbers are published."""


_HOPPER = {"float32": 66.9e12, "bfloat16": 989.4e12, "fp8": 1978.9e12, "int8": 1978.9e12}

ACCELERATORS: Mapping[str, Accelerator] = {
    "h100": Accelerator(
        "NVIDIA H100 SXM5 80 GB", _HOPPER, 3.35e12, 450e9, "NVIDIA H100 data sheet, SXM: 3.35 TB/s, NVLink 900 GB/s both ways; dense rates"
    ),
    "h200": Accelerator(
        "NVIDIA H200 SXM5 141 GB", _HOPPER, 4.8e12, 450e9, "NVIDIA H200 data sheet, SXM: 4.8 TB/s, NVLink 900 GB/s both ways; dense rates"
    ),
    "rtx4090": Accelerator(
        "NVIDIA GeForce RTX 4090",
        {"float32": 82.6e12, "bfloat16": 165.2e12, "fp8": 330.3e12, "int8": 660.6e12},
        1.008e12,
        32e9,
        "NVIDIA Ada white paper V2, appendix A: 1,008 GB/s; no NVLink, PCIe 4.0 x16, 32 GB/s one way; dense rates, FP32 accumulation",
    ),
}
"""A target's `hardware` -> its accelerator."""
