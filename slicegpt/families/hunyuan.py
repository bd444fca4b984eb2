"""Hunyuan's dense models: Llama's layout with norms of queries and keys behind their rotation."""

from dataclasses import replace

from transformers import PreTrainedConfig

from slicegpt.errors import SliceGPTError

from .base import head_dim_of
from .checks import rotary_parameters
from .llama import LLAMA, LLAMA_LAYER, llama_facts


def hunyuan_facts(config: PreTrainedConfig) -> dict:
    """Fields of `SlicedConfig` that a Hunyuan config determines."""
    return llama_facts(config) | {
        "qk_norm_after_rope": True,
        "rope_parameters": fixed_frequencies(config, rotary_parameters(config, head_dim_of(config), False)),
    }


def fixed_frequencies(config: PreTrainedConfig, rope: dict) -> dict:
    """What the checkpoints call "dynamic" with an `alpha` is the usual frequencies of a larger base."""
    alpha, head_dim = rope.pop("alpha", None), head_dim_of(config)
    if rope["rope_type"] != "dynamic" or not alpha:
        return rope
    if not (isinstance(alpha, int | float) and alpha > 0 and head_dim > 2):
        raise SliceGPTError(
            f"hunyuan_v1_dense: rope_parameters: alpha must be a number above 0, got {alpha!r}"
        )
    theta = rope["rope_theta"] * alpha ** (head_dim / (head_dim - 2))
    return {"rope_type": "default", "rope_theta": theta}


HUNYUAN = replace(
    LLAMA,
    model_type="hunyuan_v1_dense",
    architectures=("HunYuanDenseV1ForCausalLM",),
    facts=hunyuan_facts,
    layer=replace(LLAMA_LAYER, q_norm="self_attn.query_layernorm", k_norm="self_attn.key_layernorm"),
)
