"""One token's attention in one or two launches: norm and rotation of queries and keys, the cache, the softmax.

A decoding step of a small batch is a chain of launches, each of a few microseconds, around products that read all
weights: here a layer's attention is one of them, where PyTorch's operators take a dozen. A program has one query head
of a sequence; or, where tensor cores multiply a group of 4 or more, a key head with all of its query heads, so that
keys and values are read once. It reads what the cache holds and no more: how much that is, it learns on the device.
Long caches are cut into splits, whose sums a second kernel combines in order.
"""

import triton
import triton.language as tl
from torch import bfloat16, dtype, empty, float16, float32

from slicegpt.kernels.attention_config import block_tokens, splits_for, uses_tensor_cores, warps_for
from slicegpt.kernels.gemm_tiles import device_class
from slicegpt.ops.contracts import DecodeAttentionInputs


def is_supported(capability: tuple[int, int], item: dtype, head_dim: int) -> bool:
    """From Turing (7.5) on, which has no bfloat16."""
    return (
        capability >= (7, 5)
        and head_dim <= 256
        and (item in (float16, float32) or (item == bfloat16 and capability >= (8, 0)))
    )


def decode_attention_(
    inputs: DecodeAttentionInputs, splits: int | None = None, overlap: bool = False
) -> None:
    """The contract is `slicegpt.ops.decode_attention_`.

    Args:
        splits: a power of two; None chooses by device and capacity.
        overlap: programmatic dependent launch, from compute capability 9.0 on: the kernels start before those ahead of
            them have ended and wait for them, and so may the next one.
    """
    rows, keys, values, valid, heads = inputs.rows, inputs.keys, inputs.values, inputs.valid, inputs.heads
    cos = inputs.cos
    batch, key_heads, capacity, head_dim = keys.shape
    group, width = heads // key_heads, triton.next_power_of_2(max(16, head_dim))
    device = device_class(rows.device)
    dot = uses_tensor_cores(group, rows.dtype, device.capability)
    programs = batch * (key_heads if dot else heads)
    if splits is None:
        splits = splits_for(capacity, programs, device.multiprocessors)
    sums = peaks = None
    if splits > 1:
        sums = empty((batch * heads, splits, head_dim), dtype=float32, device=rows.device)
        peaks = empty((batch * heads, splits, 2), dtype=float32, device=rows.device)
    warps = warps_for(programs * splits, device.multiprocessors, dot)
    # Before Hopper, and in the interpreter, there is no such option: the constant False leaves the code away.
    launch = {"launch_pdl": True} if overlap else {}
    _attend[(programs, splits)](
        rows, keys, values, valid, inputs.slot, cos, inputs.sin, inputs.norm, sums, peaks,
        rows.stride(0), *keys.stride()[:3], valid.stride(0), inputs.norm_eps, head_dim**-0.5 * 1.4426950408889634,
        GROUP=group, KEY_HEADS=key_heads, HEAD_DIM=head_dim, ROTARY=0 if cos is None else cos.shape[-1],
        ROTATE_FIRST=inputs.rotate_first, WINDOW=inputs.window, SPLITS=splits, DOT=dot,
        BLOCK_G=triton.next_power_of_2(max(16, group)) if dot else 1,
        BLOCK_N=block_tokens(width, rows.itemsize, dot, warps), WIDTH=width, OVERLAP=overlap,
        num_warps=warps, num_stages=2, enable_fp_fusion=True, **launch,
    )  # fmt: skip
    if splits > 1:
        _combine[(batch * heads,)](
            rows, sums, peaks, rows.stride(0), 2 * key_heads * head_dim,
            HEADS=heads, HEAD_DIM=head_dim, SPLITS=splits, WIDTH=width, OVERLAP=overlap,
            num_warps=4, enable_fp_fusion=True, **launch,
        )  # fmt: skip


@triton.jit
def _states(
    row, norm, cos, sin, index, columns, norm_eps,
    KEY_HEADS: tl.constexpr, LAST: tl.constexpr, HEAD_DIM: tl.constexpr, ROTARY: tl.constexpr,
    ROTATE_FIRST: tl.constexpr,
):  # fmt: skip
    """Heads `index` of `row`'s k | q, normed and rotated, [heads, columns] float32; zeros from head LAST on."""
    inside = (index < LAST)[:, None] & (columns < HEAD_DIM)[None, :]
    head = index[:, None] * HEAD_DIM
    states = row + KEY_HEADS * HEAD_DIM + head
    x = tl.load(states + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    if norm is not None and not ROTATE_FIRST:
        scale = tl.rsqrt(tl.sum(x * x, axis=1) / HEAD_DIM + norm_eps)
        x *= scale[:, None] * tl.load(norm + head + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    if ROTARY > 0:
        turned = columns < ROTARY
        partner = tl.where(columns < ROTARY // 2, columns + ROTARY // 2, columns - ROTARY // 2)
        partner = tl.where(turned, partner, columns)
        y = tl.load(states + partner[None, :], mask=inside, other=0.0).to(tl.float32)
        if norm is not None and not ROTATE_FIRST:
            y *= scale[:, None] * tl.load(norm + head + partner[None, :], mask=inside, other=0.0).to(
                tl.float32
            )
        c = tl.load(cos + columns, mask=turned, other=1.0).to(tl.float32)
        s = tl.load(sin + columns, mask=turned, other=0.0).to(tl.float32)
        x = x * c[None, :] + y * s[None, :]
    if norm is not None and ROTATE_FIRST:
        scale = tl.rsqrt(tl.sum(x * x, axis=1) / HEAD_DIM + norm_eps)
        x *= scale[:, None] * tl.load(norm + head + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    return x


@triton.jit
def _attend(
    rows, keys, values, valid, slot, cos, sin, norm, sums, peaks,
    row_stride, batch_stride, head_stride, token_stride, valid_stride, norm_eps, score_scale,
    GROUP: tl.constexpr, KEY_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, ROTARY: tl.constexpr,
    ROTATE_FIRST: tl.constexpr, WINDOW: tl.constexpr, SPLITS: tl.constexpr, DOT: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One split of one head of one sequence; the last split has the new token, which it puts into the cache.

    DOT: a head is a key head with its GROUP query heads, else one query head.
    sums, peaks: [batch * heads, splits, ...] float32, sums of values, and largest scores and sums of weights.
    """
    if OVERLAP:
        # Nothing that the kernels ahead write is read before they have ended; only behind that may the next one start.
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    HERE: tl.constexpr = GROUP if DOT else 1
    PIECES: tl.constexpr = 1 if DOT else GROUP
    sequence = tl.program_id(0) // (KEY_HEADS * PIECES)
    first_query = tl.program_id(0) % (KEY_HEADS * PIECES) * HERE
    key_head = first_query // GROUP
    split = tl.program_id(1)
    row = rows + tl.cast(sequence, tl.int64) * row_stride
    cache = tl.cast(sequence, tl.int64) * batch_stride + tl.cast(key_head, tl.int64) * head_stride
    columns = tl.arange(0, WIDTH)
    inside = columns < HEAD_DIM
    if ROTARY > 0:
        cos += sequence * ROTARY
        sin += sequence * ROTARY

    group = tl.arange(0, BLOCK_G)
    first_head = KEY_HEADS + first_query
    q = _states(
        row, norm, cos, sin, first_head + group, columns, norm_eps,
        KEY_HEADS, KEY_HEADS * (1 + GROUP), HEAD_DIM, ROTARY, ROTATE_FIRST,
    ).to(rows.dtype.element_ty)  # fmt: skip

    here = tl.load(slot)
    begin = here * 0
    if WINDOW is not None:
        begin = tl.maximum(here - WINDOW + 1, 0)
    piece = tl.cdiv(tl.cdiv(here - begin, SPLITS), BLOCK_N) * BLOCK_N
    begin += split * piece
    end = tl.minimum(begin + piece, here)

    peak = tl.full([BLOCK_G], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    sum_ = tl.zeros([BLOCK_G, WIDTH], tl.float32)
    for start in range(begin, end, BLOCK_N):
        tokens = start + tl.arange(0, BLOCK_N)
        present = tokens < end
        at = cache + tokens[:, None] * token_stride + columns[None, :]
        both = present[:, None] & inside[None, :]
        k = tl.load(keys + at, mask=both, other=0.0)
        v = tl.load(values + at, mask=both, other=0.0)
        seen = tl.load(valid + sequence * valid_stride + tokens, mask=present, other=0) != 0
        if DOT:
            scores = tl.dot(q, tl.trans(k)) * score_scale
        else:
            scores = tl.sum(q.to(tl.float32) * k.to(tl.float32), axis=1)[None, :] * score_scale
        scores = tl.where(seen[None, :], scores, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, axis=1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(peak - base)
        total = total * shrink + tl.sum(weights, axis=1)
        sum_ *= shrink[:, None]
        if DOT:
            sum_ += tl.dot(weights.to(v.dtype), v)
        else:
            sum_ += tl.sum(tl.trans(weights) * v.to(tl.float32), axis=0)[None, :]
        peak = higher

    if split == SPLITS - 1:
        k = _states(
            row, norm, cos, sin, key_head + tl.arange(0, 1), columns, norm_eps,
            KEY_HEADS, KEY_HEADS, HEAD_DIM, ROTARY, ROTATE_FIRST,
        ).to(rows.dtype.element_ty)  # fmt: skip
        v = tl.load(row + key_head * HEAD_DIM + columns[None, :], mask=inside[None, :], other=0.0)
        at = cache + here * token_stride + columns[None, :]
        if first_query % GROUP == 0:  # one for all queries of the key head
            tl.store(keys + at, k, mask=inside[None, :])
            tl.store(values + at, v, mask=inside[None, :])
        score = tl.sum(q.to(tl.float32) * k.to(tl.float32), axis=1) * score_scale
        higher = tl.maximum(peak, score)
        weight = tl.exp2(score - higher)
        shrink = tl.exp2(peak - higher)
        total = total * shrink + weight
        sum_ = sum_ * shrink[:, None] + weight[:, None] * v.to(tl.float32)
        peak = higher

    mine = (group < HERE)[:, None] & inside[None, :]
    if SPLITS == 1:
        out = row + (KEY_HEADS + first_head + group[:, None]) * HEAD_DIM + columns[None, :]
        tl.store(out, (sum_ / total[:, None]).to(rows.dtype.element_ty), mask=mine)
    else:
        at = ((tl.program_id(0) * HERE + group) * SPLITS + split).to(tl.int64)
        tl.store(sums + at[:, None] * HEAD_DIM + columns[None, :], sum_, mask=mine)
        tl.store(peaks + 2 * at, peak, mask=group < HERE)
        tl.store(peaks + 2 * at + 1, total, mask=group < HERE)


@triton.jit
def _combine(
    rows, sums, peaks, row_stride, first_column,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, SPLITS: tl.constexpr, WIDTH: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """The splits' sums of one query head, over what the query was. The last split has seen a token: no sum is empty."""
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    index = tl.cast(tl.program_id(0), tl.int64)
    columns, splits = tl.arange(0, WIDTH), tl.arange(0, SPLITS)
    inside = columns < HEAD_DIM
    peak = tl.load(peaks + 2 * (index * SPLITS + splits))
    total = tl.load(peaks + 2 * (index * SPLITS + splits) + 1)
    weights = tl.exp2(peak - tl.max(peak, axis=0))
    at = (index * SPLITS + splits)[:, None] * HEAD_DIM + columns[None, :]
    parts = tl.load(sums + at, mask=inside[None, :], other=0.0)
    out = tl.sum(weights[:, None] * parts, axis=0) / tl.sum(weights * total, axis=0)
    head = index % HEADS
    at = (index // HEADS) * row_stride + first_column + head * HEAD_DIM + columns
    tl.store(rows + at, out.to(rows.dtype.element_ty), mask=inside)
