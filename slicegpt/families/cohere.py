"""Command R (Cohere): attention and MLP in parallel on one LayerNorm, rotary pairs of neighbours, scaled logits."""

import math
from dataclasses import replace

from transformers import PreTrainedConfig

from slicegpt.errors import SliceGPTError

from .base import Norm
from .llama import LLAMA, LLAMA_LAYER, llama_facts
from .rewriting import pairs_of_neighbours, scale_norm


def cohere_facts(config: PreTrainedConfig) -> dict:
    """Fields of `SlicedConfig` that a Cohere config determines."""
    if config.use_qk_norm:
        raise SliceGPTError(
            "cohere: use_qk_norm=True (Command R+) is not supported: it normalises every head by a LayerNorm of its "
            "own",
            "model",
        )
    if not 0 < abs(config.logit_scale) < math.inf:
        raise SliceGPTError(f"cohere: logit_scale must be finite and not 0, got {config.logit_scale}")
    return llama_facts(config, config.layer_norm_eps) | {"parallel_blocks": True}


def fold_logits(norm: Norm, config: PreTrainedConfig) -> Norm:
    """Logits are multiplied by a factor; a tied head cannot take it, so the norm before it does."""
    return scale_norm(norm, config.logit_scale)


COHERE = replace(
    LLAMA,
    model_type="cohere",
    architectures=("CohereForCausalLM",),
    facts=cohere_facts,
    layer=replace(LLAMA_LAYER, mlp_norm="input_layernorm"),
    mean_subtraction=True,
    rewrite_layer=pairs_of_neighbours,
    rewrite_final_norm=fold_logits,
)
