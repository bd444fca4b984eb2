"""Attention of one token a row in PyTorch operators: norm, rotation, and one query's attention on a cache."""

import torch
import torch.nn.functional as F
from torch import Tensor


def attention_states(
    rows: Tensor,
    key_heads: int,
    heads: int,
    head_dim: int,
    norm: Tensor | None,
    norm_eps: float,
    cos: Tensor | None,
    sin: Tensor | None,
    rotate_first: bool = False,
) -> tuple[Tensor, Tensor]:
    """Of rows [tokens, v | k | q | anything]: v, and k and q normed and rotated, each [tokens, heads, head_dim]."""
    first_key, end = key_heads * head_dim, (2 * key_heads + heads) * head_dim
    values = rows[:, :first_key].view(-1, key_heads, head_dim)
    states = rows[:, first_key:end].view(-1, key_heads + heads, head_dim)
    if rotate_first and cos is not None:
        states = rotate(states, cos, sin)
    if norm is not None:
        states = F.rms_norm(states, (head_dim,), None, norm_eps) * norm
    return values, states if cos is None or rotate_first else rotate(states, cos, sin)


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
