"""What the vendors' data sheets say of GPUs; rates with sparsity are halved here."""

from typing import NamedTuple

from worldmodel.errors import ConfigError


class GPU(NamedTuple):
    """One GPU; rates are nominal."""

    tflops: float  # bfloat16 matrix products with float32 sums, dense, 10^12 FLOP/s
    memory: float  # GB of the data sheet, which drivers report as about as many GiB
    bandwidth: float  # of its memory, GB/s
    link: float  # to the GPUs of its node, GB/s each way: NVLink, or PCIe with 16 lanes
    network: float  # to other nodes, GB/s each way: one adapter per GPU in the vendor's servers; else 100 Gbit/s
    source: str


GPUS = {
    "a100": GPU(312, 80, 2039, 300, 25, "NVIDIA A100 datasheet, 80 GB SXM; DGX A100, 200 Gbit/s"),
    "h100": GPU(989, 80, 3350, 450, 50, "NVIDIA H100 datasheet, SXM; DGX H100, 400 Gbit/s"),
    "h200": GPU(989, 141, 4800, 450, 50, "NVIDIA H200 datasheet, SXM; DGX H200, 400 Gbit/s"),
    "b200": GPU(2250, 180, 8000, 900, 50, "NVIDIA HGX B200 datasheet; DGX B200, 400 Gbit/s"),
    "l40s": GPU(362, 48, 864, 32, 12.5, "NVIDIA L40S datasheet, PCIe 4.0"),
    "rtx4090": GPU(165, 24, 1008, 32, 12.5, "NVIDIA Ada GPU architecture whitepaper, PCIe 4.0"),
    "rtx5090": GPU(209, 32, 1792, 64, 12.5, "NVIDIA RTX Blackwell GPU architecture whitepaper, PCIe 5.0"),
}


def find_gpu(name: str) -> GPU:
    """A GPU by its name. Raises `ConfigError` for one that is not in the table."""
    if name not in GPUS:
        raise ConfigError(f"gpu: unknown {name!r}; one of {', '.join(GPUS)}")
    return GPUS[name]
