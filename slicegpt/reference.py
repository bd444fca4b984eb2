"""Plain-PyTorch implementations of the operators: for the CPU, and what the kernels are compared with."""

import torch
from torch import Tensor, float64

# One chunk of X is upcast at a time, 32 MiB in float64: about a server's last-level cache. Below 1024 tokens a
# chunk, reading and writing C for every chunk would cost as much as the product.
CHUNK_ELEMENTS = 1 << 22
MIN_CHUNK_TOKENS = 1024

# Columns of C are updated in blocks, each from its diagonal on: with 8 blocks the product is 56 % of the full
# one, and blocks narrower than 192 columns lose more in the BLAS than the smaller triangle gains.
COLUMN_BLOCKS = 8
MIN_BLOCK_COLUMNS = 192


def gram_(C: Tensor, X: Tensor, weight: Tensor | None = None) -> None:
    """Add `Xᵀ diag(weight) X` to the symmetric C in place, in float64; the contract is `slicegpt.ops.gram_`.

    Only C's upper triangle is read and computed; the extra memory is one chunk of X in float64, two with
    weights.
    """
    tokens, columns = X.shape
    if tokens == 0 or columns == 0:
        return
    block = max(MIN_BLOCK_COLUMNS, -(-columns // COLUMN_BLOCKS))
    chunk = min(tokens, max(MIN_CHUNK_TOKENS, CHUNK_ELEMENTS // columns))
    buffer = X.new_empty((chunk, columns), dtype=float64)
    weighted_buffer = buffer if weight is None else torch.empty_like(buffer)
    for start in range(0, tokens, chunk):
        stop = min(start + chunk, tokens)
        rows = buffer[: stop - start].copy_(X[start:stop])
        weighted = rows
        if weight is not None:
            w = weight[start:stop, None].to(float64)
            rows.masked_fill_(w == 0, 0)  # an absent token may hold anything, also infinities
            weighted = torch.mul(rows, w, out=weighted_buffer[: stop - start])
        for i in range(0, columns, block):
            C[i : i + block, i:].addmm_(rows[:, i : i + block].T, weighted[:, i:])
    _finish_symmetric(C, block)


def _finish_symmetric(C: Tensor, block: int) -> None:
    """Turn what overflowed or was infinite into NaN, then copy the upper triangle onto the lower one."""
    for i in range(0, C.shape[0], block):
        j = min(i + block, C.shape[0])
        upper = C[i:j, i:]
        upper.masked_fill_(~upper.isfinite(), torch.nan)
        diagonal = C[i:j, i:j]
        diagonal.copy_(diagonal.triu() + diagonal.triu(1).T)
        C[j:, i:j] = C[i:j, j:].T
