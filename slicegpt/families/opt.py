"""OPT 125M to 66B: LayerNorm with shift, learned positions that start at row 2, biases everywhere, ReLU, tied head."""

from transformers import PreTrainedConfig

from slicegpt.errors import SliceGPTError

from .base import Family, LayerNames, StockForm
from .checks import check_even_heads


def opt_facts(config: PreTrainedConfig) -> dict:
    """Fields of `SlicedConfig` that an OPT config determines; OPT-350m is refused."""
    if not config.do_layer_norm_before:
        raise SliceGPTError(
            "opt: do_layer_norm_before=False (OPT-350m) is not supported: its norms come after the residual "
            "addition, so rotating the stream between blocks would change the network's function",
            "model",
        )
    if config.word_embed_proj_dim != config.hidden_size:
        raise SliceGPTError(
            f"opt: word_embed_proj_dim must equal hidden_size {config.hidden_size}, got {config.word_embed_proj_dim}",
            "model",
        )
    if config._remove_final_layer_norm:
        raise SliceGPTError(
            "opt: a model without a final LayerNorm (_remove_final_layer_norm) is not supported", "model"
        )
    check_even_heads(config)
    return {
        "dense_hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_dim,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "hidden_act": config.activation_function,
        "max_position_embeddings": config.max_position_embeddings,
        "position_embedding": "learned",
        "position_offset": 2,
        "rms_norm_eps": 1e-5,  # torch's LayerNorm default; OPT's config has no such field
        "attention_dropout": config.attention_dropout,
    }


OPT = Family(
    model_type="opt",
    architectures=("OPTForCausalLM",),
    facts=opt_facts,
    layer=LayerNames(
        attention_norm="self_attn_layer_norm",
        q="self_attn.q_proj",
        k="self_attn.k_proj",
        v="self_attn.v_proj",
        o="self_attn.out_proj",
        mlp_norm="final_layer_norm",
        up="fc1",
        down="fc2",
    ),
    mean_subtraction=True,
    embedding="model.decoder.embed_tokens",
    positions="model.decoder.embed_positions",
    layers="model.decoder.layers.{}",
    final_norm="model.decoder.final_layer_norm",
    stock=StockForm(neurons="ffn_dim"),
)
