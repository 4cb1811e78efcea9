"""What the data sheets of GPUs say, in their fastest form (SXM). Torch-free."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """One GPU; rates are peaks, without sparsity.

    Attributes:
        bf16_flops: per second, of tensor cores.
        fp32_flops: per second, without TF32.
        memory_bytes: the sheet's GB taken as GiB; the driver leaves a little less.
        memory_bandwidth: bytes per second.
        link_bandwidth: bytes per second and direction, to the GPUs of its node.
        network_bandwidth: bytes per second and direction of its own network port in the maker's node of eight (DGX).
    """

    name: str
    bf16_flops: float
    fp32_flops: float
    memory_bytes: int
    memory_bandwidth: float
    link_bandwidth: float
    network_bandwidth: float


GPUS = {
    gpu.name: gpu
    for gpu in (
        # NVIDIA A100 Tensor Core GPU data sheet, A100 80GB SXM: NVLink 600 GB/s both ways; DGX A100: 8 x 200 Gb/s.
        Gpu("a100", 312e12, 19.5e12, 80 * 2**30, 2.039e12, 300e9, 25e9),
        # NVIDIA H100 Tensor Core GPU data sheet, H100 SXM: NVLink 900 GB/s both ways; DGX H100: 8 x 400 Gb/s.
        Gpu("h100", 989e12, 67e12, 80 * 2**30, 3.35e12, 450e9, 50e9),
        # NVIDIA H200 Tensor Core GPU data sheet, H200 SXM: NVLink 900 GB/s both ways; DGX H200: 8 x 400 Gb/s.
        Gpu("h200", 989e12, 67e12, 141 * 2**30, 4.8e12, 450e9, 50e9),
    )
}
"""By the name that a cluster file gives as `gpu`."""
