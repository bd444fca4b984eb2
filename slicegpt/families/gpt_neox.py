"""GPT-NeoX and Pythia: LayerNorms, attention and MLP in parallel (each its own norm) or in sequence, partial rotary."""

from dataclasses import replace

import torch
from transformers import PreTrainedConfig

from .base import DenseLayer, Family, LayerNames, StockForm
from .checks import check_head_dim
from .llama import llama_facts
from .rewriting import fuse_queries, take_rows


def gpt_neox_facts(config: PreTrainedConfig) -> dict:
    """Fields of `SlicedConfig` that a GPT-NeoX config determines."""
    check_head_dim(config)
    facts = llama_facts(config, config.layer_norm_eps, partial_rotary=True)
    own_keys = {
        "num_key_value_heads": config.num_attention_heads
    }  # it has no grouped heads, whatever a field says
    return facts | own_keys | {"parallel_blocks": config.use_parallel_residual}


def split_heads(layer: DenseLayer, config: PreTrainedConfig) -> DenseLayer:
    """One matrix holds, head by head, its queries, its keys and its values.

    Parallel blocks share one weightless norm, whatever the scales and shifts of their two LayerNorms: those are folded
    into the layers that read it.
    """
    q, k, v = _places(len(layer.q.weight), layer, config)
    return replace(layer, q=take_rows(layer.q, q), k=take_rows(layer.k, k), v=take_rows(layer.v, v))


def join_heads(layer: DenseLayer, config: PreTrainedConfig) -> DenseLayer:
    """Undoes `split_heads`."""
    return fuse_queries(layer, _places(3 * len(layer.q.weight), layer, config).flatten())


def _places(count: int, layer: DenseLayer, config: PreTrainedConfig) -> torch.Tensor:
    """Where queries, keys and values [3, n] stand in the matrix of `count` outputs that holds them."""
    outputs = torch.arange(count, device=layer.q.weight.device)
    return outputs.view(config.num_attention_heads, 3, -1).transpose(0, 1).flatten(1)


GPT_NEOX = Family(
    model_type="gpt_neox",
    architectures=("GPTNeoXForCausalLM",),
    facts=gpt_neox_facts,
    layer=LayerNames(
        attention_norm="input_layernorm",
        q="attention.query_key_value",
        k="attention.query_key_value",
        v="attention.query_key_value",
        o="attention.dense",
        mlp_norm="post_attention_layernorm",
        up="mlp.dense_h_to_4h",
        down="mlp.dense_4h_to_h",
    ),
    mean_subtraction=True,
    embedding="gpt_neox.embed_in",
    layers="gpt_neox.layers.{}",
    final_norm="gpt_neox.final_layer_norm",
    rewrite_layer=split_heads,
    stock=StockForm(restore_layer=join_heads),
)
