"""The parts of a block: weightless norm, shortcut, rotary embedding, attention, MLP."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2CLS, ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration import SlicedConfig
from .quantized import build_linear

# What transformers calls the cache of keys and values, among arguments and outputs: `past_key_values` before 5.24.
CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"


class WeightlessRMSNorm(nn.Module):
    """`h rsqrt(mean(h²) + eps)` over the last `width` columns; computed in float32 for 16-bit streams."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.width = width
        self.eps = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(hidden_states, (self.width,), None, self.eps)

    def extra_repr(self) -> str:
        return f"{self.width}, eps={self.eps:g}"


class FinalNorm(WeightlessRMSNorm):
    """The last norm of a model with a tied head: it keeps its scale and shift, which that head cannot absorb."""

    def __init__(self, width: int, eps: float, bias: bool):
        super().__init__(width, eps)
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        normed = F.rms_norm(hidden_states, (self.width,), self.weight, self.eps)
        return normed if self.bias is None else normed + self.bias


class CompactShortcut(nn.Module):
    """`h -> [h - (h F) Fᵀ, 0]`, the exact shortcut between two aligned boundaries (see `slicegpt.slicing.rotation`).

    `factor` holds `Fᵀ`, of shape [rank, width]. It is a parameter and no linear layer: it acts twice, once
    transposed, so a low-rank adapter on a linear layer would not mean what it says.
    """

    def __init__(self, width: int, next_width: int, rank: int):
        super().__init__()
        self.padding = next_width - width
        self.factor = nn.Parameter(torch.zeros(rank, width))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        carried = hidden_states - (hidden_states @ self.factor.mT) @ self.factor
        return F.pad(carried, (0, self.padding)) if self.padding else carried

    def extra_repr(self) -> str:
        rank, width = self.factor.shape
        return f"{width} -> {width + self.padding}, rank={rank}"


def stream_matrix(width: int, next_width: int, bias: bool = False) -> nn.Linear:
    """A layer that carries the stream itself from one width to another.

    A fresh one starts as the identity (`SlicedPreTrainedModel._init_weights`): small noise, as elsewhere, would damp
    the stream at every block.
    """
    layer = nn.Linear(width, next_width, bias=bias)
    layer.starts_as_identity = True
    return layer


def build_shortcut(config: SlicedConfig, block: int) -> nn.Module:
    """The module for `h_b -> h_b S_b` at block `block`."""
    kind, width, next_width = config.shortcuts[block], *config.boundary_widths[block : block + 2]
    if kind == "identity":
        return nn.Identity()
    if kind == "compact":
        return CompactShortcut(width, next_width, config.shortcut_rank(block))
    return stream_matrix(width, next_width)


class SlicedRotaryEmbedding(nn.Module):
    """Cosines and sines of the rotary positions, in every variant that transformers knows."""

    def __init__(self, config: SlicedConfig):
        super().__init__()
        self.config = config
        self.max_seq_len_cached = config.max_position_embeddings
        self.original_max_seq_len = config.max_position_embeddings
        self.rope_type = config.rope_parameters["rope_type"]
        initialise = self.compute_default_rope_parameters
        if self.rope_type != "default":
            initialise = ROPE_INIT_FUNCTIONS[self.rope_type]
        inv_freq, self.attention_scaling = initialise(config)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config: SlicedConfig, device=None, **_) -> tuple[torch.Tensor, float]:
        """Inverse frequencies over the rotary part of a head, and the scale 1 (transformers calls this by name)."""
        rotary_dim = int(config.head_dim * config.rope_parameters.get("partial_rotary_factor", 1.0))
        exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float, device=device) / rotary_dim
        return 1.0 / (config.rope_parameters["rope_theta"] ** exponents), 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(
        self, hidden_states: torch.Tensor, position_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # Angles in float32 whatever the model's dtype: a 16-bit position cannot count past 2048 (or 256).
        frequencies = self.inv_freq.to(device=hidden_states.device, dtype=torch.float)
        angles = position_ids[..., None].float() * frequencies
        angles = torch.cat((angles, angles), dim=-1)
        cos, sin = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        return cos.to(hidden_states.dtype), sin.to(hidden_states.dtype)


class LayerRotaryEmbeddings(nn.Module):
    """A `SlicedRotaryEmbedding` for each of `SlicedConfig.rope_settings`."""

    def __init__(self, config: SlicedConfig):
        super().__init__()
        # No `ModuleList`: what runs or places a model layer by layer takes such a list for its layers.
        for index, one in enumerate(config.rope_settings):
            self.add_module(f"setting_{index}", SlicedRotaryEmbedding(config.with_rope(one)))
        self.setting_of_layer = [config.rope_setting(layer) for layer in range(config.num_hidden_layers)]

    def forward(
        self, hidden_states: torch.Tensor, position_ids: torch.Tensor
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Cosines and sines, once for every layer."""
        pairs = [one(hidden_states, position_ids) for one in self.children()]
        return [pairs[setting] for setting in self.setting_of_layer]


def apply_rotary(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the first `cos.shape[-1]` entries of each head of `states` [batch, heads, tokens, head_dim]."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    rotary, passed = states[..., : cos.shape[-1]], states[..., cos.shape[-1] :]
    first, second = rotary.chunk(2, dim=-1)
    rotary = rotary * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((rotary, passed), dim=-1) if passed.shape[-1] else rotary


def query_scale(position_ids: torch.Tensor, beta: float, length: int) -> torch.Tensor:
    """What queries at `position_ids` [batch, tokens] are multiplied by, [batch, 1, tokens, 1] in float32.

    1 up to `length`; beyond, scores would flatten as softmax spreads over more tokens (Llama 4, Ministral 3).
    """
    return (1 + beta * torch.log(1 + torch.floor(position_ids / length)))[:, None, :, None]


def eager_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention written out, for `attn_implementation="eager"`: returns the output and the probabilities.

    Args:
        s_aux: attention sinks [heads], scores that belong to no token, by transformers' name.
    """
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    scores = query @ key.mT * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if attention_mask is not None:
        scores = scores + attention_mask
    if s_aux is not None:
        scores = torch.cat((scores, s_aux.view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)), dim=-1)
    softmax_dtype = torch.promote_types(query.dtype, torch.float32)
    probabilities = F.softmax(scores, dim=-1, dtype=softmax_dtype).to(query.dtype)
    if s_aux is not None:
        probabilities = probabilities[..., :-1]
    output = F.dropout(probabilities, p=dropout, training=module.training) @ value
    return output.transpose(1, 2).contiguous(), probabilities


class Constant(nn.Module):
    """What a deleted attention or MLP leaves: a vector that its block adds to the stream."""

    def __init__(self, width: int):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`hidden_states` with the vector added."""
        return hidden_states + self.bias

    def extra_repr(self) -> str:
        return f"{len(self.bias)}"


class SlicedAttention(nn.Module):
    """Causal self-attention from a boundary of `in_width` columns to one of `out_width`.

    Args:
        key_heads: key/value heads.
        group_heads: query heads that share each of them.
    """

    def __init__(
        self,
        config: SlicedConfig,
        layer_idx: int,
        in_width: int,
        out_width: int,
        key_heads: int,
        group_heads: int,
    ):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.cache_index = config.cache_index(layer_idx)
        self.head_dim = config.head_dim
        self.num_key_value_groups = group_heads
        self.scaling = config.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        sliding = config.attention_types[layer_idx] == "sliding_attention"
        self.sliding_window = config.sliding_window if sliding else None
        self.uses_rope = config.uses_rope(layer_idx)
        self.query_scaling = config.query_scaling
        self.norm_after_rope = config.qk_norm_after_rope
        self.norm_whole = config.qk_norm and config.qk_norm_whole
        softcap = config.attn_logit_softcapping
        self.score_arguments = {} if softcap is None else {"softcap": softcap}

        query_size = key_heads * self.num_key_value_groups * config.head_dim
        key_size = key_heads * config.head_dim

        def linear(name: str, *shape: int, bias: bool) -> nn.Module:
            return build_linear(config, f"layers.{layer_idx}.self_attn.{name}", *shape, bias=bias)

        self.q_proj = linear("q_proj", in_width, query_size, bias=config.attention_bias)
        self.k_proj = linear("k_proj", in_width, key_size, bias=config.attention_bias)
        self.v_proj = linear("v_proj", in_width, key_size, bias=config.attention_bias)
        self.o_proj = linear("o_proj", query_size, out_width, bias=config.attention_output_bias)
        heads = key_heads * self.num_key_value_groups
        self.sinks = nn.Parameter(torch.zeros(heads)) if config.attention_sinks else None
        sizes = (query_size, key_size) if self.norm_whole else (config.head_dim, config.head_dim)
        self.q_norm, self.k_norm = (
            nn.RMSNorm(size, eps=config.inner_norm_eps) if config.qk_norm else nn.Identity() for size in sizes
        )

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        cache: Cache | None = kwargs.pop(CACHE, None)
        shape = hidden_states.shape[:-1]
        heads = (*shape, -1, self.head_dim)
        query, key = self.q_proj(hidden_states), self.k_proj(hidden_states)
        if self.norm_whole:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = query.view(heads), key.view(heads)
        if not (self.norm_after_rope or self.norm_whole):
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = query.transpose(1, 2), key.transpose(1, 2)
        value = self.v_proj(hidden_states).view(heads).transpose(1, 2)
        if self.uses_rope:
            query, key = apply_rotary(query, *position_embeddings), apply_rotary(key, *position_embeddings)
        if self.norm_after_rope:
            query, key = self.q_norm(query), self.k_norm(key)
        if self.query_scaling is not None:
            query = query * query_scale(kwargs["position_ids"], *self.query_scaling).to(query.dtype)
        if cache is not None:
            # A paged cache leaves in kwargs what attention has to know (transformers 5.24).
            key, value = cache.update(key, value, self.cache_index, kwargs=kwargs)

        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention
        )
        output, probabilities = attention_interface(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **self.score_arguments,
            **({} if self.sinks is None else {"s_aux": self.sinks}),
            **kwargs,
        )
        return self.o_proj(output.reshape(*shape, -1)), probabilities


def build_rotary(config: SlicedConfig) -> SlicedRotaryEmbedding | LayerRotaryEmbeddings:
    """The rotary positions of all layers, or of each."""
    return (SlicedRotaryEmbedding if config.layer_rope_parameters is None else LayerRotaryEmbeddings)(config)


def build_output_norm(config: SlicedConfig, part: nn.Module) -> nn.Module:
    """The norm that what `part` writes passes, at the model's full width; the constant of a deleted one passes none."""
    if not config.post_norm or isinstance(part, Constant):
        return nn.Identity()
    return nn.RMSNorm(config.dense_hidden_size, eps=config.inner_norm_eps)


def build_activation(config: SlicedConfig) -> nn.Module:
    """The MLP's activation. The weights of an xIELU have the model's dtype from the start: loading keeps theirs."""
    if config.hidden_act == "xielu":
        return ACT2CLS["xielu"](dtype=config.dtype)
    return ACT2FN[config.hidden_act]


class SlicedMLP(nn.Module):
    """The feed-forward part from a boundary of `in_width` columns to one of `out_width`: `down(act(up(x)))`."""

    def __init__(self, config: SlicedConfig, layer_idx: int, in_width: int, out_width: int, neurons: int):
        super().__init__()

        def linear(name: str, *shape: int, bias: bool) -> nn.Module:
            return build_linear(config, f"layers.{layer_idx}.mlp.{name}", *shape, bias=bias)

        gated = config.gated_mlp
        self.gate_proj = linear("gate_proj", in_width, neurons, bias=config.mlp_bias) if gated else None
        self.up_proj = linear("up_proj", in_width, neurons, bias=config.mlp_bias)
        self.down_proj = linear("down_proj", neurons, out_width, bias=config.mlp_output_bias)
        self.act_fn = build_activation(config)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.up_proj(hidden_states)))


class SlicedGatedMLP(SlicedMLP):
    """`down(act(gate(x)) * up(x))`. A class of its own: vLLM reads the source of `forward` to fuse gate and up."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


def build_mlp(
    config: SlicedConfig, layer_idx: int, in_width: int, out_width: int, neurons: int
) -> SlicedMLP | Constant:
    """The feed-forward part, gated or not as the config says, or what is left of one without neurons."""
    if not neurons:
        return Constant(out_width)
    return (SlicedGatedMLP if config.gated_mlp else SlicedMLP)(
        config, layer_idx, in_width, out_width, neurons
    )
