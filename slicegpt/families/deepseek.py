"""DeepSeek V2 and V3: latent attention; the first layers dense, the others with routed experts and shared ones.

And those that differ from V3 in what their config says alone: Sarvam 105B, GLM-4.7-Flash, Youtu-LLM (without experts).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from transformers import PreTrainedConfig

from slicegpt.errors import SliceGPTError

from .base import DenseLayer, LayerNames, MixtureNames
from .experts import behind_dense_layers, group_facts, shared_expert_facts
from .llama import LLAMA, LLAMA_LAYER, llama_facts
from .rewriting import take_rows

_LATENT = replace(
    LLAMA_LAYER,
    q="self_attn.q_proj",
    k=None,
    v=None,
    q_norm=None,
    k_norm=None,
    kv_a="self_attn.kv_a_proj_with_mqa",
    expansion=("self_attn.kv_a_layernorm", "self_attn.kv_b_proj"),
    experts=MixtureNames(shared="mlp.shared_experts"),
)
_BOTH_LATENT = replace(
    _LATENT,
    q=None,
    q_a="self_attn.q_a_proj",
    expansion=("self_attn.q_a_layernorm", "self_attn.q_b_proj", *_LATENT.expansion),
)
# transformers gives the norms of latents this epsilon, whatever the config says of the others.
_LATENT_EPS = 1e-6


def deepseek_names(config: PreTrainedConfig) -> LayerNames:
    """Queries have a latent of their own in all but the smallest models."""
    return _LATENT if config.q_lora_rank is None else _BOTH_LATENT


def latent_facts(config: PreTrainedConfig) -> dict:
    """Fields of `SlicedConfig` that the config of a model with latent attention determines.

    Raises:
        SliceGPTError: heads or latents that cannot be, or that transformers fails with.
    """
    kind, rotated, heads = config.model_type, config.qk_rope_head_dim, config.num_attention_heads
    for name in ("kv_lora_rank", "qk_nope_head_dim", "v_head_dim", "q_lora_rank"):
        value = getattr(config, name)
        if not (isinstance(value, int) and value >= 1) and (name, value) != ("q_lora_rank", None):
            raise SliceGPTError(
                f"{kind}: {name} must be a whole number of at least 1, got {value!r}", "model"
            )
    if not isinstance(rotated, int) or rotated < 2 or rotated % 2 or config.head_dim != rotated:
        raise SliceGPTError(
            f"{kind}: qk_rope_head_dim must be an even number, which head_dim repeats, got {rotated!r} and head_dim="
            f"{config.head_dim!r}",
            "model",
        )
    if config.num_key_value_heads != heads:
        raise SliceGPTError(
            f"{kind}: num_key_value_heads must be num_attention_heads ({heads}), for a latent is expanded to all of "
            f"them, got {config.num_key_value_heads}",
            "model",
        )
    facts = llama_facts(config)
    rope = facts["rope_parameters"]
    if rope.get("mscale_all_dim") and rope["rope_type"] != "default" and "factor" not in rope:
        raise SliceGPTError(
            f"{kind}: rope_parameters: mscale_all_dim needs a factor, got rope_type {rope['rope_type']!r} without one",
            "model",
        )
    return facts | {
        "kv_lora_rank": config.kv_lora_rank,
        "q_lora_rank": config.q_lora_rank,
        "qk_nope_head_dim": config.qk_nope_head_dim,
        "v_head_dim": config.v_head_dim,
        "inner_norm_eps": _LATENT_EPS,
    }


def deepseek_v2_facts(config: PreTrainedConfig) -> dict:
    """Fields of `SlicedConfig` that a DeepSeek V2 config determines."""
    facts, experts = latent_facts(config), behind_dense_layers(config)
    if not experts:
        return facts
    if config.mlp_bias:
        raise SliceGPTError("deepseek_v2: mlp_bias=True is not supported beside experts", "model")
    if config.norm_topk_prob:
        # The published code divides by the sum in place of multiplying by the factor; transformers does neither.
        raise SliceGPTError(
            "deepseek_v2: norm_topk_prob=True is not supported: transformers passes over it", "model"
        )
    groups = {}
    if config.topk_method == "group_limited_greedy":
        groups = group_facts(config, fewest=1)
    elif config.topk_method != "greedy":
        raise SliceGPTError(
            "deepseek_v2: topk_method must be 'greedy' or 'group_limited_greedy', got "
            f"{config.topk_method!r}",
            "model",
        )
    return facts | experts | groups | {"norm_topk_prob": False, "router_in_float32": True}


def deepseek_v3_facts(config: PreTrainedConfig) -> dict:
    """Fields of `SlicedConfig` that a DeepSeek V3 config determines."""
    facts, experts = latent_facts(config), behind_dense_layers(config)
    return facts | experts | group_facts(config) | {"scoring_func": "sigmoid"} if experts else facts


def glm4_moe_lite_facts(config: PreTrainedConfig) -> dict:
    """Fields of `SlicedConfig` that a GLM-4.7-Flash config determines; it says of each layer whether it has experts."""
    kinds = list(config.mlp_layer_types)
    if len(kinds) != config.num_hidden_layers or not set(kinds) <= {"dense", "sparse"}:
        raise SliceGPTError(
            f"glm4_moe_lite: mlp_layer_types must hold num_hidden_layers ({config.num_hidden_layers}) of 'dense' and "
            f"'sparse', got {kinds}",
            "model",
        )
    facts, experts = latent_facts(config), shared_expert_facts(config, kinds)
    if (
        part := config.rope_parameters.get("partial_rotary_factor", 1.0)
    ) != 1:  # transformers fails with another
        raise SliceGPTError(
            f"glm4_moe_lite: rope_parameters: partial_rotary_factor must be 1, got {part}", "model"
        )
    return facts | experts | group_facts(config) | {"scoring_func": "sigmoid"} if experts else facts


def deepseek_layer(layer: DenseLayer, config: PreTrainedConfig) -> DenseLayer:
    """Rotary pairs of neighbours, in the last entries of a query and of what the latent of keys is read with."""
    rotated = config.qk_rope_head_dim
    whole = config.qk_nope_head_dim + rotated
    layer = replace(layer, kv_a=take_rows(layer.kv_a, _last_as_halves(len(layer.kv_a.weight), None, rotated)))
    if layer.q is not None:
        return replace(layer, q=take_rows(layer.q, _last_as_halves(len(layer.q.weight), whole, rotated)))
    queries = layer.expansion["q_b_proj.weight"]
    queries = queries[_last_as_halves(len(queries), whole, rotated)]
    return replace(layer, expansion={**layer.expansion, "q_b_proj.weight": queries})


def deepseek_v3_layer(layer: DenseLayer, config: PreTrainedConfig) -> DenseLayer:
    """Some models have pairs of halves."""
    return deepseek_layer(layer, config) if config.rope_interleave else layer


def _last_as_halves(rows: int, head: int | None, rotated: int) -> torch.Tensor:
    """Where the rows of heads stand whose last `rotated` ones are pairs of neighbours, in the order of halves.

    Args:
        head: rows of a head; None: all of them are one.
    """
    heads = torch.arange(rows).view(-1, head or rows)
    turned = heads[:, -rotated:].unflatten(1, (-1, 2)).mT.flatten(1)
    return torch.cat((heads[:, :-rotated], turned), dim=1).flatten()


DEEPSEEK_V2 = replace(
    LLAMA,
    model_type="deepseek_v2",
    architectures=("DeepseekV2ForCausalLM",),
    facts=deepseek_v2_facts,
    layer=deepseek_names,
    rewrite_layer=deepseek_layer,
)
DEEPSEEK_V3 = replace(
    DEEPSEEK_V2,
    model_type="deepseek_v3",
    architectures=("DeepseekV3ForCausalLM",),
    facts=deepseek_v3_facts,
    rewrite_layer=deepseek_v3_layer,
)
SARVAM_MLA = replace(DEEPSEEK_V3, model_type="sarvam_mla")
GLM4_MOE_LITE = replace(
    DEEPSEEK_V3,
    model_type="glm4_moe_lite",
    architectures=("Glm4MoeLiteForCausalLM",),
    facts=glm4_moe_lite_facts,
)
YOUTU = replace(DEEPSEEK_V3, model_type="youtu", architectures=("YoutuForCausalLM",), facts=latent_facts)
