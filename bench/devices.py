"""Roofline peaks per device: what no kernel can exceed, from the makers' data sheets; a CPU's are measured.

All rates are dense (no structured sparsity). Tensor cores count where they exist: fp64 on A100, H100, H200,
B200.
"""

import os
import time
from dataclasses import dataclass

import torch

from slicegpt.errors import SliceGPTError


@dataclass(frozen=True)
class Device:
    """fp64, fp32, half (fp16 or bf16, summed in float32): TFLOP/s; int8: TOPS; bandwidth: GB/s; memory: GiB."""

    name: str
    capability: tuple[int, int] | None
    fp64: float
    fp32: float
    half: float
    int8: float
    bandwidth: float
    memory: float
    source: str


DEVICES = (
    Device("B200", (10, 0), 40, 80, 2250, 4500, 8000, 180, "NVIDIA HGX B200 data sheet, 2024"),
    Device("H200", (9, 0), 66.9, 66.9, 989.4, 1979, 4800, 140, "NVIDIA H200 data sheet, SXM, 2023"),
    Device("H100 SXM", (9, 0), 66.9, 66.9, 989.4, 1979, 3350, 80, "NVIDIA H100 data sheet, SXM5, 2023"),
    Device("A100 80GB", (8, 0), 19.5, 19.5, 312, 624, 2039, 80, "NVIDIA A100 80GB data sheet, SXM4, 2021"),
    Device("A100 40GB", (8, 0), 19.5, 19.5, 312, 624, 1555, 40, "NVIDIA A100 architecture white paper, 2020"),
    Device(
        "RTX 4090", (8, 9), 1.29, 82.6, 165.2, 660.6, 1008, 24, "NVIDIA Ada architecture white paper, 2022"
    ),
    Device("Quadro RTX 6000", (7, 5), 0.51, 16.3, 130.5, 261, 672, 24, "NVIDIA Turing white paper, 2018"),
)

# Parts of torch.cuda.get_device_name(), in order: the first that match decide.
_PRODUCT_NAMES = (
    (("B200",), "B200"),
    (("H200",), "H200"),
    (("H100", "HBM3"), "H100 SXM"),
    (("A100-SXM4", "80GB"), "A100 80GB"),
    (("A100", "40GB"), "A100 40GB"),
    (("RTX 4090",), "RTX 4090"),
    (("Quadro RTX 6000",), "Quadro RTX 6000"),
)


# What people type.
ALIASES = {
    "b200": "B200",
    "h200": "H200",
    "h100": "H100 SXM",
    "a100-80": "A100 80GB",
    "a100-40": "A100 40GB",
    "rtx-4090": "RTX 4090",
    "rtx-6000": "Quadro RTX 6000",
}


def device_named(name: str) -> Device:
    """The device of this name or alias."""
    for device in DEVICES:
        if device.name == ALIASES.get(name.lower(), name):
            return device
    raise SliceGPTError(f"--device: must be one of {', '.join(ALIASES)}, got {name!r}")


def device_of_product(product: str) -> Device | None:
    """The device that CUDA names so, for example "NVIDIA A100-SXM4-80GB"; None if it is not listed."""
    for parts, name in _PRODUCT_NAMES:
        if all(part in product for part in parts):
            return device_named(name)
    return None


def current_device(device: torch.device | None = None) -> Device | None:
    """The CUDA device in use (or this one), if its peaks are listed; without CUDA, this CPU with measured peaks."""
    if torch.cuda.is_available() if device is None else device.type == "cuda":
        return device_of_product(torch.cuda.get_device_name(device))
    return measured_cpu()


def measured_cpu(size: int = 2048, copy_bytes: int = 1 << 28) -> Device:
    """Best of three: square products, of bfloat16 as well where a CPU has instructions for it; for the bandwidth a copy
    (bytes read plus bytes written) or a matrix-vector product (bytes read), whichever moves more, as some CPUs read
    faster than they write."""
    peaks = {}
    # bfloat16 is multiplied at half of the size, because without such instructions it may be very slow.
    for dtype, n in ((torch.float64, size), (torch.float32, size), (torch.bfloat16, size // 2)):
        a = torch.randn(n, n).to(dtype)
        peaks[dtype] = 2 * n**3 / _best_seconds(lambda a=a: a @ a) / 1e12
    source = torch.ones(copy_bytes // 4)
    target = torch.empty_like(source)
    matrix, vector = source.view(-1, 1 << 13), torch.ones(1 << 13)
    copied = 2 * copy_bytes / _best_seconds(lambda: target.copy_(source)) / 1e9
    read = copy_bytes / _best_seconds(lambda: matrix @ vector) / 1e9
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    measured = f"measured with {torch.get_num_threads()} threads"
    float32, bandwidth = peaks[torch.float32], max(copied, read)
    half = max(float32, peaks[torch.bfloat16])
    return Device("this CPU", None, peaks[torch.float64], float32, half, 0.0, bandwidth, memory, measured)


def _best_seconds(function) -> float:
    times = []
    for _ in range(4):  # the first call warms up
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times[1:])
