"""OLMo 1: Llama's layout with LayerNorms that have neither scale nor shift. (OLMo 2 normalises what blocks write.)"""

from dataclasses import replace

from transformers import PreTrainedConfig

from slicegpt.errors import SliceGPTError

from .llama import LLAMA, llama_facts


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
