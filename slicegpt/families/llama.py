"""Llama 1, 2 and 3 (grouped-query attention, tied or untied head) and families of the same layout."""

from transformers import PreTrainedConfig

from .base import Family, LayerNames, head_dim_of
from .checks import layer_rotary_facts, rotary_parameters

LLAMA_LAYER = LayerNames(
    attention_norm="input_layernorm",
    q="self_attn.q_proj",
    k="self_attn.k_proj",
    v="self_attn.v_proj",
    o="self_attn.o_proj",
    mlp_norm="post_attention_layernorm",
    gate="mlp.gate_proj",
    up="mlp.up_proj",
    down="mlp.down_proj",
    q_norm="self_attn.q_norm",
    k_norm="self_attn.k_norm",
)


def llama_facts(
    config: PreTrainedConfig,
    eps: float | None = None,
    partial_rotary: bool = False,
    activation: str = "hidden_act",
    layered_rotary: bool = False,
) -> dict:
    """Fields of `SlicedConfig` that a Llama-like config determines.

    Args:
        eps: where the config has no `rms_norm_eps`.
        partial_rotary: the family obeys `partial_rotary_factor`.
        activation: the config's name of the MLP's activation.
        layered_rotary: `rope_parameters` are given for each of `layer_types`.
    """
    head_dim = head_dim_of(config)
    if layered_rotary:
        rotary = layer_rotary_facts(
            config, head_dim, [_settings_of(config, kind) for kind in config.layer_types]
        )
    else:
        rotary = {"rope_parameters": rotary_parameters(config, head_dim, partial_rotary)}
    return {
        "dense_hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        "head_dim": head_dim,
        "hidden_act": getattr(config, activation),
        "max_position_embeddings": config.max_position_embeddings,
        **rotary,
        "rms_norm_eps": getattr(config, "rms_norm_eps", None) if eps is None else eps,
        "attention_dropout": getattr(config, "attention_dropout", 0.0),
    }


def _settings_of(config: PreTrainedConfig, kind: str) -> dict:
    """`rope_parameters` of one of `layer_types`. transformers reads YaRN's `truncate` outside of them."""
    own = dict(config.rope_parameters.get(kind) or {})
    if own.get("rope_type") == "yarn":
        own["truncate"] = config.rope_parameters.get("truncate", True)
    return own


def windowed_facts(config: PreTrainedConfig, eps: float | None = None, **settings) -> dict:
    """`llama_facts` of a config that says of each layer whether its attention has a window."""
    return llama_facts(config, eps, **settings) | {
        "sliding_window": config.sliding_window,
        "layer_types": list(config.layer_types),
    }


LLAMA = Family(
    model_type="llama",
    architectures=("LlamaForCausalLM",),
    facts=llama_facts,
    layer=LLAMA_LAYER,
    mean_subtraction=False,
    embedding="model.embed_tokens",
    layers="model.layers.{}",
    final_norm="model.norm",
)
