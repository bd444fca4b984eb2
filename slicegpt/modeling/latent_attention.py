"""Multi-head latent attention (MLA): keys and values that are made of a few numbers a token.

The stream is read by two layers: one makes the queries, or a latent of them; the other the latent of keys and values,
and beside it the one part of a key that carries the position, which all heads share. Both latents pass an RMSNorm of
their own, over all of their entries, before they are expanded to the heads: these norms are off the stream, and no
rotation of it reaches them (DeepSeek-AI 2024, arXiv 2405.04434, section 2.1).

The cache holds what transformers' DeepSeek models keep: the latent behind its norm, in the place of keys, and the
rotated part of the key, in that of values, both as one head.
"""

import math
from collections.abc import Callable

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration import SlicedConfig
from .layers import CACHE, Constant, SlicedAttention, apply_rotary, eager_attention
from .quantized import build_linear


def latent_score_scale(config: SlicedConfig) -> float:
    """What scores are multiplied by: the inverse root of a query's entries, and the square of YaRN's `mscale`."""
    scale, rope = (config.qk_nope_head_dim + config.head_dim) ** -0.5, config.rope_parameters
    length = rope.get("mscale_all_dim", 0)
    if rope["rope_type"] != "default" and length and rope["factor"] > 1:
        scale *= (0.1 * length * math.log(rope["factor"]) + 1) ** 2
    return scale


class SlicedLatentAttention(nn.Module):
    """Causal self-attention through a latent, from a boundary of `in_width` columns to one of `out_width`."""

    def __init__(self, config: SlicedConfig, layer_idx: int, in_width: int, out_width: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.cache_index = config.cache_index(layer_idx)
        self.latent, self.rotated = config.kv_lora_rank, config.head_dim
        self.passed, self.value_dim = config.qk_nope_head_dim, config.v_head_dim
        self.num_key_value_groups = 1
        self.scaling = latent_score_scale(config)
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        heads, bias, eps = config.num_attention_heads, config.attention_bias, config.inner_norm_eps
        queries = heads * (self.passed + self.rotated)

        def linear(name: str, *shape: int, bias: bool = False) -> nn.Module:
            return build_linear(config, f"layers.{layer_idx}.self_attn.{name}", *shape, bias=bias)

        self.compresses_queries = config.q_lora_rank is not None
        if self.compresses_queries:
            self.q_a_proj = linear("q_a_proj", in_width, config.q_lora_rank, bias=bias)
            self.q_a_layernorm = nn.RMSNorm(config.q_lora_rank, eps=eps)
            self.q_b_proj = linear("q_b_proj", config.q_lora_rank, queries)
        else:
            self.q_proj = linear("q_proj", in_width, queries)
        self.kv_a_proj_with_mqa = linear(
            "kv_a_proj_with_mqa", in_width, self.latent + self.rotated, bias=bias
        )
        self.kv_a_layernorm = nn.RMSNorm(self.latent, eps=eps)
        self.kv_b_proj = linear("kv_b_proj", self.latent, heads * (self.passed + self.value_dim))
        self.o_proj = linear("o_proj", heads * self.value_dim, out_width, bias=config.attention_output_bias)

    def queries(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[batch, tokens, in_width] to [batch, heads, tokens, entries], not rotated yet."""
        if self.compresses_queries:
            query = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden_states)))
        else:
            query = self.q_proj(hidden_states)
        return query.unflatten(-1, (-1, self.passed + self.rotated)).transpose(1, 2)

    def expand(self, latent: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of every head from the latent [batch, 1, tokens, latent] and the rotated part of the key."""
        heads = self.kv_b_proj(latent.squeeze(1)).unflatten(-1, (-1, self.passed + self.value_dim))
        own, value = heads.transpose(1, 2).split((self.passed, self.value_dim), dim=-1)
        return torch.cat((own, key.expand(-1, own.shape[1], -1, -1)), dim=-1), value

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        cache: Cache | None = kwargs.pop(CACHE, None)
        own, turned = self.queries(hidden_states).split((self.passed, self.rotated), dim=-1)
        query = torch.cat((own, apply_rotary(turned, *position_embeddings)), dim=-1)
        latent, key = self.kv_a_proj_with_mqa(hidden_states).split((self.latent, self.rotated), dim=-1)
        latent = self.kv_a_layernorm(latent).unsqueeze(1)
        key = apply_rotary(key.unsqueeze(1), *position_embeddings)
        if cache is not None:
            latent, key = cache.update(latent, key, self.cache_index, kwargs=kwargs)
        keys, values = self.expand(latent, key)
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention
        )
        output, probabilities = attention_interface(
            self,
            query,
            keys,
            values,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1)), probabilities


def whole_attention(
    config: SlicedConfig, layer: int, in_width: int, out_width: int
) -> SlicedAttention | SlicedLatentAttention:
    """The attention of a layer with the heads that it had before slicing."""
    if config.kv_lora_rank is not None:
        return SlicedLatentAttention(config, layer, in_width, out_width)
    heads = config.num_key_value_heads
    return SlicedAttention(config, layer, in_width, out_width, heads, config.num_attention_heads // heads)


def build_attention(
    config: SlicedConfig, layer: int, in_width: int, out_width: int
) -> SlicedAttention | SlicedLatentAttention | Constant:
    """The attention of a layer, or what is left of one without key/value heads."""
    heads = config.key_value_heads[layer]
    if not heads:
        return Constant(out_width)
    if config.kv_lora_rank is not None:
        return SlicedLatentAttention(config, layer, in_width, out_width)
    return SlicedAttention(config, layer, in_width, out_width, heads, config.group_heads[layer])
