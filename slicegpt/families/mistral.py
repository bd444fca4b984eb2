"""Mistral: Llama's layout with a sliding attention window; Ministral 8B and CWM: with a window in some layers."""

from dataclasses import replace

from transformers import PreTrainedConfig

from .llama import LLAMA, llama_facts, windowed_facts


def mistral_facts(config: PreTrainedConfig) -> dict:
    """Fields of `SlicedConfig` that a Mistral config determines."""
    return llama_facts(config) | {"sliding_window": config.sliding_window}


MISTRAL = replace(LLAMA, model_type="mistral", architectures=("MistralForCausalLM",), facts=mistral_facts)
MINISTRAL = replace(
    LLAMA, model_type="ministral", architectures=("MinistralForCausalLM",), facts=windowed_facts
)
CWM = replace(LLAMA, model_type="cwm", architectures=("CwmForCausalLM",), facts=windowed_facts)
