"""The oracle: every operator in plain PyTorch, in float64 where that can be, with no care for speed but `gram_`'s.

`gram_` and `cross_gram_` are also what runs where no kernel does. What other implementations share stands in
`slicegpt.ops.contracts`.
"""

import torch
from torch import Tensor, float32, float64

from slicegpt.ops.contracts import (
    DecodeAttentionInputs,
    NormLinearInputs,
    activate,
    block_sums_of_squares,
    sumsq_dtype,
)
from slicegpt.ops.torch_attention import attention_states, one_query_attention

# One chunk of X is upcast at a time, 4 MiB in float64: it stays in a last-level cache that other work shares (8 MiB
# took 6 % longer at 576 columns on an AMD EPYC). Below 1024 tokens a chunk, reading and writing C for every chunk would
# cost as much as the product.
CHUNK_ELEMENTS = 1 << 19
MIN_CHUNK_TOKENS = 1024

# Tokens that are summed in float32 before they are added in float64 ("fast"): adding a product of 1024 tokens costs a
# fifth of computing it, and BLAS sums in short runs, so that longer chunks err no more in practice.
FAST_CHUNK_TOKENS = 4096

# Columns of C are updated in blocks, each from its diagonal on: with 16 blocks the product is 53 % of the full one.
# Blocks narrower than 96 columns lose more in the BLAS than the smaller triangle gains (576 and 2048 columns, on an
# Intel and an AMD processor).
COLUMN_BLOCKS = 16
MIN_BLOCK_COLUMNS = 96


def gram_(C: Tensor, X: Tensor, weight: Tensor | None = None, fast: bool = False) -> None:
    """Add `Xᵀ diag(weight) X` to the symmetric C in place, in float64; the contract is `slicegpt.ops.gram_`.

    Only C's upper triangle is read and computed; the extra memory is one chunk of X in float64, up to
    three with weights. fast: chunks of FAST_CHUNK_TOKENS are multiplied in float32, and their sums added in float64.
    """
    tokens, columns = X.shape
    if tokens == 0 or columns == 0:
        return
    block = max(MIN_BLOCK_COLUMNS, -(-columns // COLUMN_BLOCKS))
    chunk, dtype = _chunk_tokens(tokens, columns, fast), float32 if fast else float64
    as_it_is = X.dtype == dtype and X.stride(1) == 1
    buffer = None if as_it_is else X.new_empty((chunk, columns), dtype=dtype)
    weighted_buffer = None if weight is None else X.new_empty((chunk, columns), dtype=dtype)
    for start in range(0, tokens, chunk):
        stop = min(start + chunk, tokens)
        rows = X[start:stop] if as_it_is else buffer[: stop - start].copy_(X[start:stop])
        weighted = rows
        if weight is not None:
            w = weight[start:stop, None].to(dtype)
            rows = _without_absent(rows, w)
            weighted = torch.mul(rows, w, out=weighted_buffer[: stop - start])
        for i in range(0, columns, block):
            target = C[i : i + block, i:]
            if fast:
                target += (rows[:, i : i + block].T @ weighted[:, i:]).double()  # mixed dtypes add at a third
            else:
                target.addmm_(rows[:, i : i + block].T, weighted[:, i:])
    _finish_symmetric(C, block)


def _chunk_tokens(tokens: int, columns: int, fast: bool) -> int:
    """How many tokens are multiplied at a time."""
    return min(tokens, FAST_CHUNK_TOKENS if fast else max(MIN_CHUNK_TOKENS, CHUNK_ELEMENTS // columns))


def _without_absent(rows: Tensor, weight: Tensor) -> Tensor:
    """Rows of weight 0 are absent tokens: whatever they hold, also infinities, becomes 0."""
    absent = weight == 0
    return rows.masked_fill(absent, 0) if absent.is_cuda or absent.any() else rows


def _finish_symmetric(C: Tensor, block: int) -> None:
    """Turn what overflowed or was infinite into NaN, then copy the upper triangle onto the lower one."""
    for i in range(0, C.shape[0], block):
        j = min(i + block, C.shape[0])
        _mark_infinities(C[i:j, i:])
        diagonal = C[i:j, i:j]
        diagonal.copy_(diagonal.triu() + diagonal.triu(1).T)
        C[j:, i:j] = C[i:j, j:].T


def _mark_infinities(C: Tensor) -> None:
    """Turn infinities into NaN: one pass where there are none. A GPU is not asked, it would have to be waited for."""
    if C.is_cuda or not C.sum().isfinite():
        C.masked_fill_(~C.isfinite(), torch.nan)


def cross_gram_(C: Tensor, A: Tensor, B: Tensor, weight: Tensor | None = None, fast: bool = False) -> None:
    """Add `Aᵀ diag(weight) B` to C [K, D] in place; the contract is `slicegpt.ops.cross_gram_`.

    The extra memory is one chunk of A and one of B. fast: as in `gram_`.
    """
    tokens = A.shape[0]
    if C.numel() == 0 or tokens == 0:
        return
    chunk, dtype = _chunk_tokens(tokens, max(C.shape), fast), float32 if fast else float64
    for start in range(0, tokens, chunk):
        left, right = (X[start : start + chunk].to(dtype) for X in (A, B))
        if weight is not None:
            w = weight[start : start + chunk, None].to(dtype)
            left, right = _without_absent(left, w), _without_absent(right, w) * w
        if fast:
            C += (left.T @ right).double()
        else:
            C.addmm_(left.T, right)
    _mark_infinities(C)


def norm_linear(inputs: NormLinearInputs) -> Tensor:
    """`[act(rms(h) Wᵀ + bias) | h Fᵀ]` in float64, rounded once to h's dtype; see `slicegpt.ops.norm_linear`."""
    h, n_scaled = inputs.h.double(), inputs.n_scaled
    product = h @ inputs.weight.double().mT
    sums = h.square() if inputs.sumsq is None else inputs.sumsq.double()
    scale = (sums.sum(dim=1, keepdim=True) / inputs.divisor + inputs.eps).rsqrt()
    pre = product[:, :n_scaled] * scale
    if inputs.bias is not None:
        pre += inputs.bias.double()
    return torch.cat((activate(pre, inputs.activation), product[:, n_scaled:]), dim=1).to(inputs.h.dtype)


def rotate_add(
    a: Tensor, weight: Tensor, h: Tensor, shortcut: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`h Sᵀ + a Wᵀ + bias` in float64, rounded once, and its sums of squares; see `slicegpt.ops.rotate_add`."""
    total = a.double() @ weight.double().mT
    if shortcut is None:
        total[:, : h.shape[1]] += h.double()
    else:
        total += h.double() @ shortcut.double().mT
    if bias is not None:
        total += bias.double()
    h_next = total.to(h.dtype)
    return h_next, block_sums_of_squares(h_next.double()).to(sumsq_dtype(h.dtype))


def decode_attention_(inputs: DecodeAttentionInputs) -> None:
    """Attention of one token a row on a cache; the contract is `slicegpt.ops.decode_attention_`."""
    rows, keys, values, slot, heads = inputs.rows, inputs.keys, inputs.values, inputs.slot, inputs.heads
    _, key_heads, capacity, head_dim = keys.shape
    new_values, states = attention_states(
        rows,
        key_heads,
        heads,
        head_dim,
        inputs.norm,
        inputs.norm_eps,
        inputs.cos,
        inputs.sin,
        inputs.rotate_first,
    )
    keys.index_copy_(2, slot, states[:, :key_heads, None])
    values.index_copy_(2, slot, new_values[:, :, None])
    position = torch.arange(capacity, device=rows.device)
    seen = (position <= slot) & inputs.valid
    if inputs.window is not None:
        seen &= position > slot - inputs.window
    attended = one_query_attention(states[:, key_heads:], keys, values, seen[:, None, None])
    rows[:, 2 * key_heads * head_dim :][:, : heads * head_dim] = attended
