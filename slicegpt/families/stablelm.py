"""StableLM: Llama's layout with LayerNorms and partial rotary; attention and MLP in parallel in some sizes."""

from dataclasses import replace

from transformers import PreTrainedConfig

from slicegpt.errors import SliceGPTError

from .base import DenseLayer
from .checks import check_head_dim
from .llama import LLAMA, llama_facts


def stablelm_facts(config: PreTrainedConfig) -> dict:
    """Fields of `SlicedConfig` that a StableLM config determines."""
    if config.qk_layernorm:
        raise SliceGPTError(
            "stablelm: qk_layernorm=True (StableLM 2 12B) is not supported: it normalises every head by a LayerNorm "
            "of its own",
            "model",
        )
    check_head_dim(config)
    facts = llama_facts(config, config.layer_norm_eps, partial_rotary=True)
    return facts | {"parallel_blocks": config.use_parallel_residual}


def share_norm(layer: DenseLayer, config: PreTrainedConfig) -> DenseLayer:
    """Parallel blocks have one norm."""
    return replace(layer, mlp_norm=layer.attention_norm) if config.use_parallel_residual else layer


STABLELM = replace(
    LLAMA,
    model_type="stablelm",
    architectures=("StableLmForCausalLM",),
    facts=stablelm_facts,
    mean_subtraction=True,
    rewrite_layer=share_norm,
)
