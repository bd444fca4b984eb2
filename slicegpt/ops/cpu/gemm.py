"""`norm_linear`, `rotate_add` and a step's attention on a CPU: kernels that read every byte of the weights once for few
rows, and with matrix tiles (AMX, bfloat16) for any number.

Arguments and results are those of `slicegpt.ops`; the tensors are validated. The kernels sum in float32 and round once,
when they store; instructions for bfloat16 take numbers below 2^-126 for 0. The same call gives the same bits, whatever
the number of threads.
"""

import sys
from functools import lru_cache

import torch
from torch import Tensor

from slicegpt.ops import contracts
from slicegpt.ops.contracts import NormLinearInputs, activation_code, dtype_code, rotate_add_outputs
from slicegpt.ops.cpu import extension
from slicegpt.ops.cpu.extension import address, threads_for
from slicegpt.ops.panels import PanelWeight

DTYPES = contracts.DTYPES[:3]

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
# Where a processor has nothing beyond AVX2 the library's bfloat16 products are slow: [256, 896] x [896, 2048] takes it
# 98 ms of one thread of an AMD EPYC 7003, and these kernels 18; with 64 rows 25 and 5.
MOST_ROWS_BESIDE_AVX2 = sys.maxsize
# Where the library has them and these kernels do not: measured with one thread at [rows, 2048] x [2048, 11008], 5.5 ms
# against 4.9 here with 4 rows, 5.3 against 6.6 with 8.
MOST_ROWS_BESIDE_AMX = 4

# Bytes of weights that are worth waking a second thread: reading them takes one thread longer than that.
BYTES_PER_THREAD = 1 << 15


def is_supported(capability: tuple[int, int] | None, dtype: torch.dtype, tokens: int = 1) -> bool:
    """Whether the kernels are built and to be taken for `tokens` rows of this dtype; capability None: a CPU."""
    if not extension.is_available() or capability is not None or dtype not in DTYPES:
        return False
    return 0 <= tokens <= most_rows(dtype)


def most_rows(dtype: torch.dtype) -> int:
    """Up to how many rows the kernels are faster than torch's library on this processor."""
    if dtype is torch.bfloat16 and _has_tiles():
        return MOST_ROWS_IN_TILES
    if dtype is torch.bfloat16 and _has_only_avx2():
        return MOST_ROWS_BESIDE_AVX2
    if dtype is torch.bfloat16 and _torch_has_amx():
        return MOST_ROWS_BESIDE_AMX
    return MOST_ROWS_BESIDE_FOREIGN_MKL if dtype is torch.float32 and _has_foreign_mkl() else MOST_ROWS


def rows_text(limit: int) -> str:
    """A limit of `most_rows` in words: at most 32 rows."""
    return "any number of rows" if limit == sys.maxsize else f"at most {limit} rows"


@lru_cache
def _has_foreign_mkl() -> bool:
    return torch.backends.mkl.is_available() and extension.is_available() and not extension.module.is_intel()


@lru_cache
def _has_only_avx2() -> bool:
    return extension.is_available() and extension.instruction_sets()[0] == "avx2"


def _has_tiles() -> bool:
    return extension.is_available() and extension.module.instruction_set() == "amx"


@lru_cache
def _torch_has_amx() -> bool:
    # Not a public function of torch: without it, as on a processor that has no such tiles.
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)())


def norm_linear(inputs: NormLinearInputs) -> Tensor:
    """See `slicegpt.ops.norm_linear`."""
    y = inputs.output()
    if y.numel() == 0:
        return y
    arguments = norm_linear_arguments(inputs, y)
    extension.module.norm_linear(dtype_code(inputs.h.dtype), arguments, _threads(inputs.weight.nbytes))
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
    extension.module.rotate_add(dtype_code(a.dtype), arguments, _threads(size))
    return h_next, sumsq


def finish(inputs: NormLinearInputs, y: Tensor, product: Tensor) -> None:
    """`norm_linear` after its product h Wᵀ [T, N], into y; without gates y may be `product`."""
    arguments, threads = norm_linear_arguments(inputs, y), _threads(product.nbytes)
    extension.module.finish(
        dtype_code(inputs.h.dtype), arguments, product.data_ptr(), product.stride(0), threads
    )


def row_sums(dtype: torch.dtype, arguments, h_next: Tensor) -> None:
    """`rotate_add`'s sums of squares (its `rotate_add_arguments`) where `h_next` is there."""
    extension.module.row_sums(dtype_code(dtype), arguments, _threads(h_next.nbytes))


def takes_panels(dtype: torch.dtype) -> bool:
    """Whether the kernels are built and multiply a `PanelWeight` with rows of this dtype, any number of them."""
    return extension.is_available() and dtype in DTYPES


def norm_linear_arguments(inputs: NormLinearInputs, y: Tensor):
    """csrc/cpu/decode.h's `NormLinear`: it holds addresses, so the tensors must outlive it."""
    h, weight, sumsq = inputs.h, inputs.weight, inputs.sumsq
    dense, quantized = _parts(weight)
    return extension.module.NormLinear(
        h.data_ptr(),
        h.stride(0),
        address(dense),
        0 if dense is None else dense.stride(0),
        address(inputs.bias),
        address(sumsq),
        0 if sumsq is None else sumsq.shape[1],
        y.data_ptr(),
        y.stride(0),
        h.shape[0],
        h.shape[1],
        weight.shape[0],
        inputs.n_scaled,
        activation_code(inputs.activation),
        inputs.gated,
        inputs.divisor,
        inputs.eps,
        *quantized,
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
    dense, quantized = _parts(weight)
    return extension.module.RotateAdd(
        a.data_ptr(),
        a.stride(0),
        address(dense),
        0 if dense is None else dense.stride(0),
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
        *quantized,
        *([weight.columns] if quantized else []),
    )


def _parts(weight: Tensor | PanelWeight):
    """The dense part of a weight, or None, and the arguments that say what the other one is; none for a tensor."""
    if not isinstance(weight, PanelWeight):
        return weight, ()
    quantized = extension.module.Quantized(
        weight.codes.data_ptr(),
        weight.scales.data_ptr(),
        address(weight.zeros),
        dtype_code(weight.scales.dtype),
        weight.bits,
        weight.codes.shape[1],
        weight.groups,
        weight.group_blocks,
    )
    return weight.rest, (quantized,)


def attention_arguments(
    rows: Tensor,
    keys: Tensor,
    values: Tensor,
    valid: Tensor,
    rotary: Tensor | None,
    norm: Tensor | None,
    norm_eps: float,
    rotate_first: bool,
    heads: int,
):
    """csrc/cpu/decode.h's `Attention`, for a step: keys and values [batch, key heads, capacity, head_dim]."""
    batch, key_heads, _, head_dim = keys.shape
    return extension.module.Attention(
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
        rotate_first=rotate_first,
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
    extension.require("decode step")
    return extension.module.Step(dtype_code(dtype))


def _threads(size: int) -> int:
    """Threads for an operation that reads so many bytes of weights."""
    return threads_for(size, BYTES_PER_THREAD)
