"""Granite: Llama's layout with four factors: on the embedding, on what blocks write, on scores and on logits.

Granite 4's dense models have gate and up in one matrix, and the larger ones no positions at all. Granite-SWA has
windows, attention sinks and a rotary base of each layer's own.
"""

import math
from dataclasses import replace

from transformers import PreTrainedConfig

from slicegpt.errors import SliceGPTError

from .base import DenseLayer, Norm, StockForm, head_dim_of
from .checks import layer_rotary_facts
from .llama import LLAMA, LLAMA_LAYER, llama_facts
from .rewriting import fuse_gate, scale_linear, scale_norm, scale_writers, split_rows


def granite_facts(config: PreTrainedConfig) -> dict:
    """Fields of `SlicedConfig` that a Granite config determines; the stream is in units of the embedding's factor."""
    # A negative factor of the embedding would turn the sign of what the norms give.
    kind = config.model_type
    for name in ("embedding_multiplier", "attention_multiplier"):
        if not 0 < getattr(config, name) < math.inf:
            raise SliceGPTError(f"{kind}: {name} must be finite and above 0, got {getattr(config, name)}")
    if not 0 < abs(config.logits_scaling) < math.inf:
        raise SliceGPTError(f"{kind}: logits_scaling must be finite and not 0, got {config.logits_scaling}")
    if not math.isfinite(config.residual_multiplier):
        raise SliceGPTError(f"{kind}: residual_multiplier must be finite, got {config.residual_multiplier}")
    return llama_facts(config, config.rms_norm_eps / config.embedding_multiplier**2)


def fold_factors(layer: DenseLayer, config: PreTrainedConfig) -> DenseLayer:
    """The factors of embedding and blocks go into the writers, that of the scores into the queries."""
    layer = replace(layer, q=scale_linear(layer.q, config.attention_multiplier * head_dim_of(config) ** 0.5))
    return scale_writers(layer, config.residual_multiplier / config.embedding_multiplier)


def fold_logits(norm: Norm, config: PreTrainedConfig) -> Norm:
    """Logits are divided by a factor; a tied head cannot take it, so the norm before it does."""
    return scale_norm(norm, 1 / config.logits_scaling)


def without_factors(config: PreTrainedConfig) -> dict:
    """The config's fields where the weights hold the factors."""
    return {
        "embedding_multiplier": 1.0,
        "attention_multiplier": head_dim_of(config) ** -0.5,
        "residual_multiplier": 1.0,
        "logits_scaling": 1.0,
    }


GRANITE = replace(
    LLAMA,
    model_type="granite",
    architectures=("GraniteForCausalLM",),
    facts=granite_facts,
    rewrite_layer=fold_factors,
    stock=StockForm(fields=without_factors),
    rewrite_final_norm=fold_logits,
)


def granite4_facts(config: PreTrainedConfig) -> dict:
    """Fields of `SlicedConfig` that a Granite 4 config determines; experts and state-space layers are refused."""
    if config.num_local_experts:
        raise SliceGPTError(
            f"granitemoehybrid: num_local_experts={config.num_local_experts} is not supported: the MLPs must be dense,"
            " without experts",
            "model",
        )
    if set(config.layer_types) != {"full_attention"}:
        raise SliceGPTError(
            f"granitemoehybrid: layer_types must be of 'full_attention', got {sorted(set(config.layer_types))}: a"
            " state-space layer is no attention",
            "model",
        )
    facts = granite_facts(config) | {"intermediate_size": config.shared_intermediate_size}
    return facts if config.position_embedding_type == "rope" else facts | {"position_embedding": "none"}


def granite_swa_facts(config: PreTrainedConfig) -> dict:
    """Fields of `SlicedConfig` that a Granite-SWA config determines; a base of 0 stands for no rotary positions."""
    bases, rope = config.layer_rope_theta[: config.num_hidden_layers], dict(config.rope_parameters)
    turned = [base for base in bases if base]
    facts = granite_facts(config) | {
        "sliding_window": config.sliding_window,
        "layer_types": list(config.layer_types),
        "attention_sinks": True,
    }
    if len(bases) < config.num_hidden_layers or not all(0 <= base < math.inf for base in bases):
        raise SliceGPTError(
            f"granite_swa: layer_rope_theta must hold {config.num_hidden_layers} numbers of at least 0, one a layer,"
            f" got {bases}"
        )
    if not turned:
        return facts | {"position_embedding": "none"}
    settings = [rope | {"rope_theta": base or turned[0]} for base in bases]
    facts |= layer_rotary_facts(config, head_dim_of(config), settings)
    return facts | {"no_rope_layers": [int(bool(base)) for base in bases]}


def split_shared_mlp(layer: DenseLayer, config: PreTrainedConfig) -> DenseLayer:
    """Gate and up lie one below the other in one matrix; then as `fold_factors`."""
    gate, up = split_rows(layer.up, config.shared_intermediate_size, config.shared_intermediate_size)
    return fold_factors(replace(layer, gate=gate, up=up), config)


def join_shared_mlp(layer: DenseLayer, config: PreTrainedConfig) -> DenseLayer:
    """Gate and up in one matrix again; the factors stay in the weights."""
    return fuse_gate(layer)


GRANITE4 = replace(
    GRANITE,
    model_type="granitemoehybrid",
    architectures=("GraniteMoeHybridForCausalLM",),
    facts=granite4_facts,
    layer=replace(
        LLAMA_LAYER,
        gate="shared_mlp.input_linear",
        up="shared_mlp.input_linear",
        down="shared_mlp.output_linear",
    ),
    rewrite_layer=split_shared_mlp,
    stock=StockForm(
        neurons="shared_intermediate_size", fields=without_factors, restore_layer=join_shared_mlp
    ),
)
GRANITE_SWA = replace(
    GRANITE,
    model_type="granite_swa",
    architectures=("GraniteSWAForCausalLM",),
    facts=granite_swa_facts,
    layer=replace(LLAMA_LAYER, q_norm=None, k_norm=None, sinks="self_attn.sinks"),
)
