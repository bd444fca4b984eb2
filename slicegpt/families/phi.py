"""Phi-1, Phi-1.5 and Phi-2: attention and MLP in parallel on one LayerNorm, rotary on a part of each head."""

from transformers import PreTrainedConfig

from slicegpt.errors import SliceGPTError

from .base import Family, LayerNames


def phi_facts(config: PreTrainedConfig) -> dict:
    """Fields of `SlicedConfig` that a Phi config determines."""
    if config.qk_layernorm:
        raise SliceGPTError(
            "phi: qk_layernorm=True is not supported (Phi-1, Phi-1.5 and Phi-2 do not use it)"
        )
    return {
        "dense_hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "hidden_act": config.hidden_act,
        "max_position_embeddings": config.max_position_embeddings,
        "rope_parameters": dict(config.rope_parameters),
        "rms_norm_eps": config.layer_norm_eps,
        "attention_dropout": config.attention_dropout,
        "parallel_blocks": True,
    }


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
