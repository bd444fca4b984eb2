"""The compiled module `slicegpt._C`: whether it can run here, what was built, and what its launchers share.

The launchers in this folder take validated tensors on one CUDA device, which need not be the current one, allocate with
torch, run on that device's current stream, never synchronise, and can be captured into a CUDA graph.
"""

import importlib.util
from types import ModuleType

import torch
from torch import Tensor

from slicegpt.errors import SliceGPTError

# `slicegpt._C`, or None.
module: ModuleType | None = None
_import_error: str | None = None
if importlib.util.find_spec("slicegpt._C"):
    try:
        from slicegpt import _C as module
    except ImportError as error:
        _import_error = str(error)


def why_not(capability: tuple[int, int] | None = None) -> str | None:
    """Why the CUDA kernels cannot run here, in one line; None if they can.

    capability: of the device that they shall run on; None: that of the current device.
    """
    if module is None:
        if _import_error:
            return f"slicegpt._C does not load: {_import_error}"
        return "slicegpt was installed without its CUDA part (nvcc was not found, or SLICEGPT_CUDA=0)"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    major, minor = capability or torch.cuda.get_device_capability()
    if not built_for((major, minor)):
        return f"slicegpt._C was built for {', '.join(module.architectures())}, but the device is sm_{major}{minor}"
    return None


def is_available(capability: tuple[int, int] | None = None) -> bool:
    """Whether the CUDA part is built, loads, and has code for this compute capability (None: the current device's)."""
    return why_not(capability) is None


def built_for(capability: tuple[int, int]) -> bool:
    """Whether `slicegpt._C` holds machine code or PTX that runs on this compute capability."""
    return module is not None and any(_runs_on(code, capability) for code in module.architectures())


def _runs_on(code: str, capability: tuple[int, int]) -> bool:
    """Machine code runs on its generation from its minor version on; PTX on everything newer; "a" on one chip."""
    kind, number = code.split("_")
    built = int(number.rstrip("af"))
    target = capability[0] * 10 + capability[1]
    if number.endswith("a"):
        return built == target
    if kind == "compute":
        return built <= target
    return built // 10 == target // 10 and built <= target


def build_info() -> dict[str, str]:
    """What was built, for `slicegpt env`: version, nvcc, architectures; or why there is nothing."""
    if module is None:
        return {"cuda part": why_not() or ""}
    return {
        "cuda part": f"slicegpt._C {module.version()}",
        "nvcc": module.nvcc_version(),
        "architectures": " ".join(module.architectures()),
        "usable": why_not() or "yes",
    }


def require(op: str) -> None:
    """Raises where `slicegpt._C` is missing."""
    if module is None:
        raise SliceGPTError(f"{op}: the CUDA backend is not available: {why_not()}")


def on_device(tensor: Tensor) -> torch.cuda.device:
    """Makes the tensor's device the current one."""
    return torch.cuda.device(tensor.device)


def current_stream(tensor: Tensor) -> int:
    """The handle of the current stream on the tensor's device."""
    return torch.cuda.current_stream(tensor.device).cuda_stream


def capturing(tensor: Tensor) -> bool:
    """Whether launches on the tensor's device go into a CUDA graph that is being captured."""
    if not tensor.is_cuda:
        return False
    with on_device(tensor):  # torch asks for the current device's stream
        return torch.cuda.is_current_stream_capturing()


def device_index(tensor: Tensor) -> int:
    """The number of the tensor's device."""
    return tensor.get_device()


def call(name: str, like: Tensor, *arguments):
    """A function of the module on the tensor's device, whichever is the current one: its answer."""
    return getattr(module, name)(device_index(like), *arguments)


def check_status(op: str, status: int) -> None:
    """Raises where a launcher did not return 0: a CUDA error (> 0), or csrc/types.h's `Status` (< 0)."""
    if status:
        raise SliceGPTError(f"{op}: the CUDA kernel failed: {module.error_string(status)}")


def address(tensor: Tensor | None) -> int:
    """0 for None."""
    return 0 if tensor is None else tensor.data_ptr()
