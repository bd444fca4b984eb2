"""`C += Aᵀ diag(weight) B` with float64 accumulation: portable, upcast in registers, deterministic.

The product of `gram_fp64` for two different operands, so there is no triangle to save.
"""

import triton
import triton.language as tl
from torch import Tensor

from slicegpt.hardware.devices import FP64_TENSOR_CORES
from slicegpt.kernels.gram_fp64 import GramConfig, device_of, is_supported, load_tokens

__all__ = ["cross_gram", "cross_gram_config", "is_supported"]


def cross_gram_config(
    capability: tuple[int, int],
    tokens: int,
    rows: int,
    columns: int,
    multiprocessors: int,
    fast: bool = False,
) -> GramConfig:
    """Tiles and splits by the rules of `gram_config`, over all tiles of C [rows, columns]."""
    block = 64
    tiles = triton.cdiv(rows, block) * triton.cdiv(columns, block)
    splits = max(1, min(4 * multiprocessors // tiles, tokens // 512))
    num_warps = 4 if fast or capability in FP64_TENSOR_CORES else 8
    return GramConfig(block, block_k=32 if fast else 16, num_warps=num_warps, splits=splits)


def cross_gram(
    C: Tensor,
    A: Tensor,
    B: Tensor,
    weight: Tensor | None = None,
    fast: bool = False,
    config: GramConfig | None = None,
) -> None:
    """Add `Aᵀ diag(weight) B` to C [K, D] (float64, contiguous); A [N, K] and B [N, D] may have any strides.

    weight: float64 [N], contiguous. fast: multiply in the operands' precision (weights are rounded to it).
    """
    tokens, rows, columns = A.shape[0], A.shape[1], B.shape[1]
    if tokens == 0 or rows == 0 or columns == 0:
        return
    if config is None:
        capability, multiprocessors = device_of(A)
        config = cross_gram_config(capability, tokens, rows, columns, multiprocessors, fast)
    grid = (triton.cdiv(rows, config.block), triton.cdiv(columns, config.block))
    tokens_a_split = triton.cdiv(triton.cdiv(tokens, config.splits), config.block_k) * config.block_k
    partials = C.new_empty((config.splits, rows, columns))
    _cross_product[(*grid, config.splits)](
        A,
        B,
        weight,
        partials,
        tokens,
        rows,
        columns,
        A.stride(0),
        A.stride(1),
        B.stride(0),
        B.stride(1),
        tokens_a_split,
        FAST=fast,
        BLOCK=config.block,
        BLOCK_K=config.block_k,
        num_warps=config.num_warps,
        enable_fp_fusion=True,
    )
    _add_partials[grid](
        C, partials, rows, columns, config.splits, BLOCK=config.block, num_warps=4, enable_fp_fusion=True
    )


@triton.jit
def _cross_product(
    A, B, weight, partials, tokens, a_columns, b_columns, a_stride_token, a_stride_column, b_stride_token,
    b_stride_column, tokens_a_split, FAST: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(2)
    start = split * tokens_a_split
    stop = tl.minimum(start + tokens_a_split, tokens)
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)

    # Loaded one step ahead and carried as float64, for the reasons given in gram_fp64.
    acc = tl.zeros((BLOCK, BLOCK), dtype=tl.float64)
    a = load_tokens(
        A, weight, start, stop, rows, a_columns, a_stride_token, a_stride_column, False, FAST, BLOCK_K
    )
    b = load_tokens(
        B, weight, start, stop, cols, b_columns, b_stride_token, b_stride_column, True, FAST, BLOCK_K
    )
    for step in range(BLOCK_K, tokens_a_split + BLOCK_K, BLOCK_K):
        k = start + step
        if FAST:
            acc += tl.dot(tl.trans(a), b, out_dtype=tl.float32).to(tl.float64)
        else:
            acc = tl.dot(tl.trans(a), b, acc, out_dtype=tl.float64)
        a = load_tokens(
            A, weight, k, stop, rows, a_columns, a_stride_token, a_stride_column, False, FAST, BLOCK_K
        )
        b = load_tokens(
            B, weight, k, stop, cols, b_columns, b_stride_token, b_stride_column, True, FAST, BLOCK_K
        )

    inside = (rows < a_columns)[:, None] & (cols < b_columns)[None, :]
    offset = (split.to(tl.int64) * a_columns + rows.to(tl.int64)[:, None]) * b_columns + cols[None, :]
    tl.store(partials + offset, acc, mask=inside)


@triton.jit
def _add_partials(C, partials, a_columns, b_columns, splits, BLOCK: tl.constexpr):
    """Add the splits' sums to C in a fixed order; infinities become NaN."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (rows < a_columns)[:, None] & (cols < b_columns)[None, :]
    offsets = rows.to(tl.int64)[:, None] * b_columns + cols[None, :]
    total = tl.load(C + offsets, mask=inside, other=0.0)
    source = partials + offsets
    stride = tl.cast(a_columns, tl.int64) * b_columns  # an argument of 1 is a number of Python
    for _ in range(splits):
        total += tl.load(source, mask=inside, other=0.0)
        source += stride
    # x - x is 0 for every finite x and NaN for infinities and NaNs.
    tl.store(C + offsets, tl.where(total - total == 0.0, total, float("nan")), mask=inside)
