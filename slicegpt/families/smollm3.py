"""SmolLM3: Llama's layout, with rotary positions in some layers only."""

from dataclasses import replace

from transformers import PreTrainedConfig

from .llama import LLAMA, windowed_facts


def smollm3_facts(config: PreTrainedConfig) -> dict:
    """Fields of `SlicedConfig` that a SmolLM3 config determines."""
    turned = [int(bool(flag)) for flag in config.no_rope_layers[: config.num_hidden_layers]]
    return windowed_facts(config) | {"no_rope_layers": turned}


SMOLLM3 = replace(LLAMA, model_type="smollm3", architectures=("SmolLM3ForCausalLM",), facts=smollm3_facts)
