"""GPT-2 (and GPT-SW3): LayerNorms with shift, learned positions, weights stored as [in, out], tied head."""

from dataclasses import replace

from transformers import PreTrainedConfig

from slicegpt.errors import SliceGPTError

from .base import DenseLayer, Family, LayerNames, StockForm
from .checks import check_even_heads
from .rewriting import fuse_queries, scale_linear, split_rows, transposed


def gpt2_facts(config: PreTrainedConfig) -> dict:
    """Fields of `SlicedConfig` that a GPT-2 config determines."""
    if config.scale_attn_by_inverse_layer_idx:
        raise SliceGPTError(
            "gpt2: scale_attn_by_inverse_layer_idx=True is not supported: every layer would scale its scores by a "
            "factor of its own",
            "model",
        )
    if config.add_cross_attention:
        raise SliceGPTError("gpt2: add_cross_attention=True is not supported: the model must be a decoder")
    check_even_heads(config)
    return {
        "dense_hidden_size": config.hidden_size,
        "intermediate_size": 4 * config.hidden_size if config.n_inner is None else config.n_inner,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "hidden_act": config.activation_function,
        "max_position_embeddings": config.max_position_embeddings,
        "position_embedding": "learned",
        "rms_norm_eps": config.layer_norm_epsilon,
        "attention_dropout": config.attn_pdrop,
    }


def split_and_transpose(layer: DenseLayer, config: PreTrainedConfig) -> DenseLayer:
    """Queries, keys and values lie beside each other in one matrix; scores without a scale take it from the queries."""
    q, k, v = split_rows(transposed(layer.q), *[config.hidden_size] * 3)
    if not config.scale_attn_weights:
        q = scale_linear(q, (config.hidden_size // config.num_attention_heads) ** 0.5)
    o, up, down = (transposed(linear) for linear in (layer.o, layer.up, layer.down))
    return replace(layer, q=q, k=k, v=v, o=o, up=up, down=down)


def join_and_transpose(layer: DenseLayer, config: PreTrainedConfig) -> DenseLayer:
    """Undoes `split_and_transpose`; the queries keep the scale that they took from the scores."""
    layer = fuse_queries(layer)
    fused, o, up, down = (transposed(linear) for linear in (layer.q, layer.o, layer.up, layer.down))
    return replace(layer, q=fused, k=fused, v=fused, o=o, up=up, down=down)


GPT2 = Family(
    model_type="gpt2",
    architectures=("GPT2LMHeadModel",),
    facts=gpt2_facts,
    layer=LayerNames(
        attention_norm="ln_1",
        q="attn.c_attn",
        k="attn.c_attn",
        v="attn.c_attn",
        o="attn.c_proj",
        mlp_norm="ln_2",
        up="mlp.c_fc",
        down="mlp.c_proj",
    ),
    mean_subtraction=True,
    embedding="transformer.wte",
    positions="transformer.wpe",
    layers="transformer.h.{}",
    final_norm="transformer.ln_f",
    rewrite_layer=split_and_transpose,
    stock=StockForm(
        neurons="n_inner",
        fields=lambda config: {"scale_attn_weights": True},
        restore_layer=join_and_transpose,
    ),
)
