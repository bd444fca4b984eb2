"""Mixtures of experts: Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE, Phi-3.5-MoE, GLM-4.5 and gpt-oss."""

from __future__ import annotations

import math
from dataclasses import replace

from transformers import PreTrainedConfig

from slicegpt.errors import SliceGPTError

from .base import MixtureNames
from .checks import check_head_dim
from .llama import LLAMA, LLAMA_LAYER, llama_facts, windowed_facts

_LAYER = replace(LLAMA_LAYER, experts=MixtureNames())


def mixture_facts(config: PreTrainedConfig, count: str, neurons: str = "intermediate_size") -> dict:
    """The fields of `SlicedConfig` that say which experts there are and how many of them a token has.

    Args:
        count, neurons: what the config calls their number, and how many neurons each of them has.

    Raises:
        SliceGPTError: numbers that describe no mixture.
    """
    kind, experts, chosen = config.model_type, getattr(config, count), config.num_experts_per_tok
    for name in (count, neurons):
        value = getattr(config, name)
        if not isinstance(value, int) or value < 1:
            raise SliceGPTError(
                f"{kind}: {name} must be a whole number of at least 1, got {value!r}", "model"
            )
    if not isinstance(chosen, int) or not 1 <= chosen <= experts:
        raise SliceGPTError(
            f"{kind}: num_experts_per_tok must lie in [1, {count} = {experts}], got {chosen!r}", "model"
        )
    return {
        "num_experts": experts,
        "num_experts_per_tok": chosen,
        "moe_intermediate_size": getattr(config, neurons),
        "norm_topk_prob": bool(getattr(config, "norm_topk_prob", False)),
    }


def mixtral_facts(config: PreTrainedConfig) -> dict:
    """Fields of `SlicedConfig` that a Mixtral config determines."""
    facts = llama_facts(config) | mixture_facts(config, "num_local_experts")
    return facts | {"norm_topk_prob": True, "sliding_window": config.sliding_window}


def _stack(config: PreTrainedConfig) -> list[str]:
    """Of every layer of a Qwen-MoE whether it has experts."""
    step = config.decoder_sparse_step
    if not isinstance(step, int) or step < 1:
        raise SliceGPTError(
            f"{config.model_type}: decoder_sparse_step must be a whole number of at least 1, got {step!r}",
            "model",
        )
    kinds = [
        "sparse" if layer not in config.mlp_only_layers and (layer + 1) % step == 0 else "dense"
        for layer in range(config.num_hidden_layers)
    ]
    return kinds if config.num_experts else ["dense"] * len(kinds)


def qwen2_moe_facts(config: PreTrainedConfig) -> dict:
    """Fields of `SlicedConfig` that a Qwen2-MoE config determines: some layers may be dense, one expert is shared."""
    stack, window = _stack(config), config.sliding_window or None
    if window is None and "sliding_attention" in config.layer_types:
        raise SliceGPTError(
            "qwen2_moe: sliding_window must be at least 1 where layer_types has 'sliding_attention', got "
            f"{config.sliding_window!r} (use_sliding_window={config.use_sliding_window})",
            "model",
        )
    facts = llama_facts(config) | {"sliding_window": window, "layer_types": list(config.layer_types)}
    if "sparse" not in stack:
        return facts
    return (
        facts
        | mixture_facts(config, "num_experts", "moe_intermediate_size")
        | {
            "mlp_layer_types": stack,
            "shared_expert_intermediate_size": config.shared_expert_intermediate_size,
            "shared_expert_gate": True,
        }
    )


def qwen3_moe_facts(config: PreTrainedConfig) -> dict:
    """Fields of `SlicedConfig` that a Qwen3-MoE config determines: some layers may be dense."""
    stack = _stack(config)
    facts = llama_facts(config) | {"sliding_window": config.sliding_window}
    if "sparse" not in stack:
        return facts
    return facts | mixture_facts(config, "num_experts", "moe_intermediate_size") | {"mlp_layer_types": stack}


def olmoe_facts(config: PreTrainedConfig) -> dict:
    """Fields of `SlicedConfig` that an OLMoE config determines; its norms of queries and keys are over all heads."""
    if config.clip_qkv is not None:
        raise SliceGPTError(
            f"olmoe: clip_qkv={config.clip_qkv} is not supported: queries, keys and values must not be clipped",
            "model",
        )
    check_head_dim(config)
    window = getattr(config, "sliding_window", None)
    if window is not None:  # its masks have none, and its attention is called with one
        raise SliceGPTError(f"olmoe: sliding_window={window} is not supported", "model")
    return llama_facts(config) | mixture_facts(config, "num_experts") | {"qk_norm_whole": True}


def phimoe_facts(config: PreTrainedConfig) -> dict:
    """Fields of `SlicedConfig` that a Phi-3.5-MoE config determines; its router is a sparse mixer of two experts."""
    rope, scales = config.rope_parameters, {}
    check_head_dim(config)
    if rope["rope_type"] != "default":
        scales = {name: rope.get(f"{name}_mscale") for name in ("short", "long")}
        if rope["rope_type"] != "longrope" or len(set(scales.values())) > 1:
            raise SliceGPTError(
                "phimoe: rope_parameters must be of type 'default', or of type 'longrope' with one factor for short "
                f"and long sequences, got {rope['rope_type']!r} with short_mscale={scales['short']} and "
                f"long_mscale={scales['long']}",
                "model",
            )
        # Their only factor on cosines and sines, which others compute from the lengths; and transformers' class keeps
        # the short frequencies, whatever the length.
        own = {"attention_factor": float(scales["short"]), "long_factor": rope["short_factor"]}
        config = _with_rope(config, own)
    if config.num_experts_per_tok != 2:
        raise SliceGPTError(
            f"phimoe: num_experts_per_tok must be 2, as its router chooses, got {config.num_experts_per_tok}",
            "model",
        )
    threshold = config.router_jitter_noise
    if not (isinstance(threshold, int | float) and 0 <= threshold < math.inf):
        raise SliceGPTError(f"phimoe: router_jitter_noise must be at least 0, got {threshold!r}", "model")
    return (
        llama_facts(config)
        | mixture_facts(config, "num_local_experts")
        | {
            "sliding_window": config.sliding_window,
            "scoring_func": "sparsemixer",
            "router_jitter_noise": float(threshold),
        }
    )


def _with_rope(config: PreTrainedConfig, changes: dict) -> PreTrainedConfig:
    changed = type(config).from_dict(config.to_dict())
    rope = {name: value for name, value in config.rope_parameters.items() if not name.endswith("_mscale")}
    changed.rope_parameters = rope | changes
    return changed


def group_facts(config: PreTrainedConfig, fewest: int = 2) -> dict:
    """The fields of `SlicedConfig` of experts that are chosen from the best groups.

    Args:
        fewest: experts that a group has at the least, as many as its score is the sum of.

    Raises:
        SliceGPTError: groups that cannot be, or have fewer experts together than a token takes.
    """
    experts, groups, chosen = config.n_routed_experts, config.n_group, config.topk_group
    numbers = isinstance(groups, int) and isinstance(chosen, int) and 1 <= chosen <= groups
    if not numbers or experts % groups or experts // groups < fewest:
        raise SliceGPTError(
            f"{config.model_type}: n_group must divide n_routed_experts ({experts}) into groups of {fewest} and more, "
            f"and topk_group lie in [1, n_group], got n_group={groups} and topk_group={chosen}",
            "model",
        )
    taken = config.num_experts_per_tok
    if isinstance(taken, int) and taken > experts // groups * chosen:
        raise SliceGPTError(
            f"{config.model_type}: num_experts_per_tok must be at most the {experts // groups * chosen} experts of "
            f"topk_group={chosen} groups of n_group={groups}, got {taken}",
            "model",
        )
    return {"n_group": groups, "topk_group": chosen}


def behind_dense_layers(config: PreTrainedConfig) -> dict:
    """The fields of `SlicedConfig` of a GLM or DeepSeek whose first layers are dense, and whose others have routed
    experts and shared ones; empty where all are dense.

    Raises:
        SliceGPTError: numbers that describe no such layers.
    """
    layers, first = config.num_hidden_layers, _count(config, "first_k_dense_replace", 0)
    dense = min(first, layers)
    return shared_expert_facts(config, ["dense"] * dense + ["sparse"] * (layers - dense))


def _count(config: PreTrainedConfig, name: str, least: int) -> int:
    value = getattr(config, name)
    if not isinstance(value, int) or value < least:
        raise SliceGPTError(
            f"{config.model_type}: {name} must be a whole number of at least {least}, got {value!r}", "model"
        )
    return value


def shared_expert_facts(config: PreTrainedConfig, kinds: list[str]) -> dict:
    """The same, of layers of these `kinds`, "dense" or "sparse"."""
    kind, shared, scale = (
        config.model_type,
        _count(config, "n_shared_experts", 1),
        config.routed_scaling_factor,
    )
    if not (isinstance(scale, int | float) and 0 < scale < math.inf):
        raise SliceGPTError(
            f"{kind}: routed_scaling_factor must be finite and above 0, got {scale!r}", "model"
        )
    if "sparse" not in kinds:
        return {}
    return mixture_facts(config, "n_routed_experts", "moe_intermediate_size") | {
        "mlp_layer_types": kinds,
        "shared_expert_intermediate_size": config.moe_intermediate_size * shared,
        "routed_scaling_factor": float(scale),
    }


def glm4_moe_facts(config: PreTrainedConfig) -> dict:
    """Fields of `SlicedConfig` that a GLM-4.5 config determines: the first layers are dense, experts in groups."""
    groups, experts = group_facts(config), behind_dense_layers(config)
    facts = llama_facts(config, partial_rotary=True)
    return facts | experts | groups | {"scoring_func": "sigmoid"} if experts else facts


def gpt_oss_facts(config: PreTrainedConfig) -> dict:
    """Fields of `SlicedConfig` that a gpt-oss config determines: biases everywhere, sinks, windows, clamped experts.

    A softmax over the chosen logits is one over all of them, divided by the sum of the chosen.
    """
    for name in ("swiglu_alpha", "swiglu_limit"):
        value = getattr(config, name)
        if not (isinstance(value, int | float) and math.isfinite(value)) or (
            name == "swiglu_limit" and value <= 0
        ):
            raise SliceGPTError(
                f"gpt_oss: {name} must be finite, and a limit above 0, got {value!r}", "model"
            )
    return (
        windowed_facts(config)
        | mixture_facts(config, "num_local_experts")
        | {
            "norm_topk_prob": True,
            "swiglu_alpha": float(config.swiglu_alpha),
            "swiglu_limit": float(config.swiglu_limit),
        }
    )


MIXTRAL = replace(
    LLAMA,
    model_type="mixtral",
    architectures=("MixtralForCausalLM",),
    facts=mixtral_facts,
    layer=_LAYER,
)
QWEN2_MOE = replace(
    LLAMA,
    model_type="qwen2_moe",
    architectures=("Qwen2MoeForCausalLM",),
    facts=qwen2_moe_facts,
    layer=replace(
        _LAYER,
        experts=MixtureNames(shared="mlp.shared_expert", shared_gate="mlp.shared_expert_gate"),
    ),
)
QWEN3_MOE = replace(
    LLAMA,
    model_type="qwen3_moe",
    architectures=("Qwen3MoeForCausalLM",),
    facts=qwen3_moe_facts,
    layer=_LAYER,
)
OLMOE = replace(
    LLAMA, model_type="olmoe", architectures=("OlmoeForCausalLM",), facts=olmoe_facts, layer=_LAYER
)
PHIMOE = replace(
    LLAMA,
    model_type="phimoe",
    architectures=("PhimoeForCausalLM",),
    facts=phimoe_facts,
    layer=replace(_LAYER, experts=MixtureNames(router="mlp.router")),
    mean_subtraction=True,
)
GLM4_MOE = replace(
    LLAMA,
    model_type="glm4_moe",
    architectures=("Glm4MoeForCausalLM",),
    facts=glm4_moe_facts,
    layer=replace(_LAYER, experts=MixtureNames(shared="mlp.shared_experts")),
)
GPT_OSS = replace(
    LLAMA,
    model_type="gpt_oss",
    architectures=("GptOssForCausalLM",),
    facts=gpt_oss_facts,
    layer=replace(_LAYER, experts=MixtureNames(router="mlp.router", by_turns=True), sinks="self_attn.sinks"),
)
