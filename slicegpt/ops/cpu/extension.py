"""The compiled module `slicegpt._cpu`: whether it is there, what was built, its instruction sets and its threads.

The kernels run on the threads of the OpenMP runtime that torch has loaded (`torch.set_num_threads` governs them).
SLICEGPT_CPU_ISA=amx, avx512_bf16, avx512, avx2 or portable, read when this file is imported, names the instruction set
instead of the best one here; none leaves the kernels out.
"""

import importlib.util
import logging
import os
import sys
from types import ModuleType

import torch
from torch import Tensor

from slicegpt.errors import SliceGPTError

ISA_VARIABLE = "SLICEGPT_CPU_ISA"

# `slicegpt._cpu`, or None.
module: ModuleType | None = None
_import_error: str | None = None
if os.environ.get(ISA_VARIABLE) != "none" and importlib.util.find_spec("slicegpt._cpu"):
    try:
        from slicegpt import _cpu as module
    except ImportError as error:
        _import_error = str(error)


def use_instruction_set(name: str | None = None) -> str:
    """Make the kernels use this instruction set, or the best one where not given; returns the name of the last one."""
    require(ISA_VARIABLE)
    before, known = module.instruction_set(), module.instruction_sets()
    if name is not None and name not in known:
        raise SliceGPTError(
            f"{ISA_VARIABLE} must be none or one of {', '.join(known)} on this processor, got {name!r}"
        )
    module.use(name or known[0])
    return before


def instruction_sets() -> list[str]:
    """Those of this processor that the kernels were compiled for, the fastest first; none without the kernels."""
    return [] if module is None else module.instruction_sets()


def why_not() -> str | None:
    """Why the kernels cannot run here, in one line; None if they can."""
    if module is not None:
        return None
    if os.environ.get(ISA_VARIABLE) == "none":
        return f"{ISA_VARIABLE}=none"
    if _import_error:
        return f"slicegpt._cpu does not load: {_import_error}"
    return "slicegpt was installed without its CPU part (no C++ compiler was found, or SLICEGPT_CPU=0)"


_told = False


def warn_if_missing() -> None:
    """One warning in a process, where an operator on a CPU would have taken the kernels and they are not there.

    Nothing is said to those who left them out with SLICEGPT_CPU_ISA=none, nor off Linux, where there are none.
    """
    global _told
    if module is not None or _told or os.environ.get(ISA_VARIABLE) == "none" or sys.platform != "linux":
        return
    _told = True
    remedy = (
        "" if _import_error else "; install g++ (apt install g++, dnf install gcc-c++) and slicegpt again"
    )
    logging.getLogger("slicegpt").warning(
        "running without the CPU's kernels, slower: %s%s", why_not(), remedy
    )


def is_available() -> bool:
    """Whether the CPU part is built and loads."""
    return module is not None


def require(op: str) -> None:
    """Raises where `slicegpt._cpu` is missing."""
    if module is None:
        raise SliceGPTError(f"{op}: the CPU kernels are not available: {why_not()}")


def build_info() -> dict[str, str]:
    """For `slicegpt env`: what was built, and the instruction set in use; or why there is nothing."""
    if module is None:
        return {"cpu part": why_not() or ""}
    return {
        "cpu part": f"slicegpt._cpu {module.version()}, compiler {module.compiler()}",
        "instruction set": f"{module.instruction_set()} (of {', '.join(module.instruction_sets())})",
        "openmp": module.openmp_library(),
    }


def threads_for(work: int, work_of_a_thread: int) -> int:
    """Threads for an operation: no more than torch's, and each with so much work that waking it pays."""
    return max(1, min(torch.get_num_threads(), work // work_of_a_thread))


def address(tensor: Tensor | None) -> int:
    """0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


if module is not None and os.environ.get(ISA_VARIABLE):
    use_instruction_set(os.environ[ISA_VARIABLE])
