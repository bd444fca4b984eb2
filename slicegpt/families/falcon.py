"""Falcon 7B, 40B and 180B: LayerNorms, rotary positions, attention and MLP in parallel, one or few key heads."""

from dataclasses import replace

import torch
from transformers import PreTrainedConfig

from slicegpt.errors import SliceGPTError

from .base import DenseLayer, Family, LayerNames, Linear, StockForm
from .checks import rotary_parameters
from .rewriting import fuse_queries, take_rows


def key_heads_of(config: PreTrainedConfig) -> int:
    """Falcon 40B has groups of queries, 7B one key head for all of them, and others a key head for each."""
    if config.multi_query and not config.new_decoder_architecture:
        return 1
    return config.num_kv_heads if config.new_decoder_architecture else config.num_attention_heads


def falcon_facts(config: PreTrainedConfig) -> dict:
    """Fields of `SlicedConfig` that a Falcon config determines."""
    if config.alibi:
        raise SliceGPTError(
            "falcon: alibi=True is not supported: scores must not depend on distances but through rotary positions"
        )
    if config.new_decoder_architecture and not config.parallel_attn:
        raise SliceGPTError(
            "falcon: parallel_attn=False is not supported with new_decoder_architecture=True, which has no such layers"
        )
    own_keys = not (config.multi_query or config.new_decoder_architecture)
    if own_keys and config.num_kv_heads != config.num_attention_heads:
        raise SliceGPTError(
            f"falcon: num_kv_heads must be {config.num_attention_heads} where multi_query=False, got"
            f" {config.num_kv_heads}"
        )
    if _two_norms(config) and not config.new_decoder_architecture and config.parallel_attn:
        raise SliceGPTError(
            "falcon: num_ln_in_parallel_attn=2 is not supported without new_decoder_architecture: its layers read one"
        )
    return {
        "dense_hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": key_heads_of(config),
        "head_dim": config.head_dim,
        "hidden_act": config.activation,
        "max_position_embeddings": config.max_position_embeddings,
        "rope_parameters": rotary_parameters(config, config.head_dim, partial=False),
        "rms_norm_eps": config.layer_norm_epsilon,
        "attention_dropout": config.attention_dropout,
        "parallel_blocks": config.parallel_attn,
    }


def _two_norms(config: PreTrainedConfig) -> bool:
    norms = config.num_ln_in_parallel_attn
    return config.new_decoder_architecture if norms is None else norms == 2


def falcon_layer(config: PreTrainedConfig) -> LayerNames:
    """Layers in parallel have one norm or two, others two of other names."""
    norms = ("input_layernorm", "input_layernorm" if config.parallel_attn else "post_attention_layernorm")
    if config.parallel_attn and _two_norms(config):
        norms = ("ln_attn", "ln_mlp")
    return LayerNames(
        attention_norm=norms[0],
        q="self_attention.query_key_value",
        k="self_attention.query_key_value",
        v="self_attention.query_key_value",
        o="self_attention.dense",
        mlp_norm=norms[1],
        up="mlp.dense_h_to_4h",
        down="mlp.dense_4h_to_h",
    )


def split_groups(layer: DenseLayer, config: PreTrainedConfig) -> DenseLayer:
    """One matrix holds, key head by key head, the queries that share it, the key and the value."""
    q, k, v = _places(layer.q, config)
    return replace(layer, q=take_rows(layer.q, q), k=take_rows(layer.k, k), v=take_rows(layer.v, v))


def join_groups(layer: DenseLayer, config: PreTrainedConfig) -> DenseLayer:
    """Undoes `split_groups`."""
    rows = config.num_attention_heads + 2 * key_heads_of(config)
    fused = Linear(layer.q.weight.new_empty(rows * config.head_dim, 0))
    return fuse_queries(layer, torch.cat(_places(fused, config)))


def _places(fused: Linear, config: PreTrainedConfig) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Where the outputs of queries, keys and values stand in the matrix that holds them."""
    outputs = torch.arange(fused.weight.shape[0], device=fused.weight.device)
    groups = outputs.view(key_heads_of(config), -1, config.head_dim)
    return groups[:, :-2].flatten(), groups[:, -2].flatten(), groups[:, -1].flatten()


FALCON = Family(
    model_type="falcon",
    architectures=("FalconForCausalLM",),
    facts=falcon_facts,
    layer=falcon_layer,
    mean_subtraction=True,
    embedding="transformer.word_embeddings",
    layers="transformer.h.{}",
    final_norm="transformer.ln_f",
    rewrite_layer=split_groups,
    stock=StockForm(neurons="ffn_hidden_size", restore_layer=join_groups),
)
