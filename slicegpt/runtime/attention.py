"""Attention of a prompt's tokens through PyTorch's `scaled_dot_product_attention`."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right


def prompt_attention(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(queries keysᵀ / sqrt(head_dim)) values, for the last tokens of a sequence, or for all of them.

    Args:
        queries: [batch, heads, tokens, head_dim].
        keys, values: [batch, key heads, seen, head_dim], of these tokens and the ones before them.
        mask: bool [batch or 1, 1, tokens, seen], True where a token attends, or what `causal_mask` returns.

    Returns:
        [batch, heads, tokens, head_dim].
    """
    grouped = queries.shape[1] != keys.shape[1]
    # On a GPU FlashAttention supports grouped heads but no mask, and the memory-efficient kernel masks but no groups.
    if grouped and type(mask) is Tensor and _on_gpu(queries):
        keys, values = (
            states.repeat_interleave(queries.shape[1] // keys.shape[1], dim=1) for states in (keys, values)
        )
        grouped = False
    return F.scaled_dot_product_attention(
        queries, keys, values, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped
    )


def capped_attention(
    queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, softcap: float
) -> Tensor:
    """`prompt_attention` with scores capped by a tanh (Gemma 2), written out: PyTorch's operator has no such scores.

    mask: bool, as there; None: every token attends to all keys.
    """
    batch, heads, tokens, size = queries.shape
    grouped = queries.reshape(batch, keys.shape[1], -1, size)
    scores = softcap * torch.tanh(grouped @ keys.mT * (size**-0.5 / softcap))
    scores = scores.view(batch, heads, tokens, -1)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    shares = scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(values.dtype)
    return (shares.view(batch, keys.shape[1], -1, shares.shape[-1]) @ values).view(batch, heads, tokens, size)


def causal_mask(tokens: int, seen: int, like: Tensor) -> Tensor | None:
    """The causal mask of the last `tokens` of `seen` tokens, in a form that `prompt_attention` takes.

    None where these are all tokens (`is_causal` then says the same). Else on a GPU PyTorch's `causal_lower_right`, by
    which FlashAttention skips masked blocks, and elsewhere bool [1, 1, tokens, seen].
    """
    if tokens == seen:
        return None
    if _on_gpu(like):
        return causal_lower_right(tokens, seen)
    columns = torch.arange(seen, device=like.device)
    return (columns <= columns[seen - tokens :, None])[None, None]


def _on_gpu(tensor: Tensor) -> bool:
    return tensor.is_cuda
