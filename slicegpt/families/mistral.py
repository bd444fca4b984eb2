"""Mistral: Llama's layout with a sliding attention window."""

from dataclasses import replace

from transformers import PreTrainedConfig

from .llama import LLAMA, llama_facts


def mistral_facts(config: PreTrainedConfig) -> dict:
    """Fields of `SlicedConfig` that a Mistral config determines."""
    return llama_facts(config) | {"sliding_window": config.sliding_window}


MISTRAL = replace(LLAMA, model_type="mistral", architectures=("MistralForCausalLM",), facts=mistral_facts)
