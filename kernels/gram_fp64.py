"""`C += Xᵀ diag(weight) X` with float64 accumulation: portable, upcast in registers, upper triangle only.

`tl.dot` on float64 becomes DMMA on devices with double-precision tensor cores (sm_80, sm_90), else FMA. The
same kernel serves `fast`: half-precision products, promoted to float64 every `block_k` tokens.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from slicegpt.hardware.devices import FP64_TENSOR_CORES


@dataclass(frozen=True)
class GramConfig:
    """Launch configuration: square tiles of C, tokens a step, and how many ways the tokens are split."""

    block: int
    block_k: int
    num_warps: int
    splits: int


def gram_config(
    capability: tuple[int, int], tokens: int, columns: int, multiprocessors: int, fast: bool = False
) -> GramConfig:
    """Tiles of 64 x 64: 64 registers a thread for the accumulator, so that several blocks fit a processor.

    Without double-precision tensor cores every thread holds its operands too, and needs twice the warps not
    to spill. A small D has few tiles; the tokens are then split, in a way that depends on the sizes alone
    (deterministic), until four blocks a multiprocessor are busy, but never below 512 tokens a split.
    """
    block = 64
    side = triton.cdiv(columns, block)
    tiles = side * (side + 1) // 2
    splits = max(1, min(4 * multiprocessors // tiles, tokens // 512))
    num_warps = 4 if fast or capability in FP64_TENSOR_CORES else 8
    return GramConfig(block, block_k=32 if fast else 16, num_warps=num_warps, splits=splits)


def is_supported(capability: tuple[int, int], dtype: torch.dtype, fast: bool = False) -> bool:
    """Every device that Triton compiles for; bfloat16 needs sm_80, and `fast` takes half precision only."""
    half = dtype in (torch.float16, torch.bfloat16)
    if dtype == torch.bfloat16 and capability < (8, 0):
        return False
    return capability >= (7, 0) and (half if fast else half or dtype in (torch.float32, torch.float64))


def gram_fp64(
    C: Tensor, X: Tensor, weight: Tensor | None = None, fast: bool = False, config: GramConfig | None = None
) -> None:
    """Add `Xᵀ diag(weight) X` to the symmetric C [D, D] (float64, contiguous); X [N, D] may have any strides.

    weight: float64 [N], contiguous. fast: multiply in X's precision (weights are rounded to it).
    """
    tokens, columns = X.shape
    if tokens == 0 or columns == 0:
        return
    config = config or config_for(X, fast)
    partials = C if config.splits == 1 else C.new_empty((config.splits, columns, columns))
    accumulate(partials, X, weight, config, fast=fast)
    finish(C, partials if config.splits > 1 else None)


def accumulate(
    out: Tensor,
    X: Tensor,
    weight: Tensor | None,
    config: GramConfig,
    fast: bool = False,
    skip: Tensor | None = None,
    skip_block: int = 1,
) -> None:
    """Launch the product alone: onto C's upper triangle with one split, else into sums [splits, D, D].

    skip: int32 [S, S], one entry for each tile of `skip_block` columns of C: only tiles with a 0 are done.
    """
    tokens, columns = X.shape
    side = triton.cdiv(columns, config.block)
    tokens_a_split = triton.cdiv(triton.cdiv(tokens, config.splits), config.block_k) * config.block_k
    _product[(side, side, config.splits)](
        X,
        weight,
        out,
        skip,
        tokens,
        columns,
        X.stride(0),
        X.stride(1),
        tokens_a_split,
        triton.cdiv(columns, skip_block),
        ONTO_C=config.splits == 1,
        FAST=fast,
        BLOCK=config.block,
        BLOCK_K=config.block_k,
        SKIP_BLOCK=skip_block,
        num_warps=config.num_warps,
        enable_fp_fusion=True,
    )


def finish(C: Tensor, partials: Tensor | None = None) -> None:
    """Add the partial sums to C's upper triangle in a fixed order, turn infinities into NaN, mirror."""
    columns, block = C.shape[0], 64
    side = triton.cdiv(columns, block)
    splits = 0 if partials is None else partials.shape[0]
    _finish[(side, side)](
        C, partials, columns, splits, columns * columns, BLOCK=block, num_warps=4, enable_fp_fusion=True
    )


def device_of(X: Tensor) -> tuple[tuple[int, int], int]:
    """Compute capability and multiprocessors of X's device (an A100's in the interpreter, which has no device)."""
    if not X.is_cuda:
        return (8, 0), 1
    properties = torch.cuda.get_device_properties(X.device)
    return (properties.major, properties.minor), properties.multi_processor_count


def config_for(X: Tensor, fast: bool = False) -> GramConfig:
    """`gram_config` for the device that X is on."""
    capability, multiprocessors = device_of(X)
    return gram_config(capability, *X.shape, multiprocessors=multiprocessors, fast=fast)


@triton.jit
def load_tokens(
    X, weight, k, stop, cols, columns, stride_token, stride_column,
    WEIGHTED: tl.constexpr, FAST: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Rows k.. of X [BLOCK_K, BLOCK], times their weight if WEIGHTED; 0 outside and where the weight is 0."""
    rows = k + tl.arange(0, BLOCK_K)
    present = rows < stop
    if weight is not None:
        w = tl.load(weight + rows, mask=present, other=0.0)
        present = present & (w != 0.0)
    pointers = X + rows.to(tl.int64)[:, None] * stride_token + cols.to(tl.int64)[None, :] * stride_column
    x = tl.load(pointers, mask=present[:, None] & (cols < columns)[None, :], other=0.0)
    if not FAST:
        x = x.to(tl.float64)
    if WEIGHTED and weight is not None:
        x = (x * w[:, None]).to(x.dtype)
    return x


@triton.jit
def _product(
    X, weight, out, skip, tokens, columns, stride_token, stride_column, tokens_a_split, skip_side, ONTO_C:
    tl.constexpr, FAST: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, SKIP_BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0)
    j = tl.program_id(1)
    if j < i:
        return
    if skip is not None:  # noqa: SIM102 (known when compiling, unlike what it points to)
        if tl.load(skip + (i * BLOCK // SKIP_BLOCK) * skip_side + j * BLOCK // SKIP_BLOCK) != 0:
            return
    split = tl.program_id(2)
    start = split * tokens_a_split
    stop = tl.minimum(start + tokens_a_split, tokens)
    rows = i * BLOCK + tl.arange(0, BLOCK)
    cols = j * BLOCK + tl.arange(0, BLOCK)

    # Operands are loaded one step ahead and carried through the loop as float64. This hides the load behind
    # the product, and Triton 3.6 cannot lower a float64 dot whose operand it can trace back to a
    # half-precision load.
    acc = tl.zeros((BLOCK, BLOCK), dtype=tl.float64)
    a = load_tokens(X, weight, start, stop, rows, columns, stride_token, stride_column, False, FAST, BLOCK_K)
    b = load_tokens(X, weight, start, stop, cols, columns, stride_token, stride_column, True, FAST, BLOCK_K)
    for step in range(BLOCK_K, tokens_a_split + BLOCK_K, BLOCK_K):
        k = start + step
        if FAST:
            acc += tl.dot(tl.trans(a), b, out_dtype=tl.float32).to(tl.float64)
        else:
            acc = tl.dot(tl.trans(a), b, acc, out_dtype=tl.float64)
        a = load_tokens(X, weight, k, stop, rows, columns, stride_token, stride_column, False, FAST, BLOCK_K)
        b = load_tokens(X, weight, k, stop, cols, columns, stride_token, stride_column, True, FAST, BLOCK_K)

    inside = (rows < columns)[:, None] & (cols < columns)[None, :]
    pointers = out + rows.to(tl.int64)[:, None] * columns + cols[None, :]
    if ONTO_C:
        tl.store(pointers, tl.load(pointers, mask=inside) + acc, mask=inside)
    else:
        tl.store(pointers + split.to(tl.int64) * columns * columns, acc, mask=inside)


@triton.jit
def _finish(C, partials, columns, splits, partial_stride, BLOCK: tl.constexpr):
    i = tl.program_id(0)
    j = tl.program_id(1)
    if j < i:
        return
    rows = i * BLOCK + tl.arange(0, BLOCK)
    cols = j * BLOCK + tl.arange(0, BLOCK)
    inside = (rows < columns)[:, None] & (cols < columns)[None, :]
    offsets = rows.to(tl.int64)[:, None] * columns + cols[None, :]
    total = tl.load(C + offsets, mask=inside, other=0.0)
    if partials is not None:
        source = partials + offsets
        for _ in range(splits):
            total += tl.load(source, mask=inside, other=0.0)
            source += partial_stride
    # x - x is 0 for every finite x and NaN for infinities and NaNs.
    total = tl.where(total - total == 0.0, total, float("nan"))
    if i == j:
        total = tl.where(rows[:, None] <= cols[None, :], total, tl.trans(total))
        tl.store(C + offsets, total, mask=inside)
    else:
        tl.store(C + offsets, total, mask=inside)
        mirrored = cols.to(tl.int64)[:, None] * columns + rows[None, :]
        tl.store(C + mirrored, tl.trans(total), mask=(cols < columns)[:, None] & (rows < columns)[None, :])
