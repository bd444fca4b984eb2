"""Granite 3: Llama's layout with four factors: on the embedding, on what blocks write, on scores and on logits."""

import math
from dataclasses import replace

from transformers import PreTrainedConfig

from slicegpt.errors import SliceGPTError

from .base import DenseLayer, Norm, head_dim_of
from .llama import LLAMA, llama_facts
from .rewriting import scale_linear, scale_norm, scale_writers


def granite_facts(config: PreTrainedConfig) -> dict:
    """Fields of `SlicedConfig` that a Granite config determines; the stream is in units of the embedding's factor."""
    # A negative factor of the embedding would turn the sign of what the norms give.
    for name in ("embedding_multiplier", "attention_multiplier"):
        if not 0 < getattr(config, name) < math.inf:
            raise SliceGPTError(f"granite: {name} must be finite and above 0, got {getattr(config, name)}")
    if not 0 < abs(config.logits_scaling) < math.inf:
        raise SliceGPTError(f"granite: logits_scaling must be finite and not 0, got {config.logits_scaling}")
    if not math.isfinite(config.residual_multiplier):
        raise SliceGPTError(f"granite: residual_multiplier must be finite, got {config.residual_multiplier}")
    return llama_facts(config, config.rms_norm_eps / config.embedding_multiplier**2)


def fold_factors(layer: DenseLayer, config: PreTrainedConfig) -> DenseLayer:
    """The factors of embedding and blocks go into the writers, that of the scores into the queries."""
    layer = replace(layer, q=scale_linear(layer.q, config.attention_multiplier * head_dim_of(config) ** 0.5))
    return scale_writers(layer, config.residual_multiplier / config.embedding_multiplier)


def fold_logits(norm: Norm, config: PreTrainedConfig) -> Norm:
    """Logits are divided by a factor; a tied head cannot take it, so the norm before it does."""
    return scale_norm(norm, 1 / config.logits_scaling)


GRANITE = replace(
    LLAMA,
    model_type="granite",
    architectures=("GraniteForCausalLM",),
    facts=granite_facts,
    rewrite_layer=fold_factors,
    rewrite_final_norm=fold_logits,
)
