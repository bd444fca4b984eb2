"""Rotary pairs of neighbours in Llama's layout: GLM-4-9B (a part of a head; gate and up fused), ERNIE 4.5, Helium.

GLM-4-0414 has norms behind its blocks as well.
"""

from dataclasses import replace

from transformers import PreTrainedConfig

from .base import DenseLayer, StockForm, head_dim_of
from .checks import check_head_dim
from .llama import LLAMA, LLAMA_LAYER, llama_facts
from .rewriting import back_to_neighbours, fuse_gate, pairs_of_neighbours, split_rows


def glm_facts(config: PreTrainedConfig) -> dict:
    """Fields of `SlicedConfig` that a GLM config determines."""
    return llama_facts(config, partial_rotary=True)


def glm4_facts(config: PreTrainedConfig) -> dict:
    """Fields of `SlicedConfig` that a GLM-4-0414 config determines."""
    return glm_facts(config) | {"post_norm": True}


def glm_layer(layer: DenseLayer, config: PreTrainedConfig) -> DenseLayer:
    """Gate and up lie one below the other in one matrix."""
    gate, up = split_rows(layer.up, config.intermediate_size, config.intermediate_size)
    return pairs_of_neighbours(replace(layer, gate=gate, up=up), config, _rotated(config))


def restored_glm_layer(layer: DenseLayer, config: PreTrainedConfig) -> DenseLayer:
    """Undoes `glm_layer`."""
    return back_to_neighbours(fuse_gate(layer), config, _rotated(config))


def _rotated(config: PreTrainedConfig) -> int:
    """Entries of a head that are rotated."""
    return int(head_dim_of(config) * config.rope_parameters.get("partial_rotary_factor", 1.0))


def helium_facts(config: PreTrainedConfig) -> dict:
    """Fields of `SlicedConfig` that a Helium config determines."""
    check_head_dim(config)
    return llama_facts(config)


GLM = replace(
    LLAMA,
    model_type="glm",
    architectures=("GlmForCausalLM",),
    facts=glm_facts,
    layer=replace(LLAMA_LAYER, gate="mlp.gate_up_proj", up="mlp.gate_up_proj"),
    rewrite_layer=glm_layer,
    stock=StockForm(restore_layer=restored_glm_layer),
)
GLM4 = replace(
    GLM,
    model_type="glm4",
    architectures=("Glm4ForCausalLM",),
    facts=glm4_facts,
    layer=replace(
        GLM.layer,
        attention_output_norm="post_self_attn_layernorm",
        mlp_output_norm="post_mlp_layernorm",
    ),
)
ERNIE = replace(
    LLAMA,
    model_type="ernie4_5",
    architectures=("Ernie4_5ForCausalLM",),
    rewrite_layer=pairs_of_neighbours,
    stock=StockForm(restore_layer=back_to_neighbours),
)
HELIUM = replace(
    LLAMA,
    model_type="helium",
    architectures=("HeliumForCausalLM",),
    facts=helium_facts,
    rewrite_layer=pairs_of_neighbours,
    stock=StockForm(restore_layer=back_to_neighbours),
)
