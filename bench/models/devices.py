"""Roofline peaks per device, which no kernel can exceed: from the vendors' data sheets; a CPU's are measured.

All rates are dense (no structured sparsity). Where a device has tensor cores for a type, the rate is theirs: float64 on
A100, H100, H200 and B200.
"""

import os
import time
from dataclasses import dataclass

import torch

from slicegpt.errors import SliceGPTError


@dataclass(frozen=True)
class DevicePeaks:
    """fp64, fp32, half (fp16 or bf16, summed in float32): TFLOP/s; int8: TOPS; bandwidth: GB/s; memory: GiB.

    multiprocessors: those that are enabled; 0 of a CPU.
    """

    name: str
    capability: tuple[int, int] | None
    fp64: float
    fp32: float
    half: float
    int8: float
    bandwidth: float
    memory: float
    source: str
    multiprocessors: int = 0


_NVIDIA = "https://www.nvidia.com/content/dam/en-zz/Solutions"
_IMAGES = "https://images.nvidia.com/aem-dam"
SOURCES = {
    "B200": "NVIDIA HGX B200 data sheet, 2024",
    "H200": "NVIDIA H200 data sheet 3002446, SXM, 2023, "
    "https://nvdam.widen.net/s/nb5zzzsjdf/hpc-datasheet-sc23-h200-datasheet-3002446",
    "H100 SXM": "NVIDIA H100 data sheet 2430615, SXM5, 2023, "
    "https://resources.nvidia.com/en-us-tensor-core/nvidia-tensor-core-gpu-datasheet",
    "A100 80GB": "NVIDIA A100 80GB data sheet 1758950, SXM4, 2021, "
    f"{_NVIDIA}/Data-Center/a100/pdf/nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf",
    "A100 40GB": "NVIDIA A100 architecture white paper, 2020, "
    f"{_IMAGES}/en-zz/Solutions/data-center/nvidia-ampere-architecture-whitepaper.pdf",
    "RTX 4090": "NVIDIA Ada architecture white paper, 2022, "
    f"{_IMAGES}/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf",
    "Quadro RTX 6000": "NVIDIA Turing architecture white paper, 2018, "
    f"{_IMAGES}/en-zz/Solutions/design-visualization/technologies/turing-architecture/"
    "NVIDIA-Turing-Architecture-Whitepaper.pdf",
}


def _listed(name: str, capability: tuple[int, int], multiprocessors: int, *peaks: float) -> DevicePeaks:
    return DevicePeaks(name, capability, *peaks, SOURCES[name], multiprocessors)


DEVICES = (
    _listed("B200", (10, 0), 148, 40, 80, 2250, 4500, 8000, 180),
    _listed("H200", (9, 0), 132, 66.9, 66.9, 989.4, 1979, 4800, 140),
    _listed("H100 SXM", (9, 0), 132, 66.9, 66.9, 989.4, 1979, 3350, 80),
    _listed("A100 80GB", (8, 0), 108, 19.5, 19.5, 312, 624, 2039, 80),
    _listed("A100 40GB", (8, 0), 108, 19.5, 19.5, 312, 624, 1555, 40),
    _listed("RTX 4090", (8, 9), 128, 1.29, 82.6, 165.2, 660.6, 1008, 24),
    _listed("Quadro RTX 6000", (7, 5), 72, 0.51, 16.3, 130.5, 261, 672, 24),
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


# Short names for the command line.
ALIASES = {
    "b200": "B200",
    "h200": "H200",
    "h100": "H100 SXM",
    "a100-80": "A100 80GB",
    "a100-40": "A100 40GB",
    "rtx-4090": "RTX 4090",
    "rtx-6000": "Quadro RTX 6000",
}


def device_named(name: str) -> DevicePeaks:
    """The peaks of a device by name or alias."""
    for device in DEVICES:
        if device.name == ALIASES.get(name.lower(), name):
            return device
    raise SliceGPTError(f"--device: must be one of {', '.join(ALIASES)} or cpu, got {name!r}")


def device_of_product(product: str) -> DevicePeaks | None:
    """The peaks for CUDA's name of a device, such as "NVIDIA A100-SXM4-80GB"; None if it is not listed."""
    for parts, name in _PRODUCT_NAMES:
        if all(part in product for part in parts):
            return device_named(name)
    return None


def current_device(device: torch.device | None = None) -> DevicePeaks | None:
    """Peaks of `device` (default: the current CUDA device), None if not listed; of a CPU, or without CUDA, measured."""
    if torch.cuda.is_available() if device is None else device.type == "cuda":
        return device_of_product(torch.cuda.get_device_name(device))
    return measured_cpu(half=torch.bfloat16)


def measured_cpu(
    size: int = 2048, copy_bytes: int = 1 << 28, half: torch.dtype = torch.float32
) -> DevicePeaks:
    """Peaks of this CPU, best of three: square products for the rates; for the bandwidth a copy (bytes read and
    written) or a matrix-vector product (bytes read), whichever is higher: some CPUs read faster than they write.

    Args:
        half: dtype whose rate `DevicePeaks.half` is. A CPU without instructions for it can be slow at half
            precision, so the products are smaller; float32 takes the float32 rate.
    """

    def rate(dtype: torch.dtype, size: int) -> float:
        a = torch.randn(size, size).to(dtype)
        return 2 * size**3 / _best_seconds(lambda: a @ a) / 1e12

    peaks = {dtype: rate(dtype, size) for dtype in (torch.float64, torch.float32)}
    if half not in peaks:
        peaks[half] = max(rate(half, size // 2), peaks[torch.float32])  # products may be computed in float32
    source = torch.ones(copy_bytes // 4)
    target = torch.empty_like(source)
    matrix, vector = source.view(-1, 1 << 13), torch.ones(1 << 13)
    copied = 2 * copy_bytes / _best_seconds(lambda: target.copy_(source)) / 1e9
    read = copy_bytes / _best_seconds(lambda: matrix @ vector) / 1e9
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    threads = torch.get_num_threads()
    measured = f"measured with {threads} thread{'s' if threads > 1 else ''}"
    rates = (peaks[torch.float64], peaks[torch.float32], peaks[half], 0.0)
    return DevicePeaks("this CPU", None, *rates, max(copied, read), memory, measured)


def _best_seconds(function) -> float:
    times = []
    for _ in range(4):  # the first call warms up
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times[1:])
