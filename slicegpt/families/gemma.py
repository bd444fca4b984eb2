"""Gemma: Llama's layout; norms scale by `1 + w`, and the embedding is multiplied by `sqrt(D)`.

Gemma 2 and 3 normalise what a block writes as well. Gemma 2 caps scores and logits, Gemma 3 norms queries and keys and
turns them by other frequencies in the layers with a window.
"""

import math
from dataclasses import replace

import torch
from transformers import PreTrainedConfig

from slicegpt.errors import SliceGPTError

from .base import DenseLayer, StockForm, head_dim_of
from .llama import LLAMA, LLAMA_LAYER, llama_facts, windowed_facts
from .rewriting import one_plus, one_plus_all, one_plus_norms, scale_linear, scale_output_norms, scale_writers


def check_causal(config: PreTrainedConfig) -> None:
    if getattr(config, "use_bidirectional_attention", None):
        raise SliceGPTError(
            f"{config.model_type}: use_bidirectional_attention=True is not supported: attention must be causal",
            "model",
        )


def gemma_facts(config: PreTrainedConfig) -> dict:
    """Fields of `SlicedConfig` that a Gemma config determines; the stream is carried in units of `sqrt(D)`."""
    check_causal(config)
    return llama_facts(config, config.rms_norm_eps / config.hidden_size)


def fold_scales(layer: DenseLayer, config: PreTrainedConfig) -> DenseLayer:
    """See `scale_writers`."""
    return scale_writers(one_plus_norms(layer), 1 / _root(layer, config))


def unfold_scales(layer: DenseLayer, config: PreTrainedConfig) -> DenseLayer:
    """Undoes the scaling of the writers, by the root of the width that the config has now."""
    return scale_writers(layer, _root(layer, config))


def _root(layer: DenseLayer, config: PreTrainedConfig) -> float:
    """The root of the width; transformers multiplies by it as the model's dtype rounds it."""
    return torch.tensor(config.hidden_size**0.5, dtype=torch.float64).to(layer.o.weight.dtype).item()


GEMMA = replace(
    LLAMA,
    model_type="gemma",
    architectures=("GemmaForCausalLM",),
    facts=gemma_facts,
    rewrite_layer=fold_scales,
    rewrite_final_norm=one_plus,
    stock=StockForm(eps_factor=float, restore_layer=unfold_scales, norm_offset=-1.0),
)


def gemma2_facts(config: PreTrainedConfig, layered_rotary: bool = False) -> dict:
    """Fields of `SlicedConfig` that a Gemma 2 config determines; the stream is in the same units."""
    check_causal(config)
    scalar = config.query_pre_attn_scalar
    if not 0 < scalar < math.inf:
        raise SliceGPTError(
            f"{config.model_type}: query_pre_attn_scalar must be finite and above 0, got {scalar}"
        )
    eps = config.rms_norm_eps
    facts = windowed_facts(
        config, eps / config.hidden_size, activation="hidden_activation", layered_rotary=layered_rotary
    )
    return facts | {
        "post_norm": True,
        "inner_norm_eps": eps,
        "attn_logit_softcapping": config.attn_logit_softcapping,
        "final_logit_softcapping": config.final_logit_softcapping,
    }


def gemma3_facts(config: PreTrainedConfig) -> dict:
    """Fields of `SlicedConfig` that a Gemma 3 config determines; transformers never caps its scores."""
    return gemma2_facts(config, layered_rotary=True) | {"attn_logit_softcapping": None}


def fold_gemma2(layer: DenseLayer, config: PreTrainedConfig) -> DenseLayer:
    """The embedding's factor goes into the norms behind the blocks, that of the scores into the queries' weights, or
    into the norm behind them."""
    layer = scale_output_norms(one_plus_all(layer), 1 / _root(layer, config))
    factor = (head_dim_of(config) / config.query_pre_attn_scalar) ** 0.5
    if factor == 1:
        return layer
    if layer.q_norm is not None:
        return replace(layer, q_norm=layer.q_norm * factor)
    return replace(layer, q=scale_linear(layer.q, factor))


GEMMA2 = replace(
    GEMMA,
    model_type="gemma2",
    architectures=("Gemma2ForCausalLM",),
    facts=gemma2_facts,
    layer=replace(
        LLAMA_LAYER,
        attention_output_norm="post_attention_layernorm",
        mlp_norm="pre_feedforward_layernorm",
        mlp_output_norm="post_feedforward_layernorm",
        q_norm=None,
        k_norm=None,
    ),
    rewrite_layer=fold_gemma2,
)
GEMMA3 = replace(
    GEMMA2,
    model_type="gemma3_text",
    architectures=("Gemma3ForCausalLM",),
    facts=gemma3_facts,
    layer=replace(GEMMA2.layer, q_norm="self_attn.q_norm", k_norm="self_attn.k_norm"),
)
