"""`C += Xᵀ diag(weight) X` on int8 tensor cores (sm_80 on), exact up to the float64 sum over token chunks.

Within a chunk of tokens every column of X is an integer times a power of two, `x = 2^q n`. The integer Gram
matrix `nᵀn` is computed by the Chinese remainder theorem: `n` is reduced modulo pairwise coprime moduli of
at most 256, so that each residue is one int8 plane; each plane needs one triangular int8 product with an
exact int32 sum; and the residues of the result determine it, because enough moduli are taken that their
product exceeds twice any possible value. The idea is that of Ozaki scheme II (Ozaki, Uchino, Imamura,
arXiv 2504.08009), without its rounding of the inputs.

Why not digits: `s` digits of 7 bits need s(s+1)/2 products (squares trick), residues (14 s + log2 N) / 7.8.
    bits of n        24 (bf16 normal data)   27 (fp16)   40 (any fp16)   47 (fp32 normal data)
    digit products   10                      10          21              28
    residue products  8                       9          13              14
Those are typical columns; a tile takes the planes of its widest one: 10 of bf16, 9 of fp16 and 14 of fp32.
The squares trick also sums terms that cancel, which costs accuracy in float64; the residues need one sum.

The number of planes follows the measured span of each pair of column blocks. A tile that would need more
than the configured planes, or that meets infinities, NaNs or weights other than 0 and 1, is computed by the
float64 kernel. Everything is decided on the device: no synchronisation, and a CUDA graph replays on new
data.
"""

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from slicegpt.kernels import gram_fp64
from slicegpt.ops.lasting import made_to_last

MODULI = (256, 255, 253, 251, 247, 241, 239, 233, 229, 227, 223, 217, 211, 199, 197, 193)
POWERS = tl.constexpr(
    64
)  # the table of 2^shift mod m; shifts stay below 54, the most bits that 16 planes can carry
TABLE_ROWS = tl.constexpr(len(MODULI) + 1)
LIMBS = 4  # 32-bit limbs of the reconstruction; the product of all moduli is below 2^125
NO_EXPONENT = tl.constexpr(1 << 14)  # marks a column without a nonzero value
NOT_EXACT = tl.constexpr(1 << 20)  # exponent that marks a column with what residues cannot carry
WORKSPACE_BYTES = 512 << 20


@dataclass(frozen=True)
class GramExactConfig:
    """Launch configuration: tiles of C, tokens a step and a chunk, the most residue planes a tile may take."""

    block: int
    block_k: int
    num_warps: int
    num_stages: int
    chunk_tokens: int
    planes: int
    strip: int = 16  # rows of a tile that one block reconstructs


def gram_exact_config(
    capability: tuple[int, int], dtype: torch.dtype, tokens: int, columns: int
) -> GramExactConfig:
    """Chunks of at most 16384 tokens, fewer if the planes would take more than 512 MiB; tiles of 128 x 128.

    A longer chunk spreads the reconstruction over more tokens, but widens the spans and the workspace.
    """
    chunk_log2 = 14
    # float16 spans 2^-24 to 2^16; what else is too wide for all moduli goes to the float64 kernel.
    planes = planes_for(2 * 40 + chunk_log2) if dtype == torch.float16 else len(MODULI)
    limit = max(1024, WORKSPACE_BYTES // (planes * columns) // 1024 * 1024)
    chunk = min(1 << chunk_log2, limit, triton.cdiv(tokens, 128) * 128)
    stages = 4 if capability >= (9, 0) else 3
    return GramExactConfig(
        block=128, block_k=128, num_warps=8, num_stages=stages, chunk_tokens=chunk, planes=planes
    )


def planes_for(bits: int) -> int:
    """How many moduli carry every integer of magnitude 2^bits and less; more than exist if none suffices."""
    return sum(capacity < bits for capacity in capacities()) + 1


@lru_cache
def capacities() -> tuple[int, ...]:
    """For 1, 2, ... moduli with product M: the largest `b` with 2^b <= 0.49 M, see `_reconstruct`."""
    products = (math.prod(MODULI[: n + 1]) for n in range(len(MODULI)))
    return tuple((49 * product // 100).bit_length() - 1 for product in products)


def is_supported(capability: tuple[int, int], dtype: torch.dtype) -> bool:
    """int8 tensor cores in Triton start at sm_80; a float64 X is not a short integer."""
    return capability >= (8, 0) and dtype in (torch.float16, torch.bfloat16, torch.float32)


def gram_exact(
    C: Tensor,
    X: Tensor,
    weight: Tensor | None = None,
    config: GramExactConfig | None = None,
) -> None:
    """Add `Xᵀ diag(weight) X` to the symmetric C [D, D] (float64, contiguous); X [N, D] may have any strides.

    weight: float64 [N], contiguous.
    """
    tokens, columns = X.shape
    if tokens == 0 or columns == 0:
        return
    if config is None:
        capability = torch.cuda.get_device_capability(X.device) if X.is_cuda else (8, 0)
        config = gram_exact_config(capability, X.dtype, tokens, columns)
    # bfloat16 travels as its bits: the top half of a float32.
    source = X.view(torch.int16) if X.dtype == torch.bfloat16 else X
    side = triton.cdiv(columns, config.block)
    padded = side * config.block
    length, planes, block = config.chunk_tokens, config.planes, config.block
    tables = _tables(X.device)
    residues = torch.empty((planes, padded, length), dtype=torch.int8, device=X.device)
    products = torch.empty((planes, side * (side + 1) // 2, block, block), dtype=torch.int8, device=X.device)
    tile_planes = torch.empty((side, side), dtype=torch.int32, device=X.device)
    exponents = torch.empty((2, padded), dtype=torch.int32, device=X.device)
    fallback = replace(gram_fp64.config_for(X), splits=1)
    for start in range(0, tokens, length):
        x = source[start : start + length]
        w = None if weight is None else weight[start : start + length]
        here = x.shape[0]
        strides = (x.stride(0), x.stride(1))
        exponents[0].fill_(-NO_EXPONENT.value)
        exponents[1].fill_(NO_EXPONENT.value)
        grid = (triton.cdiv(here, 128), triton.cdiv(columns, 64))
        _span[grid](
            x, w, exponents, here, columns, padded, *strides, BLOCK_T=128, BLOCK_C=64, enable_fp_fusion=True
        )
        bits_of_sum = (here - 1).bit_length()
        _plan[(side, side)](
            exponents, tables.capacities, tile_planes, side, padded, bits_of_sum,
            BLOCK=block, PLANES=planes, MODULI=len(MODULI), SIDE=triton.next_power_of_2(side), enable_fp_fusion=True,
        )  # fmt: skip
        _residues[(triton.cdiv(length, 128), padded // 32)](
            x, w, exponents, tile_planes, tables.moduli, tables.powers, residues, here, columns, padded,
            length, *strides, side, PLANES=planes, BLOCK=block,
            SIDE=triton.next_power_of_2(side), BLOCK_T=128, BLOCK_C=32, num_warps=8, enable_fp_fusion=True,
        )  # fmt: skip
        _multiply[(side, side, planes)](
            residues, tile_planes, tables.moduli, products, side, padded, length,
            BLOCK=block, BLOCK_K=config.block_k, num_warps=config.num_warps, num_stages=config.num_stages,
            enable_fp_fusion=True,
        )  # fmt: skip
        _reconstruct[(side, side, block // config.strip)](
            products, exponents, tile_planes, tables.weights, tables.fractions, C, side, columns, padded,
            PLANES=planes, BLOCK=block, ROWS=config.strip, num_warps=8, enable_fp_fusion=True,
        )  # fmt: skip
        gram_fp64.accumulate(C, X[start : start + length], w, fallback, skip=tile_planes, skip_block=block)
    gram_fp64.finish(C)


@dataclass(frozen=True)
class Tables:
    """Constants of the residue system on the device.

    moduli int64 [16, 2]: m and floor(2^32 / m); powers int32 [16, 64]: 2^s mod m; capacities int32 [16].
    For the first n moduli with product M: weights int64 [16, 17, 4], limbs of W_p = (M/m_p)·((M/m_p)^-1 mod
    m_p) and, in row 16, of M itself; fractions float32 [16, 16]: W_p / M.
    """

    moduli: Tensor
    powers: Tensor
    capacities: Tensor
    weights: Tensor
    fractions: Tensor


@lru_cache
def _tables(device: torch.device) -> Tables:
    count = len(MODULI)
    weights = torch.zeros((count, count + 1, LIMBS), dtype=torch.int64)
    fractions = torch.zeros((count, count), dtype=torch.float32)
    for n in range(count):
        product = math.prod(MODULI[: n + 1])
        for p, m in enumerate(MODULI[: n + 1]):
            rest = product // m
            value = rest * pow(rest, -1, m)
            weights[n, p] = torch.tensor(_limbs(value))
            fractions[n, p] = value / product
        weights[n, count] = torch.tensor(_limbs(product))
    moduli = torch.tensor([[m, (1 << 32) // m] for m in MODULI])
    powers = torch.tensor([[pow(2, s, m) for s in range(POWERS.value)] for m in MODULI], dtype=torch.int32)
    tensors = (moduli, powers, torch.tensor(capacities(), dtype=torch.int32), weights, fractions)
    return made_to_last(lambda: Tables(*(t.to(device) for t in tensors)), device)


def _limbs(value: int) -> list[int]:
    return [(value >> (32 * k)) & 0xFFFFFFFF for k in range(LIMBS)]


@triton.jit
def _load_bits(X, weight, rows, cols, tokens, columns, stride_token, stride_column):
    """The float32 bits of a tile of X (0 outside and at weight 0), and where its weights are 0 or 1."""
    present = rows < tokens
    binary = present | True
    if weight is not None:
        w = tl.load(weight + rows, mask=present, other=0.0)
        present = present & (w != 0.0)
        binary = (w == 0.0) | (w == 1.0)
    pointers = X + rows.to(tl.int64)[:, None] * stride_token + cols.to(tl.int64)[None, :] * stride_column
    x = tl.load(pointers, mask=present[:, None] & (cols < columns)[None, :], other=0)
    is_bfloat16 = X.dtype.element_ty == tl.int16
    bits = x.to(tl.int32) << 16 if is_bfloat16 else x.to(tl.float32).to(tl.int32, bitcast=True)
    return bits, binary


@triton.jit
def _mantissa_exponent(bits):
    """x = ± mantissa · 2^exponent, mantissa below 2^24."""
    field = (bits >> 23) & 0xFF
    mantissa = (bits & 0x7FFFFF) | tl.where(field > 0, 1 << 23, 0)
    return mantissa, tl.maximum(field, 1) - 150


@triton.jit
def _span(
    X, weight, exponents, tokens, columns, padded, stride_token, stride_column,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Per column: the exponent of the largest magnitude's leading bit, and of the lowest bit set anywhere."""
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    bits, binary = _load_bits(X, weight, rows, cols, tokens, columns, stride_token, stride_column)
    mantissa, exponent = _mantissa_exponent(bits)
    lowest_bit = mantissa & -mantissa
    trailing_zeros = (lowest_bit.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127
    high = tl.where(mantissa > 0, exponent + 23, -NO_EXPONENT)
    not_exact = ((bits & 0x7F800000) == 0x7F800000) | (binary == 0)[:, None]
    high = tl.where(not_exact, NOT_EXACT, high)
    low = tl.where(mantissa > 0, exponent + trailing_zeros, NO_EXPONENT)
    # Integer maxima and minima: the order in which blocks arrive does not matter.
    tl.atomic_max(exponents + cols, tl.max(high, axis=0), mask=cols < columns)
    tl.atomic_min(exponents + padded + cols, tl.min(low, axis=0), mask=cols < columns)


@triton.jit
def _scale(exponents, cols, padded):
    """Per column: q of `x = 2^q n`, and the bits of n."""
    high = tl.load(exponents + cols)
    low = tl.load(exponents + padded + cols)
    empty = high == -NO_EXPONENT
    return tl.where(empty | (high == NOT_EXACT), 0, low), tl.where(empty, 0, high + 1 - low)


@triton.jit
def _plan(
    exponents, capacities, tile_planes, side, padded, bits_of_sum,
    BLOCK: tl.constexpr, PLANES: tl.constexpr, MODULI: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    """Planes that the tile of two column blocks needs; 0 hands it to the float64 kernel."""
    i = tl.program_id(0)
    j = tl.program_id(1)
    _, bits_i = _scale(exponents, i * BLOCK + tl.arange(0, BLOCK), padded)
    _, bits_j = _scale(exponents, j * BLOCK + tl.arange(0, BLOCK), padded)
    bits = tl.max(bits_i, axis=0) + tl.max(bits_j, axis=0) + bits_of_sum
    capacity = tl.load(capacities + tl.arange(0, MODULI))
    planes = tl.sum((capacity < bits).to(tl.int32), axis=0) + 1
    tl.store(tile_planes + i * side + j, tl.where(planes > PLANES, 0, planes))


@triton.jit
def _residues(
    X, weight, exponents, tile_planes, moduli, powers, residues, tokens, columns, padded, length,
    stride_token, stride_column, side,
    PLANES: tl.constexpr, BLOCK: tl.constexpr, SIDE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Cut a tile of X into int8 residues, transposed: tensor cores want the tokens contiguous."""
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    block = tl.program_id(1) * BLOCK_C // BLOCK
    partners = tl.arange(0, SIDE)
    needed = tl.max(tl.load(tile_planes + block * side + partners, mask=partners < side, other=0), axis=0)

    bits, _ = _load_bits(X, weight, rows, cols, tokens, columns, stride_token, stride_column)
    mantissa, exponent = _mantissa_exponent(bits)
    q, _ = _scale(exponents, cols, padded)
    shift = exponent - q[None, :]
    # A negative shift drops zeros: q is at most the exponent of the lowest bit set.
    mantissa = mantissa >> tl.minimum(tl.maximum(-shift, 0), 25)
    shift = tl.minimum(tl.maximum(shift, 0), POWERS - 1)
    pointers = residues + cols.to(tl.int64)[None, :] * length + rows[:, None]
    inside = (rows < length)[:, None] & (cols < padded)[None, :]
    for p in range(PLANES):
        if p < needed:
            m = tl.load(moduli + 2 * p)
            reciprocal = tl.load(moduli + 2 * p + 1)
            # A 24-bit mantissa times an 8-bit power: below 2^32. The quotient is at most 1 too small.
            value = mantissa.to(tl.int64) * tl.load(powers + p * POWERS + shift)
            remainder = value - ((value * reciprocal) >> 32) * m
            remainder = tl.where(remainder >= m, remainder - m, remainder)
            remainder = tl.where(2 * remainder >= m, remainder - m, remainder)
            # Modulo 256 the negative of -128 wraps onto itself, as it should.
            signed = tl.where(bits < 0, -remainder, remainder).to(tl.int8)
            tl.store(pointers, signed, mask=inside)
        pointers += tl.cast(padded, tl.int64) * length


@triton.jit
def _multiply(
    residues, tile_planes, moduli, products, side, padded, length, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr
):
    """One modulus, one tile: the exact int32 Gram product of two column blocks, reduced to int8 again."""
    i = tl.program_id(0)
    j = tl.program_id(1)
    p = tl.program_id(2)
    if j < i:
        return
    if p >= tl.load(tile_planes + i * side + j):
        return
    plane = residues + p.to(tl.int64) * padded * length
    k = tl.arange(0, BLOCK_K)
    a_pointers = plane + (i * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)[:, None] * length + k[None, :]
    b_pointers = plane + (j * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)[:, None] * length + k[None, :]
    acc = tl.zeros((BLOCK, BLOCK), dtype=tl.int32)
    for _ in range(0, length, BLOCK_K):
        acc = tl.dot(tl.load(a_pointers), tl.trans(tl.load(b_pointers)), acc, out_dtype=tl.int32)
        a_pointers += BLOCK_K
        b_pointers += BLOCK_K
    m = tl.load(moduli + 2 * p).to(tl.int32)
    remainder = acc % m  # takes the sign of acc
    remainder = tl.where(2 * remainder >= m, remainder - m, remainder)
    remainder = tl.where(2 * remainder < -m, remainder + m, remainder)
    tile = j * (j + 1) // 2 + i
    tiles = side * (side + 1) // 2
    target = products + (p.to(tl.int64) * tiles + tile) * BLOCK * BLOCK
    offsets = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(target + offsets, remainder.to(tl.int8))


@triton.jit
def _reconstruct(
    products, exponents, tile_planes, weights, fractions, C, side, columns, padded,
    PLANES: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """C += the integer that the residues c_p stand for, Σ c_p W_p − k M, times the columns' powers of two."""
    i = tl.program_id(0)
    j = tl.program_id(1)
    if j < i:
        return
    planes = tl.load(tile_planes + i * side + j)
    if planes == 0:
        return
    inner_rows = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    inner_cols = tl.arange(0, BLOCK)
    tile = j * (j + 1) // 2 + i
    tiles = side * (side + 1) // 2
    source = products + tile.to(tl.int64) * BLOCK * BLOCK + inner_rows[:, None] * BLOCK + inner_cols[None, :]
    table = weights + (planes - 1) * (TABLE_ROWS * 4)
    # The exact quotient is within 0.49 of the integer k. The float32 sum of 16 terms, each at most 128, is off
    # by at most 16 · 2^11 · 2^-24 in its additions and a tenth of that in its terms: below 0.003.
    quotient = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    limb0 = tl.zeros((ROWS, BLOCK), dtype=tl.int64)
    limb1 = tl.zeros((ROWS, BLOCK), dtype=tl.int64)
    limb2 = tl.zeros((ROWS, BLOCK), dtype=tl.int64)
    limb3 = tl.zeros((ROWS, BLOCK), dtype=tl.int64)
    for p in range(PLANES):
        if p < planes:
            c = tl.load(source)
            quotient += c.to(tl.float32) * tl.load(fractions + (planes - 1) * (TABLE_ROWS - 1) + p)
            c = c.to(tl.int64)
            limb0 += c * tl.load(table + 4 * p)
            limb1 += c * tl.load(table + 4 * p + 1)
            limb2 += c * tl.load(table + 4 * p + 2)
            limb3 += c * tl.load(table + 4 * p + 3)
        source += tiles.to(tl.int64) * BLOCK * BLOCK
    k = tl.floor(quotient + 0.5).to(tl.int64)
    modulus = table + (TABLE_ROWS - 1) * 4
    limb0 -= k * tl.load(modulus)
    limb1 -= k * tl.load(modulus + 1)
    limb2 -= k * tl.load(modulus + 2)
    limb3 -= k * tl.load(modulus + 3)
    # Carry, so that all limbs but the signed top one are below 2^32: the float64 sums then cancel nothing.
    limb1 += limb0 >> 32
    limb2 += limb1 >> 32
    limb3 += limb2 >> 32
    value = limb3.to(tl.float64) * 4294967296.0 + (limb2 & 0xFFFFFFFF).to(tl.float64)
    value = value * 4294967296.0 + (limb1 & 0xFFFFFFFF).to(tl.float64)
    value = value * 4294967296.0 + (limb0 & 0xFFFFFFFF).to(tl.float64)

    rows = i * BLOCK + inner_rows
    cols = j * BLOCK + inner_cols
    q_rows, _ = _scale(exponents, rows, padded)
    q_cols, _ = _scale(exponents, cols, padded)
    value = value * _power_of_two(q_rows)[:, None] * _power_of_two(q_cols)[None, :]
    inside = (rows < columns)[:, None] & (cols < columns)[None, :]
    target = C + rows.to(tl.int64)[:, None] * columns + cols[None, :]
    tl.store(target, tl.load(target, mask=inside) + value, mask=inside)


@triton.jit
def _power_of_two(exponent):
    return ((exponent.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)
