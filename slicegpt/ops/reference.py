"""Plain-PyTorch implementations of the operators: where there are no kernels, and what those are compared with."""

import torch
import torch.nn.functional as F
from torch import Tensor, float32, float64

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


# --- the fused residual-rotation GEMMs ----------------------------------------------------------------------

ACTIVATIONS = {
    "none": lambda x: x,
    "relu": torch.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}
GATED = {f"{name}_gated": ACTIVATIONS[name] for name in ("silu", "gelu", "gelu_tanh")}

# Columns of the stream that one entry of `sumsq` covers.
SUMSQ_COLUMNS = 32


def norm_linear(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    sumsq: Tensor | None,
    n_scaled: int,
    activation: str,
    divisor: float,
    eps: float,
) -> Tensor:
    """`[act(rms(h) Wᵀ + bias) | h Fᵀ]` in float64, rounded once to h's dtype; see `slicegpt.ops.norm_linear`."""
    product = h.double() @ weight.double().mT
    sums = h.double().square() if sumsq is None else sumsq.double()
    scale = (sums.sum(dim=1, keepdim=True) / divisor + eps).rsqrt()
    pre = product[:, :n_scaled] * scale
    if bias is not None:
        pre += bias.double()
    return torch.cat((activate(pre, activation), product[:, n_scaled:]), dim=1).to(h.dtype)


def activate(pre: Tensor, activation: str) -> Tensor:
    """The activation of [..., n], of n / 2 columns where it is gated: `act(first half) * second half`."""
    if activation in GATED:
        gate, up = pre.chunk(2, dim=-1)
        return GATED[activation](gate) * up
    return ACTIVATIONS[activation](pre)


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


def norm_linear_columns(weight: Tensor, n_scaled: int, activation: str) -> int:
    """Columns of `norm_linear`'s output: a gate and its values make one."""
    return weight.shape[0] - (n_scaled // 2 if activation in GATED else 0)


def norm_linear_output(h: Tensor, weight: Tensor, n_scaled: int, activation: str) -> Tensor:
    """An empty output of `norm_linear`."""
    return h.new_empty((h.shape[0], norm_linear_columns(weight, n_scaled, activation)))


def rotate_add_outputs(a: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Empty outputs of `rotate_add`: the next stream, and its sums of squares."""
    h_next = a.new_empty((a.shape[0], weight.shape[0]))
    return h_next, sumsq_output(h_next)


def sumsq_output(h: Tensor) -> Tensor:
    """An empty [T, ceil(d / 32)] for the sums of squares of a stream [T, d]."""
    blocks = (h.shape[1] + SUMSQ_COLUMNS - 1) // SUMSQ_COLUMNS
    return h.new_empty((h.shape[0], blocks), dtype=sumsq_dtype(h.dtype))


def block_sums_of_squares(h: Tensor) -> Tensor:
    """[T, d] -> [T, ceil(d / 32)]: the sum of squares over every 32 columns, in h's dtype."""
    padded = F.pad(h, (0, -h.shape[1] % SUMSQ_COLUMNS))
    return padded.square().unflatten(1, (-1, SUMSQ_COLUMNS)).sum(dim=2)


def sumsq_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of the sums of squares of a stream: float32, float64 for a float64 stream."""
    return float64 if dtype == float64 else torch.float32


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


def decode_attention_(
    rows: Tensor,
    keys: Tensor,
    values: Tensor,
    valid: Tensor,
    slot: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    norm: Tensor | None,
    heads: int,
    window: int | None,
    norm_eps: float,
) -> None:
    """Attention of one token a row on a cache; the contract is `slicegpt.ops.decode_attention_`."""
    _, key_heads, capacity, head_dim = keys.shape
    new_values, states = attention_states(rows, key_heads, heads, head_dim, norm, norm_eps, cos, sin)
    keys.index_copy_(2, slot, states[:, :key_heads, None])
    values.index_copy_(2, slot, new_values[:, :, None])
    place = torch.arange(capacity, device=rows.device)
    seen = (place <= slot) & valid
    if window is not None:
        seen &= place > slot - window
    attended = one_query_attention(states[:, key_heads:], keys, values, seen[:, None, None])
    rows[:, 2 * key_heads * head_dim :][:, : heads * head_dim] = attended


def attention_states(
    rows: Tensor,
    key_heads: int,
    heads: int,
    head_dim: int,
    norm: Tensor | None,
    norm_eps: float,
    cos: Tensor | None,
    sin: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Of rows [tokens, v | k | q | anything]: v, and k and q normed and rotated, each [tokens, heads, head_dim]."""
    first_key, end = key_heads * head_dim, (2 * key_heads + heads) * head_dim
    values = rows[:, :first_key].view(-1, key_heads, head_dim)
    states = rows[:, first_key:end].view(-1, key_heads + heads, head_dim)
    if norm is not None:
        states = F.rms_norm(states, (head_dim,), None, norm_eps) * norm
    return values, states if cos is None else rotate(states, cos, sin)


def one_query_attention(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of one token a row: queries [batch, heads, head_dim] to [batch, heads * head_dim].

    The query heads that share a key head are so many queries of it.
    """
    grouped = queries.reshape(len(queries), keys.shape[1], -1, keys.shape[3])
    return F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask).reshape(len(queries), -1)


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions for [tokens, heads, head_dim]: turns the first columns.

    cos, sin: [tokens, 1, rotary_dim]; the first half of the sines is negative.
    """
    columns = cos.shape[-1]
    whole = columns == states.shape[-1]
    turned = states if whole else states[..., :columns]
    turned = torch.addcmul(turned * cos, turned.roll(columns // 2, -1), sin)
    return turned if whole else torch.cat((turned, states[..., columns:]), dim=-1)
