"""What the fused GEMMs share: the order of tiles, operand tiles, products, activations, facts of the device."""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from slicegpt.kernels.gemm_config import DeviceClass
from slicegpt.ops import contracts

SUMSQ_COLUMNS = tl.constexpr(contracts.SUMSQ_COLUMNS)


def is_supported(capability: tuple[int, int], dtype: torch.dtype) -> bool:
    """Triton's tensor-core products start at sm_80; on sm_75 `tl.dot` becomes FMA, slower than cuBLAS."""
    return capability >= (8, 0) and dtype in (torch.float16, torch.bfloat16, torch.float32)


@lru_cache
def device_class(device: torch.device) -> DeviceClass:
    """Of a CUDA device; a CPU, where Triton's interpreter runs, stands for a Hopper GPU of two processors."""
    if device.type == "cpu":
        return DeviceClass((9, 0), multiprocessors=2, shared_bytes=232_448)
    properties = torch.cuda.get_device_properties(device)
    return DeviceClass(
        (properties.major, properties.minor),
        properties.multi_processor_count,
        properties.shared_memory_per_block_optin,
    )


def takes_tma(*operands: Tensor | None) -> bool:
    """Whether TMA can read these matrices: nothing empty, rows at multiples of 16 bytes."""
    return all(
        operand.numel() > 0
        and operand.stride(1) == 1
        and operand.data_ptr() % 16 == 0
        and operand.stride(0) * operand.element_size() % 16 == 0
        and operand.stride(0) >= operand.shape[1]
        for operand in operands
        if operand is not None
    )


def operand(matrix: Tensor | None, block: tuple[int, int], tma: bool) -> Tensor | TensorDescriptor | None:
    """The matrix as the kernels read it: a TMA descriptor, or a pointer."""
    if matrix is None or not tma:
        return matrix
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), list(block))


@triton.jit
def tile_position(tile, row_tiles, column_tiles, GROUP_M: tl.constexpr):
    """Row and column of a tile: `GROUP_M` rows of tiles pass over the weight together, which then comes from L2."""
    group_tiles = GROUP_M * column_tiles
    group = tile // group_tiles
    first = group * GROUP_M
    height = tl.minimum(row_tiles - first, GROUP_M)
    inside = tile - group * group_tiles
    return first + inside % height, inside // height


@triton.jit
def load_tile(
    source, row, k, rows, inner, stride, ROWS: tl.constexpr, BLOCK_K: tl.constexpr, TMA: tl.constexpr
):
    """[ROWS, BLOCK_K] of a matrix from (row, k) on; zeros outside of it."""
    if TMA:
        tile = source.load([row, k])
    else:
        index = row + tl.arange(0, ROWS)
        column = k + tl.arange(0, BLOCK_K)
        pointers = source + index.to(tl.int64)[:, None] * stride + column[None, :]
        tile = tl.load(pointers, mask=(index < rows)[:, None] & (column < inner)[None, :], other=0.0)
    return tile


@triton.jit
def multiply(x, w, acc):
    """acc + x wᵀ in float32; float32 operands are cut into three tf32 products, 2^-22 of each product away."""
    return tl.dot(x, w.T, acc, input_precision="tf32x3" if x.dtype == tl.float32 else "tf32")


@triton.jit
def halves(acc, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The left and the right half of the columns: two small epilogues need half of the registers and of the buffer."""
    return tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))


@triton.jit
def normal_cdf(x):
    """(1 + erf(x / sqrt(2))) / 2 by Abramowitz and Stegun 7.1.26: within 7.5e-8, with float32's roundings 3e-7.

    `tl.erf` chooses between two polynomials: holding both sets of coefficients for a whole tile spilled registers.
    """
    size = tl.abs(x)
    t = 1.0 / (1.0 + 0.23164190 * size)
    polynomial = t * (
        0.127414796 + t * (-0.142248368 + t * (0.7107068705 + t * (-0.7265760135 + t * 0.5307027145)))
    )
    tail = polynomial * tl.exp(-0.5 * size * size)
    return tl.where(x < 0.0, tail, 1.0 - tail)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """relu, gelu (erf), gelu_tanh, silu, relu2 or none of float32 values."""
    if ACTIVATION == "relu":
        return tl.where(x < 0.0, 0.0, x)  # keeps NaN, as torch does
    elif ACTIVATION == "gelu":
        return x * normal_cdf(x)
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh u) / 2 = sigmoid(2 u)
        return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACTIVATION == "silu":
        return x * tl.sigmoid(x)
    elif ACTIVATION == "relu2":
        return tl.where(x < 0.0, 0.0, x * x)
    else:
        return x
