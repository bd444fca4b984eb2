"""Apertus: no gate, an activation (xIELU) with two learned numbers a layer, norms of queries and keys."""

from dataclasses import replace

from .llama import LLAMA, LLAMA_LAYER

APERTUS = replace(
    LLAMA,
    model_type="apertus",
    architectures=("ApertusForCausalLM",),
    layer=replace(
        LLAMA_LAYER,
        attention_norm="attention_layernorm",
        mlp_norm="feedforward_layernorm",
        gate=None,
        activation="mlp.act_fn",
    ),
)
