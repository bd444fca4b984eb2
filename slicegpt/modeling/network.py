"""The one network of the package: `SlicedModel` and `SlicedForCausalLM`, Hugging Face models like any other.

A dense model, a rotated one and a sliced one are the same network at different widths (paper section 3; the
canonical form is set out in the README). With `n_b` the weightless norm of the stream `h_b`:

    h_{b+1} = h_b S_b + block_b(n_b)
"""

import functools

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration import SlicedConfig
from .experts import SlicedExperts, SlicedRouter, build_feed_forward
from .latent_attention import SlicedLatentAttention, build_attention
from .layers import (
    CACHE,
    CompactShortcut,
    Constant,
    FinalNorm,
    SlicedAttention,
    WeightlessRMSNorm,
    build_mlp,
    build_output_norm,
    build_rotary,
    build_shortcut,
    stream_matrix,
)
from .quantized import TABLE_TENSORS, QuantizedWeight, build_embedding, build_linear


def pop_cache(kwargs: dict, past_key_values: Cache | None) -> Cache | None:
    """Take the cache of keys and values out of `kwargs`, or the one that the caller gave by the old name.

    Where that name is the current one, a `cache` among `kwargs` is a paged one, which attention takes for itself.
    """
    cache = kwargs.pop(CACHE, None)
    return past_key_values if cache is None else cache


def build_norm(config: SlicedConfig, boundary: int) -> WeightlessRMSNorm:
    """The weightless norm of the stream at `boundary`."""
    return WeightlessRMSNorm(config.boundary_widths[boundary], config.boundary_eps(boundary))


def build_input_norm(config: SlicedConfig, block: int, part: nn.Module) -> nn.Module | None:
    """What `part` reads the stream through; None for a deleted one, which reads nothing."""
    if isinstance(part, Constant):
        return None
    return build_norm(config, block) if config.pre_norm else nn.Identity()


class SlicedLayer(GradientCheckpointingLayer):
    """A layer of either kind: what `output_hidden_states` records, and counts, is found by this one class."""


class SlicedDecoderLayer(SlicedLayer):
    """Attention and MLP one after the other, each a block with a boundary before it.

    One that was deleted has no norm: its block is a shortcut and a constant.
    """

    def __init__(self, config: SlicedConfig, layer_idx: int):
        super().__init__()
        block = 2 * layer_idx
        entry, middle, leave = config.boundary_widths[block : block + 3]
        self.self_attn = build_attention(config, layer_idx, entry, middle)
        self.input_norm = build_input_norm(config, block, self.self_attn)
        self.attention_output_norm = build_output_norm(config, self.self_attn)
        self.attention_shortcut = build_shortcut(config, block)
        self.mlp = build_feed_forward(config, layer_idx, middle, leave, config.neurons[layer_idx])
        self.mlp_norm = build_input_norm(config, block + 1, self.mlp)
        self.mlp_output_norm = build_output_norm(config, self.mlp)
        self.mlp_shortcut = build_shortcut(config, block + 1)

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        return self.mlp_block(self.attention_block(hidden_states, **kwargs))

    def attention_block(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        """Boundary `2 l` to boundary `2 l + 1`."""
        if self.input_norm is None:
            return self.self_attn(self.attention_shortcut(hidden_states))
        attended, _ = self.self_attn(self.input_norm(hidden_states), **kwargs)
        return self.attention_shortcut(hidden_states) + self.attention_output_norm(attended)

    def mlp_block(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Boundary `2 l + 1` to boundary `2 l + 2`."""
        if self.mlp_norm is None:
            return self.mlp(self.mlp_shortcut(hidden_states))
        written = self.mlp_output_norm(self.mlp(self.mlp_norm(hidden_states)))
        return self.mlp_shortcut(hidden_states) + written


class SlicedParallelDecoderLayer(SlicedLayer):
    """Attention and MLP side by side on one norm (Phi-2): one block, one boundary, one shortcut.

    One that was deleted leaves a constant; without both there is no norm.
    """

    def __init__(self, config: SlicedConfig, layer_idx: int):
        super().__init__()
        entry, leave = config.boundary_widths[layer_idx : layer_idx + 2]
        self.self_attn = build_attention(config, layer_idx, entry, leave)
        self.mlp = build_mlp(config, layer_idx, entry, leave, config.neurons[layer_idx])
        self.attends = not isinstance(self.self_attn, Constant)
        self.feeds = not isinstance(self.mlp, Constant)
        self.input_norm = build_norm(config, layer_idx) if self.attends or self.feeds else None
        self.shortcut = build_shortcut(config, layer_idx)

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        normed = None if self.input_norm is None else self.input_norm(hidden_states)
        carried = self.shortcut(hidden_states)
        carried = carried + self.self_attn(normed, **kwargs)[0] if self.attends else self.self_attn(carried)
        return carried + self.mlp(normed) if self.feeds else self.mlp(carried)


class SlicedPreTrainedModel(PreTrainedModel):
    config_class = SlicedConfig
    config: SlicedConfig
    base_model_prefix = "model"
    model_tags = ["slicegpt"]  # noqa: RUF012
    supports_gradient_checkpointing = True
    _no_split_modules = ["SlicedDecoderLayer", "SlicedParallelDecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["cache", "past_key_values"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": SlicedLayer,
        "attentions": [SlicedAttention, SlicedLatentAttention],
    }

    # A choice between experts is decided by differences of a few thousandths.
    _keep_in_fp32_modules_strict = ["e_score_correction_bias"]  # noqa: RUF012

    @property
    def _supports_sdpa(self) -> bool:
        """PyTorch's attention has no place for sinks and no capped scores, and transformers' use of it passes over a
        cap in silence."""
        return self.config.attn_logit_softcapping is None and not self.config.attention_sinks

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, CompactShortcut):
            init.zeros_(module.factor)
        elif isinstance(module, Constant):
            init.zeros_(module.bias)
        elif isinstance(module, SlicedAttention) and module.sinks is not None:
            init.normal_(module.sinks, std=self.config.initializer_range)
        elif isinstance(module, SlicedExperts | SlicedRouter):
            for name, parameter in module.named_parameters(recurse=False):
                fill = init.zeros_ if name.endswith("bias") else init.normal_
                fill(parameter, **({} if fill is init.zeros_ else {"std": self.config.initializer_range}))
            if isinstance(module, SlicedRouter) and module.e_score_correction_bias is not None:
                init.zeros_(module.e_score_correction_bias)
        elif getattr(module, "starts_as_identity", False):
            # Not `eye_`: it takes the default device, which need not be the weight's (vLLM builds on meta tensors).
            identity = torch.eye(*module.weight.shape, dtype=module.weight.dtype, device=module.weight.device)
            init.copy_(module.weight, identity)
        elif isinstance(module, FinalNorm):
            init.ones_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)


class SlicedModel(SlicedPreTrainedModel):
    """Embedding, blocks and final norm; returns what the head reads, [batch, tokens, `hidden_size`]."""

    def __init__(self, config: SlicedConfig):
        super().__init__(config)
        first, last, dense = config.boundary_widths[0], config.boundary_widths[-1], config.dense_hidden_size
        columns = dense if config.embed_projection else first
        self.embed_tokens = build_embedding(
            config, "embed_tokens", config.vocab_size, columns, config.pad_token_id
        )
        self.embed_projection = stream_matrix(dense, first) if config.embed_projection else nn.Identity()
        self.embed_positions = self.rotary_emb = None
        if config.position_embedding == "learned":
            self.embed_positions = nn.Embedding(
                config.max_position_embeddings + config.position_offset, first
            )
        elif config.position_embedding == "rotary":
            self.rotary_emb = build_rotary(config)
        layer = SlicedParallelDecoderLayer if config.parallel_blocks else SlicedDecoderLayer
        self.layers = nn.ModuleList([layer(config, index) for index in range(config.num_hidden_layers)])
        # Of each layer the kind of its attention, None where it has none.
        self.attention_kinds = [
            kind if heads else None
            for kind, heads in zip(config.attention_types, config.key_value_heads, strict=True)
        ]
        if config.final_norm_weight:
            self.norm = FinalNorm(last, config.boundary_eps(config.num_blocks), config.final_norm_bias)
        else:
            self.norm = build_norm(config, config.num_blocks)
        self.head_projection = (
            stream_matrix(last, dense, config.final_norm_bias) if config.head_projection else nn.Identity()
        )
        self.gradient_checkpointing = False
        self.post_init()

    def embed(self, inputs_embeds: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """The stream at boundary 0 from rows of the embedding table and their positions."""
        hidden_states = self.embed_projection(inputs_embeds)
        if self.embed_positions is not None:
            hidden_states = hidden_states + self.embed_positions(position_ids + self.config.position_offset)
        return hidden_states

    def block_inputs(
        self,
        hidden_states: torch.Tensor,
        position_ids: torch.Tensor,
        attention_mask: torch.Tensor | dict | None,
        cache: Cache | None = None,
    ) -> tuple[dict[str, torch.Tensor | None], list[tuple[torch.Tensor, torch.Tensor] | None]]:
        """An attention mask per layer type, and of each layer the rotary cosines and sines."""
        masks = attention_mask
        if not isinstance(attention_mask, dict):
            common = {
                "config": self.config,
                "inputs_embeds": hidden_states,
                "attention_mask": attention_mask,
                CACHE: cache,
                "position_ids": position_ids,
            }
            makers = {
                "full_attention": create_causal_mask,
                "sliding_attention": create_sliding_window_causal_mask,
            }
            masks = {kind: makers[kind](**common) for kind in set(self.config.attention_types)}
        rotary = None if self.rotary_emb is None else self.rotary_emb(hidden_states, position_ids)
        return masks, rotary if isinstance(rotary, list) else [rotary] * len(self.layers)

    def default_position_ids(
        self, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor | None, past_length: int
    ) -> torch.Tensor:
        """Positions where the caller gives none.

        Learned positions count the tokens that are not padding (left-padded rows start at 0; padding itself
        takes position -1, which `position_offset` brings into the table). Rotary ones count columns, as in
        transformers: most networks see nothing but their differences, and `generate` gives the others theirs.
        """
        batch, length = inputs_embeds.shape[:2]
        if (
            self.embed_positions is not None
            and isinstance(attention_mask, torch.Tensor)
            and attention_mask.ndim == 2
        ):
            mask = attention_mask.long()
            positions = mask.cumsum(dim=1) * mask - 1
            return positions[:, past_length:].clamp(min=-self.config.position_offset)
        return (torch.arange(length, device=inputs_embeds.device) + past_length).expand(batch, -1)

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """The stream behind the last block, [batch, tokens, d]."""
        cache = pop_cache(kwargs, past_key_values)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if position_ids is None:
            past_length = cache.get_seq_length() if cache is not None else 0
            position_ids = self.default_position_ids(inputs_embeds, attention_mask, past_length)

        hidden_states = self.embed(inputs_embeds, position_ids)
        masks, rotary = self.block_inputs(hidden_states, position_ids, attention_mask, cache)
        for kind, angles, layer in zip(self.attention_kinds, rotary, self.layers, strict=True):
            hidden_states = layer(
                hidden_states,
                attention_mask=None if kind is None else masks[kind],
                position_embeddings=angles,
                position_ids=position_ids,
                use_cache=use_cache,
                **{CACHE: cache},
                **kwargs,
            )
        hidden_states = self.head_projection(self.norm(hidden_states))
        return BaseModelOutputWithPast(last_hidden_state=hidden_states, **{CACHE: cache})


class SlicedForCausalLM(SlicedPreTrainedModel, GenerationMixin):
    """The canonical network with a language-modelling head. Load it with `from_pretrained`, use `generate()`."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}  # noqa: RUF012

    def __init__(self, config: SlicedConfig):
        super().__init__(config)
        self.model = SlicedModel(config)
        self.lm_head = build_linear(
            config, "lm_head", config.hidden_size, config.vocab_size, bias=config.lm_head_bias
        )
        if isinstance(self.lm_head, QuantizedWeight):
            # A packed table is several tensors, and all of them are shared.
            self._tied_weights_keys = {
                f"lm_head.{name}": f"model.embed_tokens.{name}" for name in TABLE_TENSORS
            }
        self.post_init()

    def _get_static_cache_init_shape(self):
        """transformers allocates a static cache before the first token where this tells the heads of its layers; where
        they differ, or keep a latent in place of keys and values, the first token does it."""
        if not self.config.keeps_all_heads or self.config.kv_lora_rank is not None:
            return None
        return super()._get_static_cache_init_shape()

    def init_continuous_batching(self, *args, **kwargs):
        """transformers' continuous batching, whose paged cache has the same heads in every layer.

        Raises:
            ValueError: heads are deleted, or a latent is cached in place of keys and values.
        """
        if self.config.kv_lora_rank is not None:
            raise ValueError(
                "generate_batch: a paged cache holds keys and values of one size, and this model's latent attention"
                f" keeps {self.config.kv_lora_rank} and {self.config.head_dim} numbers a token; use generate"
            )
        if not self.config.keeps_all_heads:
            raise ValueError(
                "generate_batch: layers must have all of their heads, got layer_key_value_heads="
                f"{self.config.layer_key_value_heads} and layer_group_heads={self.config.layer_group_heads}; use "
                "generate, slicegpt.Runtime or vLLM"
            )
        return super().init_continuous_batching(*args, **kwargs)

    # `generate` reads in this method's signature what it may pass: a cache, by the name of the release, and embeddings.
    @functools.wraps(GenerationMixin.prepare_inputs_for_generation, assigned=())
    def prepare_inputs_for_generation(self, input_ids, next_sequence_length=None, **kwargs):
        """The inputs of one forward pass.

        LongRoPE turns the keys of a sequence that outgrows its original length by other frequencies, all of them:
        they are computed anew.
        """
        original, cache = self.config.longrope_length, kwargs.get(CACHE)
        if None not in (original, cache):
            embeds, past = kwargs.get("inputs_embeds"), cache.get_seq_length()
            given = embeds if embeds is not None and kwargs.get("is_first_iteration") else input_ids
            new = given.shape[1] if next_sequence_length is None else next_sequence_length
            if 0 < past <= original < past + new:
                kwargs |= self._whole_sequence(input_ids, embeds, past + new) | {CACHE: None}
                next_sequence_length = None
        return super().prepare_inputs_for_generation(input_ids, next_sequence_length, **kwargs)

    def _whole_sequence(self, input_ids: torch.Tensor, embeds: torch.Tensor | None, length: int) -> dict:
        """Arguments for all `length` tokens: none where `input_ids` hold them, else their embeddings, given and new."""
        known = input_ids.shape[1]
        if embeds is None and known >= length:
            return {}
        written = 0 if embeds is None else length - embeds.shape[1]
        if embeds is None or not 0 <= written <= known:
            raise ValueError(
                f"generate: a sequence of {length} tokens outgrows LongRoPE's {self.config.longrope_length}; its keys "
                f"are computed anew, so all of them are needed beside the cache, got {known}"
            )
        new = self.get_input_embeddings()(input_ids[:, known - written :])
        return {"inputs_embeds": torch.cat((embeds, new), dim=1), "is_first_iteration": True}

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Logits [batch, tokens, vocab_size]; with `labels`, the mean next-token loss as well.

        `logits_to_keep`: compute only the last so many positions, or those given (0 computes all).
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **{CACHE: pop_cache(kwargs, past_key_values)},
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, keep, :])
        if (cap := self.config.final_logit_softcapping) is not None:
            logits = torch.tanh(logits / cap) * cap
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            **{CACHE: getattr(outputs, CACHE)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
