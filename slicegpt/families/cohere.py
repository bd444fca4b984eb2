"""Cohere's Command: attention and MLP in parallel on one LayerNorm, rotary pairs of neighbours, scaled logits.

Command R7B and A (Cohere 2) have rotary positions only in the layers with a window.
"""

import math
from dataclasses import replace

from transformers import PreTrainedConfig

from slicegpt.errors import SliceGPTError

from .base import Norm, StockForm
from .llama import LLAMA, LLAMA_LAYER, llama_facts, windowed_facts
from .rewriting import back_to_neighbours, pairs_of_neighbours, scale_norm


def cohere_facts(config: PreTrainedConfig) -> dict:
    """Fields of `SlicedConfig` that a Cohere config determines."""
    if config.use_qk_norm:
        raise SliceGPTError(
            "cohere: use_qk_norm=True (Command R+) is not supported: it normalises every head by a LayerNorm of its "
            "own",
            "model",
        )
    return llama_facts(config, config.layer_norm_eps) | parallel_blocks(config)


def parallel_blocks(config: PreTrainedConfig) -> dict:
    """What both generations have in common."""
    scale = config.logit_scale
    if not 0 < abs(scale) < math.inf:
        raise SliceGPTError(f"{config.model_type}: logit_scale must be finite and not 0, got {scale}")
    return {"parallel_blocks": True}


def cohere2_facts(config: PreTrainedConfig) -> dict:
    """Fields of `SlicedConfig` that a Cohere 2 config determines."""
    turned = [int(kind == "sliding_attention") for kind in config.layer_types]
    facts = windowed_facts(config, config.layer_norm_eps)
    return facts | parallel_blocks(config) | {"no_rope_layers": turned}


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
    stock=StockForm(fields=lambda config: {"logit_scale": 1.0}, restore_layer=back_to_neighbours),
)
COHERE2 = replace(COHERE, model_type="cohere2", architectures=("Cohere2ForCausalLM",), facts=cohere2_facts)
