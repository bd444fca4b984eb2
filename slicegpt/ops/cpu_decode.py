"""`norm_linear` and `rotate_add` on a CPU: kernels that read every byte of the weights once for few rows, and with
matrix tiles (AMX, bfloat16) for any number.

Arguments and results are those of `slicegpt.ops`; the tensors are validated. The kernels run on the threads of the
OpenMP runtime that torch has loaded (`torch.set_num_threads` governs them), sum in float32 and round once, when they
store; instructions for bfloat16 take numbers below 2^-126 for 0. The same call gives the same bits, whatever the number
of threads. SLICEGPT_CPU_ISA=amx, avx512_bf16, avx512, avx2 or portable, read when this module is imported, names the
instruction set instead of the best one here; none leaves the kernels out.
"""

import importlib.util
import os
import sys
from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

from slicegpt.errors import SliceGPTError
from slicegpt.ops.reference import GATED, norm_linear_output, rotate_add_outputs

# The orders are csrc/cpu/decode.h's `Dtype` and `Activation`.
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "silu")

# Up to so many rows the kernels are faster than torch's library: with 32 rows a decode step of SmolLM2-135M takes 70 ms
# in float32, 62 in bfloat16 (two threads of an AMD EPYC), with the library 142 and 72; with 64 rows in bfloat16 it is
# 114 against 107.
MOST_ROWS = 32
# In float32 that library is MKL, which on other processors than Intel's takes many more rows to be fast: [rows, 576] x
# [576, 3072] there at 150 GFLOP/s here against 127 with 64 rows, 147 against 164 with 256; and a step is one call here.
MOST_ROWS_BESIDE_FOREIGN_MKL = 256
# In bfloat16 with matrix tiles (AMX): with any number that was measured, 4 to 512 rows in 0.55 to 0.9 of the time of
# unfused torch (medians, bench/results/cpu/rotation.json).
MOST_ROWS_IN_TILES = sys.maxsize
# Where the library has them and these kernels do not: measured with one thread at [rows, 2048] x [2048, 11008], 5.5 ms
# against 4.9 here with 4 rows, 5.3 against 6.6 with 8.
MOST_ROWS_BESIDE_AMX = 4

# Bytes of weights that are worth waking a second thread: reading them takes one thread longer than that.
BYTES_PER_THREAD = 1 << 15

ISA_VARIABLE = "SLICEGPT_CPU_ISA"

_cpu: ModuleType | None = None
_import_error: str | None = None
if os.environ.get(ISA_VARIABLE) != "none" and importlib.util.find_spec("slicegpt._cpu"):
    try:
        from slicegpt import _cpu
    except ImportError as error:
        _import_error = str(error)
_DTYPE = {dtype: index for index, dtype in enumerate(DTYPES)}
_ACTIVATION = {name: index for index, name in enumerate(ACTIVATIONS)} | {
    name: ACTIVATIONS.index(name.removesuffix("_gated")) for name in GATED
}


def use_instruction_set(name: str | None = None) -> str:
    """Make the kernels use this instruction set, or the best one where not given; returns the name of the last one."""
    require(ISA_VARIABLE)
    before, known = _cpu.instruction_set(), _cpu.instruction_sets()
    if name is not None and name not in known:
        raise SliceGPTError(
            f"{ISA_VARIABLE} must be none or one of {', '.join(known)} on this processor, got {name!r}"
        )
    _cpu.use(name or known[0])
    return before


def why_not() -> str | None:
    """Why the kernels cannot run here, in one line; None if they can."""
    if _cpu is not None:
        return None
    if os.environ.get(ISA_VARIABLE) == "none":
        return f"{ISA_VARIABLE}=none"
    if _import_error:
        return f"slicegpt._cpu does not load: {_import_error}"
    return "slicegpt was installed without its CPU part (no C++ compiler was found, or SLICEGPT_CPU=0)"


def require(op: str) -> None:
    """Raises where `slicegpt._cpu` is missing."""
    if _cpu is None:
        raise SliceGPTError(f"{op}: the CPU kernels are not available: {why_not()}")


def build_info() -> dict[str, str]:
    """For `slicegpt env`: what was built, and the instruction set in use; or why there is nothing."""
    if _cpu is None:
        return {"cpu part": why_not() or ""}
    return {
        "cpu part": f"slicegpt._cpu {_cpu.version()}, compiler {_cpu.compiler()}",
        "instruction set": f"{_cpu.instruction_set()} (of {', '.join(_cpu.instruction_sets())})",
        "openmp": _cpu.openmp_library(),
    }


def is_supported(capability: tuple[int, int] | None, dtype: torch.dtype, tokens: int = 1) -> bool:
    """Whether the kernels are built and to be taken for `tokens` rows of this dtype; capability None: a CPU."""
    if _cpu is None or capability is not None or dtype not in _DTYPE:
        return False
    return 0 <= tokens <= most_rows(dtype)


def most_rows(dtype: torch.dtype) -> int:
    """Up to how many rows the kernels are faster than torch's library on this processor."""
    if dtype is torch.bfloat16 and _has_tiles():
        return MOST_ROWS_IN_TILES
    if dtype is torch.bfloat16 and _torch_has_amx():
        return MOST_ROWS_BESIDE_AMX
    return MOST_ROWS_BESIDE_FOREIGN_MKL if dtype is torch.float32 and _has_foreign_mkl() else MOST_ROWS


def rows_text(limit: int) -> str:
    """A limit of `most_rows` in words: at most 32 rows."""
    return "any number of rows" if limit == MOST_ROWS_IN_TILES else f"at most {limit} rows"


@lru_cache
def _has_foreign_mkl() -> bool:
    return torch.backends.mkl.is_available() and _cpu is not None and not _cpu.is_intel()


def _has_tiles() -> bool:
    return _cpu is not None and _cpu.instruction_set() == "amx"


@lru_cache
def _torch_has_amx() -> bool:
    # Not a public function of torch: without it, as on a processor that has no such tiles.
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)())


def norm_linear(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    sumsq: Tensor | None,
    n_scaled: int,
    activation: str,
    divisor: float,
    eps: float,
) -> Tensor:
    """See `slicegpt.ops.norm_linear`."""
    y = norm_linear_output(h, weight, n_scaled, activation)
    if y.numel() == 0:
        return y
    arguments = norm_linear_arguments(h, weight, bias, sumsq, y, n_scaled, activation, divisor, eps)
    _cpu.norm_linear(_DTYPE[h.dtype], arguments, threads_for(weight.nbytes))
    return y


def rotate_add(
    a: Tensor, weight: Tensor, h: Tensor, shortcut: Tensor | None = None, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See `slicegpt.ops.rotate_add`."""
    h_next, sumsq = rotate_add_outputs(a, weight)
    if h_next.numel() == 0:
        return h_next, sumsq
    arguments = rotate_add_arguments(a, weight, h, shortcut, bias, h_next, sumsq)
    size = weight.nbytes + (0 if shortcut is None else shortcut.nbytes)
    _cpu.rotate_add(_DTYPE[a.dtype], arguments, threads_for(size))
    return h_next, sumsq


def finish(dtype: torch.dtype, arguments, product: Tensor) -> None:
    """`norm_linear` (its `norm_linear_arguments`) behind the product h Wᵀ [T, N]; without gates y may be `product`."""
    threads = threads_for(product.nbytes)
    _cpu.finish(_DTYPE[dtype], arguments, product.data_ptr(), product.stride(0), threads)


def row_sums(dtype: torch.dtype, arguments, h_next: Tensor) -> None:
    """`rotate_add`'s sums of squares (its `rotate_add_arguments`) where `h_next` is there."""
    _cpu.row_sums(_DTYPE[dtype], arguments, threads_for(h_next.nbytes))


def norm_linear_arguments(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    sumsq: Tensor | None,
    y: Tensor,
    n_scaled: int,
    activation: str,
    divisor: float,
    eps: float,
):
    """csrc/cpu/decode.h's `NormLinear`: it holds addresses, so the tensors must outlive it."""
    return _cpu.NormLinear(
        h.data_ptr(),
        h.stride(0),
        weight.data_ptr(),
        weight.stride(0),
        address(bias),
        address(sumsq),
        0 if sumsq is None else sumsq.shape[1],
        y.data_ptr(),
        y.stride(0),
        h.shape[0],
        h.shape[1],
        weight.shape[0],
        n_scaled,
        _ACTIVATION[activation],
        activation in GATED,
        divisor,
        eps,
    )


def rotate_add_arguments(
    a: Tensor,
    weight: Tensor,
    h: Tensor,
    shortcut: Tensor | None,
    bias: Tensor | None,
    h_next: Tensor,
    sumsq: Tensor | None,
):
    """csrc/cpu/decode.h's `RotateAdd`: it holds addresses, so the tensors must outlive it."""
    return _cpu.RotateAdd(
        a.data_ptr(),
        a.stride(0),
        weight.data_ptr(),
        weight.stride(0),
        h.data_ptr(),
        h.stride(0),
        address(shortcut),
        0 if shortcut is None else shortcut.stride(0),
        address(bias),
        h_next.data_ptr(),
        h_next.stride(0),
        address(sumsq),
        a.shape[0],
        a.shape[1],
        h.shape[1],
        weight.shape[0],
    )


def attention_arguments(
    rows: Tensor,
    keys: Tensor,
    values: Tensor,
    valid: Tensor,
    rotary: Tensor | None,
    norm: Tensor | None,
    norm_eps: float,
    heads: int,
):
    """csrc/cpu/decode.h's `Attention`, for a step: keys and values [batch, key heads, capacity, head_dim]."""
    batch, key_heads, _, head_dim = keys.shape
    return _cpu.Attention(
        rows=rows.data_ptr(),
        rows_stride=rows.stride(0),
        keys=keys.data_ptr(),
        values=values.data_ptr(),
        batch_stride=keys.stride(0),
        head_stride=keys.stride(1),
        valid=0,
        valid_stride=valid.stride(0),
        rotary=address(rotary),
        positions=0,
        norm=address(norm),
        norm_eps=norm_eps,
        batch=batch,
        heads=heads,
        key_heads=key_heads,
        head_dim=head_dim,
        rotary_dim=0 if rotary is None else rotary.shape[2],
        first=0,
        slot=0,
    )


def new_step(dtype: torch.dtype):
    """csrc/cpu/step.h's `Step`, without blocks."""
    require("decode step")
    return _cpu.Step(_DTYPE[dtype])


def threads_for(size: int) -> int:
    """Threads for an operation that reads so many bytes of weights."""
    return max(1, min(torch.get_num_threads(), size // BYTES_PER_THREAD))


def address(tensor: Tensor | None) -> int:
    """0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


if _cpu is not None and os.environ.get(ISA_VARIABLE):
    use_instruction_set(os.environ[ISA_VARIABLE])
