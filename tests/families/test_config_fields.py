"""Every field of every supported config class: the canonical network computes what transformers does, or the field is
refused by its name.

A config may carry fields that its own class does not know (a key that somebody left in config.json): transformers keeps
them as attributes, obeys a few of them whatever the class, and ignores the others. So every field is set in every
family, known to its class or not.
"""

import dataclasses

import pytest
import torch
from support.tiny_models import (
    CASES,
    GROWING_QUERIES,
    LLAMA3_ROPE,
    LONG_ROPE,
    relative_error,
    tiny_model,
    token_ids,
)

from slicegpt.errors import SliceGPTError
from slicegpt.families import FAMILIES, facts_of
from slicegpt.runtime import to_canonical

# One case a family, of those in tests/support/tiny_models.py.
BASE = {
    "llama": "llama",
    "mistral": "mistral-window",
    "qwen2": "qwen2",
    "qwen3": "qwen3-tied",
    "opt": "opt",
    "phi": "phi",
    "phi3": "phi3-window",
    "gemma": "gemma",
    "granite": "granite",
    "gpt_neox": "gpt-neox",
    "stablelm": "stablelm",
    "starcoder2": "starcoder2",
    "olmo": "olmo",
    "cohere": "cohere",
    "ministral": "ministral",
    "cwm": "cwm",
    "seed_oss": "seed-oss",
    "exaone": "exaone",
    "internlm3": "internlm3",
    "iquestcoder": "iquest-coder",
    "gpt2": "gpt2",
    "falcon": "falcon",
    "nemotron": "nemotron",
    "arcee": "arcee",
    "jais2": "jais2",
    "glm": "glm",
    "ernie4_5": "ernie",
    "helium": "helium",
    "smollm3": "smollm3",
    "cohere2": "cohere2",
    "granitemoehybrid": "granite4",
    "ministral3": "ministral3",
    "hunyuan_v1_dense": "hunyuan",
    "apertus": "apertus",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "olmo2": "olmo2",
    "olmo3": "olmo3",
    "exaone4": "exaone4",
    "glm4": "glm4",
    "granite_swa": "granite-swa",
    "mixtral": "mixtral",
    "qwen2_moe": "qwen2-moe",
    "qwen3_moe": "qwen3-moe",
    "olmoe": "olmoe",
    "phimoe": "phimoe",
    "glm4_moe": "glm4-moe",
    "gpt_oss": "gpt-oss",
    "deepseek_v2": "deepseek-v2",
    "deepseek_v3": "deepseek-v3",
    "sarvam_mla": "sarvam-mla",
    "glm4_moe_lite": "glm4-moe-lite",
    "youtu": "youtu",
}

THETA = {"rope_theta": 100.0}
ROPES = [
    THETA | {"rope_type": "default"},
    THETA | {"rope_type": "default", "partial_rotary_factor": 0.5},
    THETA | {"rope_type": "linear", "factor": 4.0},
    THETA | {"rope_type": "linear", "factor": 4.0, "partial_rotary_factor": 0.5},
    THETA | {"rope_type": "dynamic", "factor": 2.0},
    THETA | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    THETA
    | {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "beta_fast": 4.0,
        "truncate": False,
    },
    LLAMA3_ROPE,
    LONG_ROPE,
    LONG_ROPE | {"short_factor": [1.0]},
    THETA | {"rope_type": "proportional", "partial_rotary_factor": 0.5},
    THETA | {"rope_type": "ntk_by_parts", "factor": 2.0},
    {"rope_type": "default", "rope_theta": 0.0},
    {"rope_type": "default", "rope_theta": float("nan")},
    THETA | {"rope_type": "dynamic", "factor": 1.0, "alpha": 5.0},
    THETA | {"rope_type": "default", "alpha": 5.0},
    GROWING_QUERIES | {"original_max_position_embeddings": 4},
    GROWING_QUERIES | {"llama_4_scaling_beta": None},
    THETA | {"rope_type": "default", "llama_4_scaling_beta": 0.5, "original_max_position_embeddings": 4},
    {"full_attention": {"rope_type": "default", "rope_theta": 10.0}},
]
BOTH = [False, True]
EPSILONS = [0.0, 1e-3, -1.0, float("nan")]
FACTORS = [0.0, 0.5, -2.0, float("inf")]

# Fields that change the function in one family at least, and what is tried.
PROBES: dict[str, list] = {
    "hidden_size": [40, 44, 46, 0],
    "intermediate_size": [1, 33, 0],
    "ffn_dim": [1, 33],
    "num_hidden_layers": [1, 2, 0],
    "num_attention_heads": [2, 6, 8, 16, 0],
    "num_key_value_heads": [1, 2, 3, 4, 0, None],
    "head_dim": [6, 16, 7, 1, 0, None],
    "hidden_act": ["gelu", "silu", "relu", "relu2", "tanh", "quick_gelu", "xielu", "prelu", "swiglu"],
    "activation_function": ["gelu", "silu", "relu", "relu2", "xielu", "swiglu"],
    "max_position_embeddings": [8, 16, 100],
    "original_max_position_embeddings": [4, 16],
    "n_embd": [40, 44, 46, 0],
    "n_inner": [1, 33, 0, None],
    "n_layer": [1, 2, 0],
    "n_head": [2, 6, 8, 16, 0],
    "n_positions": [8, 16, 100],
    "ffn_hidden_size": [1, 33],
    "num_kv_heads": [1, 2, 3, 4, 0, None],
    "activation": ["gelu", "silu", "relu", "relu2", "xielu", "swiglu"],
    "layer_norm_epsilon": EPSILONS,
    "norm_eps": EPSILONS,
    "rms_norm_eps": EPSILONS,
    "layer_norm_eps": EPSILONS,
    "norm_epsilon": EPSILONS,
    "tie_word_embeddings": BOTH,
    "attention_bias": BOTH,
    "mlp_bias": BOTH,
    "use_bias": BOTH,
    "use_qkv_bias": BOTH,
    "attention_out_bias": BOTH,
    "enable_bias": BOTH,
    "layer_norm_elementwise_affine": BOTH,
    "do_layer_norm_before": BOTH,
    "_remove_final_layer_norm": BOTH,
    "word_embed_proj_dim": [24, 48],
    "qk_layernorm": BOTH,
    "use_qk_norm": BOTH,
    "clip_qkv": [0.1, None],
    "use_parallel_residual": BOTH,
    "parallel_attn": BOTH,
    "multi_query": BOTH,
    "new_decoder_architecture": BOTH,
    "num_ln_in_parallel_attn": [1, 2, None],
    "bias": BOTH,
    "alibi": BOTH,
    "scale_attn_weights": BOTH,
    "scale_attn_by_inverse_layer_idx": BOTH,
    "reorder_and_upcast_attn": BOTH,
    "add_cross_attention": BOTH,
    "use_sliding_window": BOTH,
    "sliding_window": [1, 3, 0, None],
    "max_window_layers": [0, 1, 3],
    "layer_types": [
        ["full_attention"] * 2,
        ["sliding_attention"] * 2,
        ["full_attention"],
        ["linear_attention"] * 2,
    ],
    "rope_parameters": ROPES,
    "rope_scaling": ROPES[2:7],
    "rope_theta": [10.0, 1e6],
    "partial_rotary_factor": [0.25, 0.3, 0.5, 1.0, 0.0, 1.5],
    "rotary_pct": [0.25, 0.5, 1.0],
    "embedding_multiplier": FACTORS,
    "residual_multiplier": FACTORS,
    "attention_multiplier": FACTORS,
    "logits_scaling": FACTORS,
    "logit_scale": FACTORS,
    "is_causal": BOTH,
    "is_decoder": BOTH,
    "is_encoder_decoder": [True],
    "use_bidirectional_attention": [True, None],
    "hidden_activation": ["gelu", "silu", "relu", "xielu", "swiglu"],
    "attn_logit_softcapping": [1.0, None, 0.0, -1.0],
    "final_logit_softcapping": [1.0, None, 0.0, -1.0],
    "query_pre_attn_scalar": [3, 16, 0, -1],
    "sliding_window_pattern": [1, 2, 3, None],
    "layer_rope_theta": [[10.0, 10.0], [0, 0], [10.0], [10.0, -1.0], None],
    "attention_chunk_size": [4],
    "chunk_size_feed_forward": [2],
    "no_rope_layers": [[0, 0], [1, 1], [0, 1, 1], [1]],
    "no_rope_layer_interval": [1, 2, 3],
    "num_local_experts": [0, 2],
    "num_experts": [0, 1, 3],
    "n_routed_experts": [0, 4, 6],
    "num_experts_per_tok": [0, 1, 2, 5],
    "kv_lora_rank": [1, 24, 0],
    "q_lora_rank": [1, 24, 0, None],
    "qk_nope_head_dim": [1, 7, 0],
    "qk_rope_head_dim": [2, 8, 7, 0],
    "v_head_dim": [1, 24, 0],
    "rope_interleave": BOTH,
    "topk_method": ["greedy", "group_limited_greedy", "noaux_tc"],
    "moe_intermediate_size": [1, 33, 0],
    "shared_expert_intermediate_size": [1, 33],
    "n_shared_experts": [2],
    "norm_topk_prob": BOTH,
    "routed_scaling_factor": [0.0, 0.5, float("inf")],
    "router_jitter_noise": [0.0, 0.5],
    "n_group": [1, 2, 3, 8],
    "topk_group": [0, 1, 4],
    "first_k_dense_replace": [0, 2],
    "mlp_layer_types": [["dense"] * 2, ["sparse"] * 2, ["sparse"]],
    "decoder_sparse_step": [1, 2],
    "mlp_only_layers": [[], [0, 1]],
    "qkv_bias": BOTH,
    "lm_head_bias": BOTH,
    "swiglu_alpha": [1.0],
    "swiglu_limit": [0.1, 7.0, 0.0],
    "output_router_logits": BOTH,
    "shared_intermediate_size": [1, 33],
    "position_embedding_type": ["rope", None, "learned"],
    "use_cache": BOTH,
    "pretraining_tp": [2],
}
# What a message may name instead: a field that follows from the one that was set.
MEANT = {
    "rope_scaling": ["rope_parameters"],
    "use_sliding_window": ["sliding_window"],
    "layer_types": ["sliding_window"],
    "rotary_pct": ["partial_rotary_factor"],
}
# Some classes take these without a field of their own.
OBEYED_ANYWHERE = ("head_dim", "rope_scaling", "partial_rotary_factor", "layer_types")
# They say how a model is trained, initialised, stored or called, or what its tokens are.
WITHOUT_EFFECT = {
    "vocab_size",  # the table's rows: nothing else can be meant
    "initializer_range",
    "embedding_initializer_range",
    "init_std",
    "layerdrop",
    "dropout",
    "attention_dropout",
    "hidden_dropout",
    "classifier_dropout",
    "resid_pdrop",
    "embd_pdrop",
    "attn_pdrop",
    "residual_dropout",
    "embedding_dropout",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "eod_token_id",
    "architectures",
    "dtype",
    "id2label",
    "label2id",
    "output_hidden_states",
    "problem_type",
    "return_dict",
    "summary_activation",
    "summary_first_dropout",
    "summary_proj_to_labels",
    "summary_type",
    "summary_use_proj",
    # Of layers that no supported model has.
    "mamba_chunk_size",
    "mamba_conv_bias",
    "mamba_d_conv",
    "mamba_d_head",
    "mamba_d_state",
    "mamba_expand",
    "mamba_n_groups",
    "mamba_n_heads",
    "mamba_proj_bias",
    "num_mtp_layers",
    "input_jitter_noise",
    "router_aux_loss_coef",
    "time_step_limit",
    "transformers_version",
}


def test_every_field_of_every_config_class_is_probed():
    assert set(BASE) == set(FAMILIES)
    for case in BASE.values():
        fields = {field.name for field in dataclasses.fields(CASES[case][1])}
        assert not fields - set(PROBES) - WITHOUT_EFFECT


@torch.no_grad()
def outcome(case: str, **changes) -> str:
    """What becomes of a case with `changes` to its config: "equal", "refused", or what went wrong."""
    ids, kinds = token_ids(2), CASES[case][2].get("layer_types")
    two_layers = {"num_hidden_layers": 2} | ({} if kinds is None else {"layer_types": kinds[:2]})
    try:
        model = tiny_model(case, **two_layers | changes)
    except Exception:  # such a config or model does not exist: loading says so in one line
        return "refused"
    try:
        expected = model(ids).logits
    except IndexError:  # more tokens than learned positions
        return "refused"
    except Exception as error:
        expected = error
    try:
        facts_of(model.config)
        actual = to_canonical(model)(ids).logits
    except SliceGPTError as error:
        inner = [key for value in changes.values() if isinstance(value, dict) for key in value]
        # Some classes have two names for a field (Mixtral's num_experts is num_local_experts).
        aliases = [pair for pair in model.config.attribute_map.items() if set(pair) & set(changes)]
        names = (*changes, *inner, *MEANT.get(next(iter(changes)), ()), *sum(aliases, ()))
        named = any(name in str(error) for name in names)
        return "refused" if named else f"refused for another reason: {error}"
    if isinstance(expected, Exception):
        return f"accepted what fails in transformers: {expected}"
    if not expected.isfinite().all():
        return f"accepted what is not finite: {changes}"
    error = relative_error(actual, expected)
    # Float64 throughout but for positions' angles, which both sides have in float32, from the same numbers.
    return "equal" if error < 1e-10 else f"another model: relative error {error:.1e}"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_field_is_obeyed_or_refused(family):
    own = {field.name for field in dataclasses.fields(CASES[BASE[family]][1])}
    outcomes = {
        (name, str(value)): outcome(BASE[family], **{name: value})
        for name, values in PROBES.items()
        for value in (values if name in own or name in OBEYED_ANYWHERE else values[:2])
    }
    wrong = {probe: text for probe, text in outcomes.items() if text not in ("equal", "refused")}
    assert not wrong
    assert sum(text == "equal" for text in outcomes.values()) > len(outcomes) / 3
