"""`norm_linear`: a GEMM whose epilogue is the weightless RMS norm (a row scale), bias and activation.

Persistent: one program a processor walks over output tiles, and its loads for the next tile start before the last
one is stored. The output has two segments, the block's inputs and the z columns of a compact shortcut. Tiles begin
where segments begin, so that a tile is of one kind. A gated tile multiplies the rows of gate and up at once, into two
accumulators; a z tile of a gated launch uses both for its own columns.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from slicegpt.kernels.gemm_config import GemmConfig, norm_linear_config
from slicegpt.kernels.gemm_tiles import (
    activate,
    device_class,
    halves,
    is_supported,
    load_tile,
    multiply,
    operand,
    takes_tma,
    tile_position,
)
from slicegpt.ops.contracts import NormLinearInputs

__all__ = ["is_supported", "norm_linear"]

# Up to so many rows, and sums a row, every tile adds up its rows' sums itself: the launch saved takes longer.
SUM_IN_TILE_ROWS = 256
SUM_IN_TILE_PARTS = 512
SUM_CHUNK = tl.constexpr(32)


def norm_linear(
    inputs: NormLinearInputs, config: GemmConfig | None = None, out: Tensor | None = None
) -> Tensor:
    """`[act(s (h W₁ᵀ) + bias) | h W₂ᵀ]`; the contract is `slicegpt.ops.norm_linear`, whose checks have passed.

    h [T, d] has unit column stride; weight [N, d], bias [n_scaled] and sumsq [T, P] are contiguous.
    config: None chooses by the device and the sizes. out: where the result goes, unit column stride; None allocates.
    """
    h, weight, bias, sumsq, n_scaled = inputs.h, inputs.weight, inputs.bias, inputs.sumsq, inputs.n_scaled
    divisor, eps, gated = inputs.divisor, inputs.eps, inputs.gated
    rows, inner = h.shape
    width = n_scaled // 2 if gated else n_scaled
    z_columns = weight.shape[0] - n_scaled
    z_half = triton.cdiv(z_columns, 2)
    out = inputs.output() if out is None else out
    if out.numel() == 0:
        return out
    device = device_class(h.device)
    if config is None:
        config = norm_linear_config(device, h.dtype, rows, weight.shape[0], inner, gated)
    tma = config.tma and takes_tma(h, weight) and not (gated and z_columns % 2)
    sums, parts, chunks = None, 0 if sumsq is None else sumsq.shape[1], 0
    if n_scaled and rows <= SUM_IN_TILE_ROWS and 0 < parts <= SUM_IN_TILE_PARTS:
        sums, chunks = sumsq, triton.cdiv(parts, SUM_CHUNK.value)
    elif n_scaled:
        sums = row_scale(h, sumsq, divisor, eps)
    block_n, block_k = config.block_n, config.block_k
    if gated and tma:
        z = _pairs(weight[n_scaled:], block_n, block_k) if z_columns else None
        scaled = _pairs(weight[:n_scaled], block_n, block_k) if n_scaled else z
    else:
        scaled, z = operand(weight, (block_n, block_k), tma), None
    step = block_n // 2 if gated else block_n
    column_tiles = triton.cdiv(width, step) + triton.cdiv(z_half if gated else z_columns, step)
    tiles = triton.cdiv(rows, config.block_m) * column_tiles
    _norm_linear[(min(tiles, device.multiprocessors * config.programs_per_sm),)](
        operand(h, (config.block_m, block_k), tma), scaled, z, bias, sums, out,
        rows, inner, n_scaled, width, z_columns, z_half, parts, divisor, eps,
        h.stride(0), weight.stride(0), out.stride(0),
        ACTIVATION=inputs.activation.removesuffix("_gated"), GATED=gated, HAS_Z=z_columns > 0, CHUNKS=chunks,
        TMA=tma, BLOCK_M=config.block_m, BLOCK_N=block_n, BLOCK_K=block_k, GROUP_M=config.group_m,
        num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=True,
    )  # fmt: skip
    return out


def _pairs(weight: Tensor, block_n: int, block_k: int) -> TensorDescriptor:
    """An even number of rows as [2, rows / 2, d]: half of a block from each."""
    half, inner = weight.shape[0] // 2, weight.shape[1]
    shape, strides = [2, half, inner], [half * weight.stride(0), weight.stride(0), 1]
    return TensorDescriptor(weight, shape, strides, [2, block_n // 2, block_k])


def row_scale(h: Tensor, sumsq: Tensor | None, divisor: float, eps: float) -> Tensor:
    """`rsqrt(|h|² / divisor + eps)`, float32 [T], from the sums of squares or from h itself."""
    source = h if sumsq is None else sumsq
    scale = torch.empty(h.shape[0], dtype=torch.float32, device=h.device)
    columns = source.shape[1]
    block = min(1024, triton.next_power_of_2(max(columns, 16)))
    rows = max(1, 2048 // block)
    _row_scale[(triton.cdiv(h.shape[0], rows),)](
        source, scale, h.shape[0], columns, source.stride(0), divisor, eps,
        SQUARE=sumsq is None, BLOCK_M=rows, BLOCK_N=block, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return scale


@triton.jit
def _row_scale(
    source, scale, rows, columns, stride, divisor, eps,
    SQUARE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, columns, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        inside = (index < rows)[:, None] & (column < columns)[None, :]
        pointers = source + index.to(tl.int64)[:, None] * stride + column[None, :]
        values = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
        total += values * values if SQUARE else values
    tl.store(scale + index, tl.rsqrt(tl.sum(total, axis=1) / divisor + eps), mask=index < rows)


@triton.jit
def _scale_of(sums, index, rows, parts, divisor, eps, CHUNKS: tl.constexpr, BLOCK_M: tl.constexpr):
    """The row scale of a tile: 1 where nothing is scaled, read, or from `parts` sums of squares a row."""
    present = index < rows
    if sums is None:
        return tl.full((BLOCK_M,), 1.0, dtype=tl.float32)
    elif CHUNKS == 0:
        return tl.load(sums + index, mask=present, other=0.0)
    else:
        return _scale_from_sums(sums, index, present, parts, divisor, eps, CHUNKS, BLOCK_M)


@triton.jit
def _scale_from_sums(sums, index, present, parts, divisor, eps, CHUNKS: tl.constexpr, BLOCK_M: tl.constexpr):
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    pointers = sums + index.to(tl.int64)[:, None] * parts + tl.arange(0, SUM_CHUNK)[None, :]
    for chunk in tl.static_range(CHUNKS):
        column = chunk * SUM_CHUNK + tl.arange(0, SUM_CHUNK)
        inside = present[:, None] & (column < parts)[None, :]
        total += tl.sum(tl.load(pointers + chunk * SUM_CHUNK, mask=inside, other=0.0), axis=1)
    return tl.rsqrt(total / divisor + eps)


@triton.jit
def _load_pairs(
    source, row, k, rows, inner, half, stride, ROWS: tl.constexpr, BLOCK_K: tl.constexpr, TMA: tl.constexpr
):
    """[ROWS, BLOCK_K] of a weight: half from `row` on, half from `half` rows further on. `row` counts in the view."""
    if TMA:
        tile = tl.reshape(source.load([0, row, k]), (ROWS, BLOCK_K))
    else:
        offset = tl.arange(0, ROWS)
        index = row + tl.where(offset < ROWS // 2, offset, offset - ROWS // 2 + half)
        column = k + tl.arange(0, BLOCK_K)
        pointers = source + index.to(tl.int64)[:, None] * stride + column[None, :]
        tile = tl.load(pointers, mask=(index < rows)[:, None] & (column < inner)[None, :], other=0.0)
    return tile


@triton.jit
def _scaled(acc, scale, bias, start, n_scaled, COLUMNS: tl.constexpr):
    """s · acc + bias, the bias from column `start` of the scaled segment on."""
    value = acc * scale
    if bias is not None:
        column = start + tl.arange(0, COLUMNS)
        value += tl.load(bias + column, mask=column < n_scaled, other=0.0).to(tl.float32)[None, :]
    return value


@triton.jit
def _put(out, value, index, rows, start, limit, stride, COLUMNS: tl.constexpr):
    """Store rows `index` of the output from column `start` on, up to `limit`."""
    column = start + tl.arange(0, COLUMNS)
    pointers = out + index.to(tl.int64)[:, None] * stride + column[None, :]
    tl.store(
        pointers, value.to(out.dtype.element_ty), mask=(index < rows)[:, None] & (column < limit)[None, :]
    )


@triton.jit
def _norm_linear(
    h, weight, z_weight, bias, sums, out, rows, inner, n_scaled, width, z_columns, z_half, parts, divisor, eps,
    stride_h, stride_weight, stride_out,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, HAS_Z: tl.constexpr, CHUNKS: tl.constexpr, TMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """width: output columns of the scaled segment, n_scaled or half of it. CHUNKS 0: `sums` holds the row scales.

    weight: all rows; for a gated launch with TMA the pairs of the scaled rows, and z_weight those of the others.
    """
    HALF: tl.constexpr = BLOCK_N // 2
    STEP: tl.constexpr = HALF if GATED else BLOCK_N  # columns from one tile to the next
    row_tiles = tl.cdiv(rows, BLOCK_M)
    scaled_tiles = tl.cdiv(width, STEP)
    column_tiles = scaled_tiles + tl.cdiv(z_half if GATED else z_columns, STEP)
    steps = tl.cdiv(inner, BLOCK_K)
    columns = n_scaled + z_columns
    for tile in tl.range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0), flatten=TMA):
        tile_m, tile_n = tile_position(tile, row_tiles, column_tiles, GROUP_M)
        row = tile_m * BLOCK_M
        is_z = tile_n >= scaled_tiles
        start = tl.where(is_z, tile_n - scaled_tiles, tile_n) * STEP  # within the segment
        half = tl.where(is_z, z_half, width)
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for step in range(steps):
            k = step * BLOCK_K
            x = load_tile(h, row, k, rows, inner, stride_h, BLOCK_M, BLOCK_K, TMA)
            if GATED:
                source, first = weight, start
                if TMA and z_weight is not None:  # noqa: SIM102 (known when compiling, unlike the tile)
                    if is_z:
                        source = z_weight
                if not TMA:
                    first = tl.where(is_z, n_scaled + start, start)
                w = _load_pairs(source, first, k, columns, inner, half, stride_weight, BLOCK_N, BLOCK_K, TMA)
            else:
                first = tl.where(is_z, n_scaled + start, start)
                w = load_tile(weight, first, k, columns, inner, stride_weight, BLOCK_N, BLOCK_K, TMA)
            acc = multiply(x, w, acc)

        index = row + tl.arange(0, BLOCK_M)
        scale = _scale_of(sums, index, rows, parts, divisor, eps, CHUNKS, BLOCK_M)[:, None]
        left, right = halves(acc, BLOCK_M, BLOCK_N)
        column = tl.where(is_z, width + start, start)
        if GATED:
            # Selected, not branched on: Triton 3.6 and 3.7 cannot flatten a loop that has an if with an else.
            value = activate(_scaled(left, scale, bias, start, n_scaled, HALF), ACTIVATION)
            value *= _scaled(right, scale, bias, width + start, n_scaled, HALF)
            limit = width + tl.where(is_z, z_half, 0)
            _put(out, tl.where(is_z, left, value), index, rows, column, limit, stride_out, HALF)
            if HAS_Z:
                limit = tl.where(is_z, width + z_columns, 0)  # a scaled tile has stored all that it has
                _put(out, right, index, rows, column + z_half, limit, stride_out, HALF)
        else:
            limit = width + tl.where(is_z, z_columns, 0)
            value = activate(_scaled(left, scale, bias, start, n_scaled, HALF), ACTIVATION)
            _put(out, tl.where(is_z, left, value), index, rows, column, limit, stride_out, HALF)
            value = activate(_scaled(right, scale, bias, start + HALF, n_scaled, HALF), ACTIVATION)
            _put(out, tl.where(is_z, right, value), index, rows, column + HALF, limit, stride_out, HALF)
