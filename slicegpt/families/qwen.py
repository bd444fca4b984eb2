"""Qwen2 (biases on queries, keys and values; optional sliding window) and Qwen3 (norms on queries and keys)."""

from dataclasses import replace

from transformers import PreTrainedConfig

from .llama import LLAMA, llama_facts


def qwen_facts(config: PreTrainedConfig) -> dict:
    """Fields of `SlicedConfig` that a Qwen2 or Qwen3 config determines."""
    return llama_facts(config) | {
        "sliding_window": config.sliding_window,
        "layer_types": list(config.layer_types),
    }


QWEN2 = replace(LLAMA, model_type="qwen2", architectures=("Qwen2ForCausalLM",), facts=qwen_facts)
QWEN3 = replace(LLAMA, model_type="qwen3", architectures=("Qwen3ForCausalLM",), facts=qwen_facts)
