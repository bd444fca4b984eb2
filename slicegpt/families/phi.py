"""Phi-1, Phi-1.5 and Phi-2: attention and MLP in parallel on one LayerNorm, rotary on a part of each head."""

from transformers import PreTrainedConfig

from slicegpt.errors import SliceGPTError

from .base import Family, LayerNames
from .llama import llama_facts


def phi_facts(config: PreTrainedConfig) -> dict:
    """Fields of `SlicedConfig` that a Phi config determines."""
    if config.qk_layernorm:
        raise SliceGPTError(
            "phi: qk_layernorm=True is not supported (Phi-1, Phi-1.5 and Phi-2 do not use it)", "model"
        )
    return llama_facts(config, config.layer_norm_eps, partial_rotary=True) | {"parallel_blocks": True}


PHI = Family(
    model_type="phi",
    architectures=("PhiForCausalLM",),
    facts=phi_facts,
    layer=LayerNames(
        attention_norm="input_layernorm",
        q="self_attn.q_proj",
        k="self_attn.k_proj",
        v="self_attn.v_proj",
        o="self_attn.dense",
        mlp_norm="input_layernorm",
        up="mlp.fc1",
        down="mlp.fc2",
    ),
    mean_subtraction=True,
    embedding="model.embed_tokens",
    layers="model.layers.{}",
    final_norm="model.final_layernorm",
)
