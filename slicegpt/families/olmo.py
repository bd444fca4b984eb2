"""OLMo 1: Llama's layout with LayerNorms that have neither scale nor shift.

OLMo 2 and 3 have no norm before a block but one behind it, and norm queries and keys over all heads together.
"""

from dataclasses import replace

from transformers import PreTrainedConfig

from slicegpt.errors import SliceGPTError

from .llama import LLAMA, LLAMA_LAYER, llama_facts, windowed_facts


def olmo_facts(config: PreTrainedConfig) -> dict:
    """Fields of `SlicedConfig` that an OLMo config determines."""
    if config.clip_qkv is not None:
        raise SliceGPTError(
            f"olmo: clip_qkv={config.clip_qkv} is not supported: queries, keys and values must not be clipped",
            "model",
        )
    return llama_facts(config, 1e-5)  # fixed in transformers' OlmoLayerNorm; the config has no such field


OLMO = replace(
    LLAMA, model_type="olmo", architectures=("OlmoForCausalLM",), facts=olmo_facts, mean_subtraction=True
)

# Blocks that read the stream itself and normalise what they write, as EXAONE 4's do.
NORMS_BEHIND_LAYER = replace(
    LLAMA_LAYER,
    attention_norm=None,
    attention_output_norm="post_attention_layernorm",
    mlp_norm=None,
    mlp_output_norm="post_feedforward_layernorm",
)
NORMS_BEHIND = {"pre_norm": False, "post_norm": True}


def olmo2_facts(config: PreTrainedConfig) -> dict:
    """Fields of `SlicedConfig` that an OLMo 2 config determines."""
    return llama_facts(config) | NORMS_BEHIND | {"qk_norm_whole": True}


def olmo3_facts(config: PreTrainedConfig) -> dict:
    """Fields of `SlicedConfig` that an OLMo 3 config determines: windows, and rotary settings by kind of layer."""
    return windowed_facts(config, layered_rotary=True) | NORMS_BEHIND | {"qk_norm_whole": True}


OLMO2 = replace(
    LLAMA,
    model_type="olmo2",
    architectures=("Olmo2ForCausalLM",),
    facts=olmo2_facts,
    layer=NORMS_BEHIND_LAYER,
)
OLMO3 = replace(OLMO2, model_type="olmo3", architectures=("Olmo3ForCausalLM",), facts=olmo3_facts)
