"""StarCoder2: LayerNorms, biases, an MLP without a gate, rotary positions, sliding window, tied head."""

from dataclasses import replace

from transformers import PreTrainedConfig

from .llama import LLAMA, LLAMA_LAYER, llama_facts


def starcoder2_facts(config: PreTrainedConfig) -> dict:
    """Fields of `SlicedConfig` that a StarCoder2 config determines."""
    return llama_facts(config, config.norm_epsilon) | {"sliding_window": config.sliding_window}


STARCODER2 = replace(
    LLAMA,
    model_type="starcoder2",
    architectures=("Starcoder2ForCausalLM",),
    facts=starcoder2_facts,
    layer=replace(LLAMA_LAYER, gate=None, up="mlp.c_fc", down="mlp.c_proj"),
    mean_subtraction=True,
)
