"""Mistral: Llama's layout with a sliding attention window; Ministral 8B and CWM: with a window in some layers.

Ministral 3's queries grow with their position, past the length that it was trained on first.
"""

import math
from dataclasses import replace

from transformers import PreTrainedConfig

from slicegpt.errors import SliceGPTError

from .llama import LLAMA, llama_facts, windowed_facts


def mistral_facts(config: PreTrainedConfig) -> dict:
    """Fields of `SlicedConfig` that a Mistral config determines."""
    return llama_facts(config) | {"sliding_window": config.sliding_window}


def ministral_facts(config: PreTrainedConfig) -> dict:
    """Fields of `SlicedConfig` that a Ministral config determines; without a window transformers fails."""
    if config.sliding_window is None:
        raise SliceGPTError("ministral: sliding_window must be a number of tokens, got None")
    return windowed_facts(config)


def ministral3_facts(config: PreTrainedConfig) -> dict:
    """Fields of `SlicedConfig` that a Ministral 3 config determines."""
    facts, name = mistral_facts(config), "llama_4_scaling_beta"
    beta = config.rope_parameters.get(name)
    if not (isinstance(beta, int | float) and math.isfinite(beta)):
        raise SliceGPTError(f"ministral3: rope_parameters: {name} must be a number, got {beta!r}")
    length = config.rope_parameters.get("original_max_position_embeddings")
    if not (isinstance(length, int) and length > 0):
        raise SliceGPTError(
            "ministral3: rope_parameters: original_max_position_embeddings must be a whole number of at least 1, got"
            f" {length!r}"
        )
    return facts | {"rope_parameters": facts["rope_parameters"] | {name: float(beta)}}


MISTRAL = replace(LLAMA, model_type="mistral", architectures=("MistralForCausalLM",), facts=mistral_facts)
MINISTRAL = replace(
    LLAMA, model_type="ministral", architectures=("MinistralForCausalLM",), facts=ministral_facts
)
CWM = replace(LLAMA, model_type="cwm", architectures=("CwmForCausalLM",), facts=windowed_facts)
MINISTRAL3 = replace(
    LLAMA, model_type="ministral3", architectures=("Ministral3ForCausalLM",), facts=ministral3_facts
)
