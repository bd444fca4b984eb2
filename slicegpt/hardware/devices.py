"""Facts about device classes that decide between implementations; `bench/models/devices.py` has more of them."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from slicegpt.errors import SliceGPTError
from slicegpt.modeling.wide_products import has_halves

# Compute capabilities with double-precision tensor cores at half of the float32 rate or more. sm_86, 89,
# 103 and 120 compute in float64 at 1/64 of it.
FP64_TENSOR_CORES = frozenset({(8, 0), (9, 0), (10, 0)})


@dataclass(frozen=True)
class Rates:
    """Peak rates of a device class: dense, on tensor cores where they exist."""

    fp64_tflops: float
    int8_tops: float
    bandwidth_tbs: float


RATES = {
    (7, 5): Rates(0.51, 261, 0.672),  # Quadro RTX 6000
    (8, 0): Rates(19.5, 624, 2.039),  # A100 80 GB SXM
    (8, 6): Rates(0.56, 285, 0.936),  # RTX 3090
    (8, 9): Rates(1.29, 660.6, 1.008),  # RTX 4090
    (9, 0): Rates(66.9, 1979, 3.35),  # H100 SXM; an H200 differs in bandwidth alone
    (10, 0): Rates(40, 4500, 8.0),  # B200
    (12, 0): Rates(1.64, 838, 1.792),  # RTX 5090
}
# A device unknown here is most likely one without float64 units.
UNKNOWN = RATES[8, 9]


def find_device(device: str | torch.device | None = "auto") -> torch.device:
    """The torch device that is meant: None and "auto" take the first GPU where there is one.

    Raises:
        SliceGPTError: no such device, or none on this machine.
    """
    if device is None or device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise SliceGPTError(f"expected cpu or cuda[:N], got {device!r}", "device") from error
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise SliceGPTError(
            f"{device} is not there; this machine has {torch.cuda.device_count()} CUDA devices", "device"
        )
    return found


def find_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """The floating torch dtype that is meant ("bfloat16", `torch.bfloat16`); None for None and "auto".

    Raises:
        SliceGPTError: no such dtype.
    """
    if dtype is None or dtype == "auto":
        return None
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise SliceGPTError(f"must be a floating dtype such as float16, got {dtype!r}", "dtype")
    return found


def rates_of(capability: tuple[int, int]) -> Rates:
    return RATES.get(capability, UNKNOWN)


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether matrix products in bfloat16 are faster there than in float32: tensor cores, AMX or AVX512-BF16."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and has_halves(torch.bfloat16)


_WITHOUT_PLANS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def kernels_for_new_shapes(device: torch.device) -> AbstractContextManager:
    """Within it, PyTorch's attention on a GPU goes without cuDNN.

    PyTorch takes cuDNN first from compute capability 9.0 on. It builds a plan for every new shape, which costs tens of
    milliseconds and more: nearly every prompt has a new one, and a growing cache with every token.
    """
    return sdpa_kernel(_WITHOUT_PLANS) if device.type == "cuda" else nullcontext()
