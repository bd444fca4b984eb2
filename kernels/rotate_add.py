"""`rotate_add`: a block's output projection, its shortcut, the residual sum and the next norm's sums of squares.

Persistent, as `norm_linear`. A dense shortcut is a second source of the same K loop: both sources' operands are read
by the same pipelined loads, whose descriptor (or pointer, stride and limits) is selected by the step. Two loops in a
row would drain the pipeline between them. Without a shortcut the stream itself is added in the epilogue.
"""

import triton
import triton.language as tl
from torch import Tensor

from slicegpt.kernels.gemm_config import GemmConfig, rotate_add_config
from slicegpt.kernels.gemm_tiles import (
    SUMSQ_COLUMNS,
    device_class,
    halves,
    is_supported,
    load_tile,
    multiply,
    operand,
    takes_tma,
    tile_position,
)
from slicegpt.ops.contracts import rotate_add_outputs

__all__ = ["is_supported", "rotate_add"]


def rotate_add(
    a: Tensor,
    weight: Tensor,
    h: Tensor,
    shortcut: Tensor | None,
    bias: Tensor | None,
    config: GemmConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """`h_next = a Wᵀ + h Sᵀ + bias` and its sums of squares; the contract is `slicegpt.ops.rotate_add`.

    a [T, K], h [T, d], weight [d', K] and shortcut [d', d] have unit column stride; bias [d'] is contiguous.
    config: None chooses by the device and the sizes.
    """
    rows, inner = a.shape
    columns, dense = weight.shape[0], shortcut is not None
    out, sumsq = rotate_add_outputs(a, weight)
    parts = sumsq.shape[1]
    if out.numel() == 0:
        return out, sumsq
    device = device_class(h.device)
    if config is None:
        config = rotate_add_config(device, h.dtype, rows, columns, inner + dense * h.shape[1], dense)
    tma = config.tma and takes_tma(a, weight, *((h, shortcut) if dense else ()))
    x_block, w_block = (config.block_m, config.block_k), (config.block_n, config.block_k)
    tiles = triton.cdiv(rows, config.block_m) * triton.cdiv(columns, config.block_n)
    _rotate_add[(min(tiles, device.multiprocessors * config.programs_per_sm),)](
        operand(a, x_block, tma), operand(weight, w_block, tma),
        operand(h, x_block, tma) if dense else None, operand(shortcut, w_block, tma),
        None if dense else h, bias, out, sumsq, rows, inner, h.shape[1], columns, parts,
        a.stride(0), weight.stride(0), h.stride(0), shortcut.stride(0) if dense else 0,
        TMA=tma, BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k, GROUP_M=config.group_m,
        num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=True,
    )  # fmt: skip
    return out, sumsq


@triton.jit
def _rotate_add(
    a, weight, stream, shortcut, residual, bias, out, sumsq, rows, inner, stream_columns, columns, parts,
    stride_a, stride_weight, stride_h, stride_shortcut,
    TMA: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """stream and shortcut: the second source, or None. residual: the stream to add, or None."""
    row_tiles = tl.cdiv(rows, BLOCK_M)
    column_tiles = tl.cdiv(columns, BLOCK_N)
    own_steps = tl.cdiv(inner, BLOCK_K)
    steps = own_steps
    if shortcut is not None:
        steps += tl.cdiv(stream_columns, BLOCK_K)
    for tile in tl.range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0), flatten=TMA):
        tile_m, tile_n = tile_position(tile, row_tiles, column_tiles, GROUP_M)
        row, first = tile_m * BLOCK_M, tile_n * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for step in range(steps):
            x_source, w_source, k, limit = a, weight, step * BLOCK_K, inner
            x_stride, w_stride = stride_a, stride_weight
            if shortcut is not None:  # noqa: SIM102 (known when compiling, unlike the step)
                if step >= own_steps:
                    x_source, w_source, k, limit = (
                        stream,
                        shortcut,
                        (step - own_steps) * BLOCK_K,
                        stream_columns,
                    )
                    x_stride, w_stride = stride_h, stride_shortcut
            x = load_tile(x_source, row, k, rows, limit, x_stride, BLOCK_M, BLOCK_K, TMA)
            w = load_tile(w_source, first, k, columns, limit, w_stride, BLOCK_N, BLOCK_K, TMA)
            acc = multiply(x, w, acc)

        index = row + tl.arange(0, BLOCK_M)
        if BLOCK_N == SUMSQ_COLUMNS:
            _store(
                acc, residual, bias, out, sumsq, index, first, rows, stream_columns, columns, parts, stride_h,
                BLOCK_M, BLOCK_N,
            )  # fmt: skip
        else:
            HALF: tl.constexpr = BLOCK_N // 2
            left, right = halves(acc, BLOCK_M, BLOCK_N)
            _store(
                left, residual, bias, out, sumsq, index, first, rows, stream_columns, columns, parts, stride_h,
                BLOCK_M, HALF,
            )  # fmt: skip
            _store(
                right, residual, bias, out, sumsq, index, first + HALF, rows, stream_columns, columns, parts, stride_h,
                BLOCK_M, HALF,
            )  # fmt: skip


@triton.jit
def _store(
    acc, residual, bias, out, sumsq, index, first, rows, stream_columns, columns, parts, stride_h,
    BLOCK_M: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Columns of a tile: bias, residual, the output from column `first` on, and its sums of squares."""
    column = first + tl.arange(0, COLUMNS)
    present = (index < rows)[:, None]
    if bias is not None:
        acc += tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    if residual is not None:
        pointers = residual + index.to(tl.int64)[:, None] * stride_h + column[None, :]
        inside = present & (column < stream_columns)[None, :]
        acc += tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
    value = acc.to(out.dtype.element_ty)
    # Columns beyond the last hold zeros: nothing was loaded for them.
    stored = value.to(tl.float32)
    squares = tl.reshape(stored * stored, (BLOCK_M, COLUMNS // SUMSQ_COLUMNS, SUMSQ_COLUMNS))
    part = first // SUMSQ_COLUMNS + tl.arange(0, COLUMNS // SUMSQ_COLUMNS)
    target = sumsq + index.to(tl.int64)[:, None] * parts + part[None, :]
    tl.store(target, tl.sum(squares, axis=2), mask=present & (part < parts)[None, :])
    target = out + index.to(tl.int64)[:, None] * columns + column[None, :]
    tl.store(target, value, mask=present & (column < columns)[None, :])
