"""Attention of the tokens of a prompt, by the kernel of PyTorch's that suits the device."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right


def prompt_attention(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(queries keysᵀ / sqrt(head_dim)) values, for the last tokens of a sequence or all of them.

    Args:
        queries: [batch, heads, tokens, head_dim].
        keys, values: [batch, key heads, seen, head_dim], of the tokens and those before them.
        mask: what each token sees, bool [batch or 1, 1, tokens, seen], or `causal_mask`'s.

    Returns:
        [batch, heads, tokens, head_dim].
    """
    grouped = queries.shape[1] != keys.shape[1]
    # On a GPU FlashAttention takes groups of heads but no mask; the next best takes masks but no groups.
    if grouped and type(mask) is Tensor and _on_gpu(queries):
        keys, values = (
            states.repeat_interleave(queries.shape[1] // keys.shape[1], dim=1) for states in (keys, values)
        )
        grouped = False
    return F.scaled_dot_product_attention(
        queries, keys, values, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped
    )


def causal_mask(tokens: int, seen: int, like: Tensor) -> Tensor | None:
    """Where the last `tokens` of `seen` tokens each see all before them: a mask, or what stands for it.

    None: there are no others. On a GPU it is a description, by which FlashAttention skips what is not seen; elsewhere
    bool [1, 1, tokens, seen].
    """
    if tokens == seen:
        return None
    if _on_gpu(like):
        return causal_lower_right(tokens, seen)
    columns = torch.arange(seen, device=like.device)
    return (columns <= columns[seen - tokens :, None])[None, None]


def _on_gpu(tensor: Tensor) -> bool:
    return tensor.is_cuda
