"""Qwen2 (biases on queries, keys and values; optional sliding window) and Qwen3 (norms on queries and keys)."""

from dataclasses import replace

from .llama import LLAMA, windowed_facts

QWEN2 = replace(LLAMA, model_type="qwen2", architectures=("Qwen2ForCausalLM",), facts=windowed_facts)
QWEN3 = replace(LLAMA, model_type="qwen3", architectures=("Qwen3ForCausalLM",), facts=windowed_facts)
