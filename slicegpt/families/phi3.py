"""Phi-3, Phi-3.5 and Phi-4: Llama's layout, its projections fused; LongRoPE in the long-context models."""

from dataclasses import replace

from transformers import PreTrainedConfig

from .base import DenseLayer, StockForm, head_dim_of
from .llama import LLAMA, LLAMA_LAYER, llama_facts
from .rewriting import fuse_gate, fuse_queries, split_rows


def phi3_facts(config: PreTrainedConfig) -> dict:
    """Fields of `SlicedConfig` that a Phi-3 config determines."""
    return llama_facts(config, partial_rotary=True) | {"sliding_window": config.sliding_window}


def split_projections(layer: DenseLayer, config: PreTrainedConfig) -> DenseLayer:
    """Queries, keys and values lie one below the other in one matrix; gate and up in another."""
    head_dim = head_dim_of(config)
    queries, keys = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    q, k, v = split_rows(layer.q, queries, keys, keys)
    gate, up = split_rows(layer.up, config.intermediate_size, config.intermediate_size)
    return replace(layer, q=q, k=k, v=v, gate=gate, up=up)


def join_projections(layer: DenseLayer, config: PreTrainedConfig) -> DenseLayer:
    """Undoes `split_projections`."""
    return fuse_gate(fuse_queries(layer))


PHI3 = replace(
    LLAMA,
    model_type="phi3",
    architectures=("Phi3ForCausalLM",),
    facts=phi3_facts,
    layer=replace(
        LLAMA_LAYER,
        q="self_attn.qkv_proj",
        k="self_attn.qkv_proj",
        v="self_attn.qkv_proj",
        gate="mlp.gate_up_proj",
        up="mlp.gate_up_proj",
    ),
    rewrite_layer=split_projections,
    stock=StockForm(restore_layer=join_projections),
)
