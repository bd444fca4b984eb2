"""Small random Hugging Face models of every family, and the network in honest float64."""

import copy
from types import MethodType

import torch
import torch.nn.functional as F
import transformers
from transformers import (
    ApertusConfig,
    ApertusForCausalLM,
    ArceeConfig,
    ArceeForCausalLM,
    Cohere2Config,
    Cohere2ForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    CwmConfig,
    CwmForCausalLM,
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Ernie4_5Config,
    Ernie4_5ForCausalLM,
    Exaone4Config,
    Exaone4ForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    Glm4Config,
    Glm4ForCausalLM,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    Glm4MoeLiteConfig,
    Glm4MoeLiteForCausalLM,
    GlmConfig,
    GlmForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    GraniteMoeHybridConfig,
    GraniteMoeHybridForCausalLM,
    GraniteSWAConfig,
    GraniteSWAForCausalLM,
    HeliumConfig,
    HeliumForCausalLM,
    HunYuanDenseV1Config,
    HunYuanDenseV1ForCausalLM,
    Jais2Config,
    Jais2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Ministral3Config,
    Ministral3ForCausalLM,
    MinistralConfig,
    MinistralForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    NemotronConfig,
    NemotronForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Olmo3Config,
    Olmo3ForCausalLM,
    OlmoConfig,
    OlmoeConfig,
    OlmoeForCausalLM,
    OlmoForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    SeedOssConfig,
    SeedOssForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
    StableLmConfig,
    StableLmForCausalLM,
    Starcoder2Config,
    Starcoder2ForCausalLM,
    YoutuConfig,
    YoutuForCausalLM,
)
from transformers.modeling_rope_utils import dynamic_rope_update
from transformers.models.cohere import modeling_cohere
from transformers.models.cohere2 import modeling_cohere2
from transformers.models.deepseek_v2 import modeling_deepseek_v2
from transformers.models.ernie4_5 import modeling_ernie4_5
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.granite_swa import modeling_granite_swa

# Not in transformers 5.19 and older: their cases are left out there.
ExaoneConfig, InternLM3Config, IQuestCoderConfig, SarvamMLAConfig = (
    getattr(transformers, f"{name}Config", None)
    for name in ("Exaone", "InternLM3", "IQuestCoder", "SarvamMLA")
)

VOCAB = 96
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GATED = COMMON | {"intermediate_size": 80, "num_key_value_heads": 2}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
# Positions up to 32 take the short factors; a head has 12 entries, 6 pairs.
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
    "long_factor": [2.0, 2.5, 3.0, 3.5, 4.0, 4.5],
    "original_max_position_embeddings": 32,
}
# Queries at positions from 32 on are longer.
GROWING_QUERIES = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 2.0,
    "original_max_position_embeddings": 32,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.5,
}
# Of layers with a window, and of the others.
TWO_ROPES = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    "full_attention": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
}
GRANITE = {
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.15,
    "logits_scaling": 8.0,
}
GRANITE4 = (
    GATED
    | GRANITE
    | {"num_local_experts": 0, "shared_intermediate_size": 80, "position_embedding_type": "rope"}
    | {"layer_types": ["full_attention"] * 3, "mamba_n_heads": 4, "tie_word_embeddings": True}
)

# Both factors on cosines and sines are the same in the published model.
PHIMOE_ROPE = LONG_ROPE | {"short_mscale": 1.2, "long_mscale": 1.2, "long_factor": [1.0] * 6}
MIXED_EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "mlp_only_layers": [1],
}
GLM_EXPERTS = {
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 1.5,
}
# Entries of a query: 10 without positions and 6 rotated ones; a value has 8. YaRN multiplies scores as well.
LATENTS = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "v_head_dim": 8,
    "first_k_dense_replace": 1,
}
YARN_LATENTS = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 2.0,
    "original_max_position_embeddings": 32,
    "mscale": 0.7,
    "mscale_all_dim": 1.0,
}

# Model class, config class, config.
CASES = {
    "llama": (LlamaForCausalLM, LlamaConfig, GATED),
    "llama-tied": (LlamaForCausalLM, LlamaConfig, GATED | {"tie_word_embeddings": True}),
    "llama-3": (LlamaForCausalLM, LlamaConfig, GATED | {"rope_parameters": LLAMA3_ROPE, "head_dim": 16}),
    "llama-biased": (LlamaForCausalLM, LlamaConfig, GATED | {"attention_bias": True, "mlp_bias": True}),
    "mistral-window": (MistralForCausalLM, MistralConfig, GATED | {"sliding_window": 5}),
    "qwen2": (
        Qwen2ForCausalLM,
        Qwen2Config,
        GATED | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3-tied": (Qwen3ForCausalLM, Qwen3Config, GATED | {"head_dim": 8, "tie_word_embeddings": True}),
    "opt": (OPTForCausalLM, OPTConfig, COMMON | {"ffn_dim": 80}),
    "opt-untied": (OPTForCausalLM, OPTConfig, COMMON | {"ffn_dim": 80, "tie_word_embeddings": False}),
    "opt-no-bias": (
        OPTForCausalLM,
        OPTConfig,
        COMMON | {"ffn_dim": 80, "enable_bias": False, "layer_norm_elementwise_affine": False},
    ),
    "phi": (
        PhiForCausalLM,
        PhiConfig,
        COMMON | {"intermediate_size": 80, "num_key_value_heads": 2, "partial_rotary_factor": 0.5},
    ),
    "phi3-window": (Phi3ForCausalLM, Phi3Config, GATED | {"sliding_window": 5}),
    "phi3-long": (
        Phi3ForCausalLM,
        Phi3Config,
        GATED | {"rope_parameters": LONG_ROPE, "original_max_position_embeddings": 32},
    ),
    "gemma": (GemmaForCausalLM, GemmaConfig, GATED | {"head_dim": 16}),
    "granite": (GraniteForCausalLM, GraniteConfig, GATED | GRANITE),
    "granite-tied": (
        GraniteForCausalLM,
        GraniteConfig,
        GATED | GRANITE | {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    ),
    "gpt-neox": (GPTNeoXForCausalLM, GPTNeoXConfig, COMMON | {"intermediate_size": 80, "rotary_pct": 0.5}),
    "gpt-neox-sequential": (
        GPTNeoXForCausalLM,
        GPTNeoXConfig,
        COMMON
        | {
            "intermediate_size": 80,
            "rotary_pct": 0.5,
            "use_parallel_residual": False,
            "attention_bias": False,
        },
    ),
    "stablelm": (
        StableLmForCausalLM,
        StableLmConfig,
        GATED | {"partial_rotary_factor": 0.5, "use_qkv_bias": True},
    ),
    "stablelm-parallel": (
        StableLmForCausalLM,
        StableLmConfig,
        GATED | {"partial_rotary_factor": 0.5, "use_parallel_residual": True},
    ),
    "starcoder2": (Starcoder2ForCausalLM, Starcoder2Config, GATED | {"sliding_window": 5}),
    "olmo": (OlmoForCausalLM, OlmoConfig, GATED),
    "cohere": (CohereForCausalLM, CohereConfig, GATED | {"logit_scale": 0.25}),
    "ministral": (MinistralForCausalLM, MinistralConfig, GATED | {"head_dim": 16, "sliding_window": 5}),
    "cwm": (CwmForCausalLM, CwmConfig, GATED | {"head_dim": 16, "sliding_window": 5}),
    "seed-oss": (SeedOssForCausalLM, SeedOssConfig, GATED | {"head_dim": 16, "attention_out_bias": True}),
    "exaone": (LlamaForCausalLM, ExaoneConfig, GATED | {"rope_parameters": LLAMA3_ROPE}),
    "internlm3": (
        LlamaForCausalLM,
        InternLM3Config,
        GATED | {"head_dim": 16, "attention_bias": True, "mlp_bias": True},
    ),
    "iquest-coder": (LlamaForCausalLM, IQuestCoderConfig, GATED | {"head_dim": 16}),
    "gpt2": (GPT2LMHeadModel, GPT2Config, COMMON | {"n_inner": 80}),
    "gpt2-untied": (GPT2LMHeadModel, GPT2Config, COMMON | {"tie_word_embeddings": False}),
    "falcon": (FalconForCausalLM, FalconConfig, COMMON | {"ffn_hidden_size": 80}),
    "falcon-grouped": (
        FalconForCausalLM,
        FalconConfig,
        COMMON
        | {"ffn_hidden_size": 80, "new_decoder_architecture": True, "num_kv_heads": 2, "bias": True}
        | {"tie_word_embeddings": False},
    ),
    "falcon-sequential": (
        FalconForCausalLM,
        FalconConfig,
        COMMON | {"ffn_hidden_size": 80, "multi_query": False, "parallel_attn": False},
    ),
    "nemotron": (NemotronForCausalLM, NemotronConfig, GATED | {"head_dim": 16, "mlp_bias": True}),
    "arcee": (ArceeForCausalLM, ArceeConfig, GATED),
    "jais2": (Jais2ForCausalLM, Jais2Config, GATED),
    "glm": (GlmForCausalLM, GlmConfig, GATED | {"head_dim": 16}),
    "ernie": (Ernie4_5ForCausalLM, Ernie4_5Config, GATED | {"head_dim": 16, "use_bias": True}),
    "smollm3": (SmolLM3ForCausalLM, SmolLM3Config, GATED | {"no_rope_layer_interval": 2}),
    "smollm3-window": (
        SmolLM3ForCausalLM,
        SmolLM3Config,
        GATED | {"no_rope_layers": [0, 1, 0], "use_sliding_window": True, "sliding_window": 5},
    ),
    "cohere2": (
        Cohere2ForCausalLM,
        Cohere2Config,
        GATED | {"logit_scale": 0.25, "sliding_window": 5, "sliding_window_pattern": 2},
    ),
    "granite4": (GraniteMoeHybridForCausalLM, GraniteMoeHybridConfig, GRANITE4),
    "granite4-no-positions": (
        GraniteMoeHybridForCausalLM,
        GraniteMoeHybridConfig,
        GRANITE4 | {"position_embedding_type": None, "head_dim": 16},
    ),
    "hunyuan": (HunYuanDenseV1ForCausalLM, HunYuanDenseV1Config, GATED | {"head_dim": 16}),
    "hunyuan-alpha": (
        HunYuanDenseV1ForCausalLM,
        HunYuanDenseV1Config,
        GATED
        | {
            "head_dim": 16,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e2, "factor": 1.0, "alpha": 9.0},
        },
    ),
    "apertus": (ApertusForCausalLM, ApertusConfig, GATED | {"rope_parameters": LLAMA3_ROPE}),
    "ministral3": (
        Ministral3ForCausalLM,
        Ministral3Config,
        GATED | {"head_dim": 16, "rope_parameters": GROWING_QUERIES},
    ),
    "helium": (HeliumForCausalLM, HeliumConfig, GATED | {"head_dim": 12}),
    "gemma2": (
        Gemma2ForCausalLM,
        Gemma2Config,
        GATED
        | {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 5, "attn_logit_softcapping": 0.5}
        # transformers' other implementations of attention pass over the cap.
        | {"final_logit_softcapping": 2.0, "attn_implementation": "eager"},
    ),
    "gemma3": (
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        GATED
        | {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 5, "rope_parameters": TWO_ROPES}
        | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
    "olmo2": (Olmo2ForCausalLM, Olmo2Config, GATED | {"attention_bias": True}),
    "olmo3": (
        Olmo3ForCausalLM,
        Olmo3Config,
        GATED
        | {"sliding_window": 5, "rope_parameters": TWO_ROPES}
        | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
    "exaone4": (
        Exaone4ForCausalLM,
        Exaone4Config,
        GATED | {"head_dim": 16, "sliding_window": 5, "sliding_window_pattern": 2},
    ),
    "granite-swa": (
        GraniteSWAForCausalLM,
        GraniteSWAConfig,
        GATED
        | GRANITE
        | {"sliding_window": 5, "layer_rope_theta": [100.0, 0, 1e4], "attn_implementation": "eager"},
    ),
    "glm4": (Glm4ForCausalLM, Glm4Config, GATED | {"head_dim": 16}),
    "mixtral": (
        MixtralForCausalLM,
        MixtralConfig,
        GATED | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 5},
    ),
    "qwen2-moe": (
        Qwen2MoeForCausalLM,
        Qwen2MoeConfig,
        GATED | MIXED_EXPERTS | {"shared_expert_intermediate_size": 40},
    ),
    "qwen3-moe": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig,
        GATED | MIXED_EXPERTS | {"head_dim": 8, "norm_topk_prob": True, "tie_word_embeddings": True},
    ),
    "olmoe": (
        OlmoeForCausalLM,
        OlmoeConfig,
        GATED | {"num_experts": 4, "num_experts_per_tok": 2},
    ),
    "phimoe": (
        PhimoeForCausalLM,
        PhimoeConfig,
        GATED | {"num_local_experts": 4, "router_jitter_noise": 0.2, "rope_parameters": PHIMOE_ROPE},
    ),
    "glm4-moe": (
        Glm4MoeForCausalLM,
        Glm4MoeConfig,
        GATED | GLM_EXPERTS | {"head_dim": 16, "use_qk_norm": True, "attention_bias": True},
    ),
    "gpt-oss": (
        GptOssForCausalLM,
        GptOssConfig,
        GATED
        | {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 5}
        | {"swiglu_limit": 0.5},
    ),
    "deepseek-v2": (
        DeepseekV2ForCausalLM,
        DeepseekV2Config,
        GATED
        | GLM_EXPERTS
        | LATENTS
        | {"q_lora_rank": None, "n_shared_experts": 2, "topk_method": "group_limited_greedy"},
    ),
    "deepseek-v3": (
        DeepseekV3ForCausalLM,
        DeepseekV3Config,
        GATED
        | GLM_EXPERTS
        | LATENTS
        | {"q_lora_rank": 24, "rope_parameters": YARN_LATENTS, "attention_bias": True},
    ),
    "sarvam-mla": (DeepseekV3ForCausalLM, SarvamMLAConfig, GATED | GLM_EXPERTS | LATENTS),
    "glm4-moe-lite": (
        Glm4MoeLiteForCausalLM,
        Glm4MoeLiteConfig,
        GATED
        | GLM_EXPERTS
        | {name: value for name, value in LATENTS.items() if name != "first_k_dense_replace"}
        | {"q_lora_rank": 24},
    ),
    "youtu": (
        YoutuForCausalLM,
        YoutuConfig,
        GATED
        | {name: value for name, value in LATENTS.items() if name != "first_k_dense_replace"}
        # transformers zeroes the row of a padding token whenever it loads one.
        | {"q_lora_rank": 24, "rope_interleave": False, "pad_token_id": None},
    ),
}

CASES = {name: case for name, case in CASES.items() if case[1] is not None}

# Their activation has weights, their attention is latent, or their MLPs are experts: the fused operators take none.
EXPERTS = {"mixtral", "qwen2-moe", "qwen3-moe", "olmoe", "phimoe", "glm4-moe", "gpt-oss"}
EXPERTS |= {"deepseek-v2", "deepseek-v3", "sarvam-mla", "glm4-moe-lite"}
PLAIN_ONLY = {"apertus", "youtu"} | EXPERTS
# They normalise what their blocks write: the stream keeps its columns and its basis.
NORMS_BEHIND = {"gemma2", "gemma3", "olmo2", "olmo3", "exaone4", "glm4"}
FUSED_CASES = sorted(set(CASES) - PLAIN_ONLY)
SLICEABLE = sorted(set(CASES) - NORMS_BEHIND)


def tiny_model(case: str, dtype: torch.dtype = torch.float64, seed: int = 0, **changes) -> PreTrainedModel:
    """A random model of a family in eval mode, norms and biases random as well, so that nothing folds trivially.

    `changes` are made to the case's config.
    """
    torch.manual_seed(seed)
    model_class, config_class, config = CASES[case]
    # transformers writes into the dictionaries that it is given.
    model = model_class(config_class(**copy.deepcopy(config | changes))).to(dtype).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.3 if parameter.ndim == 1 else 0.15
            centre = 1.0 if parameter.ndim == 1 and "norm" in name and name.endswith("weight") else 0.0
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(centre + scale * noise)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(0.3 * torch.randn(buffer.shape, generator=generator, dtype=torch.float64))
    return in_float64(model)


def _rotary_of_neighbours(q, k, cos, sin):
    cos, sin, rotate = cos[:, None], sin[:, None], modeling_cohere.rotate_half
    return q * cos + rotate(q) * sin, k * cos + rotate(k) * sin


def _ernie_rotary(q, k, cos, sin):
    cos, sin = (table[..., : table.shape[-1] // 2].repeat_interleave(2, dim=-1) for table in (cos, sin))
    return _rotary_of_neighbours(q, k, cos.to(q.dtype), sin.to(q.dtype))


def _capped_attention(
    module, query, key, value, attention_mask, dropout=0.0, scaling=None, softcap=None, **_
):
    keys, values = (states.repeat_interleave(module.num_key_value_groups, dim=1) for states in (key, value))
    scores = query @ keys.mT * scaling
    scores = scores if softcap is None else torch.tanh(scores / softcap) * softcap
    shares = (scores if attention_mask is None else scores + attention_mask).softmax(dim=-1)
    return (shares @ values).transpose(1, 2), shares


def _attention_with_sinks(module, query, key, value, attention_mask, scaling, dropout=0.0, **_):
    keys, values = (states.repeat_interleave(module.num_key_value_groups, dim=1) for states in (key, value))
    scores = query @ keys.mT * scaling
    scores = scores if attention_mask is None else scores + attention_mask
    share = torch.sigmoid(scores.logsumexp(dim=-1) - module.sinks.view(1, -1, 1))
    return (scores.softmax(dim=-1) @ values * share[..., None]).transpose(1, 2), None


@dynamic_rope_update
def _turns(self, x, position_ids):
    """As `torch.polar` gives them, whose last bits are not those of `cos` and `sin`."""
    angles = position_ids[..., None].float() * self.inv_freq.float()
    return torch.complex(angles.cos(), angles.sin()) * self.attention_scaling


def _complex_rotary(q, k, turns):
    wide = torch.promote_types(q.dtype, torch.float32)
    pairs = (states.to(wide).unflatten(-1, (-1, 2)).contiguous() for states in (q, k))
    turned = (torch.view_as_real(torch.view_as_complex(states) * turns[:, None]) for states in pairs)
    return tuple(states.flatten(3).to(q.dtype) for states in turned)


# The same functions for float32 inputs.
modeling_deepseek_v2.DeepseekV2RotaryEmbedding.forward = _turns
modeling_deepseek_v2.apply_rotary_emb = _complex_rotary
modeling_granite_swa.eager_attention_forward = _attention_with_sinks
modeling_gemma2.eager_attention_forward = _capped_attention
modeling_cohere.apply_rotary_pos_emb = modeling_cohere2.apply_rotary_pos_emb = _rotary_of_neighbours
modeling_ernie4_5.apply_rotary_pos_emb = _ernie_rotary


def in_float64(model: PreTrainedModel) -> PreTrainedModel:
    """transformers computes norms and Gemma's embedding scale in float32 whatever the dtype (and Cohere's and ERNIE's
    rotary positions and Gemma 2's softmax, see above); in float64 models let them be in float64."""

    def rms_norm(self, hidden_states):
        eps = self.eps if hasattr(self, "eps") else self.variance_epsilon
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        weight = 1 + self.weight if type(self).__name__.startswith("Gemma") else self.weight
        return weight * (hidden_states * torch.rsqrt(variance + eps))

    def layer_norm(self, hidden_states):
        eps = getattr(self, "variance_epsilon", 1e-5)
        return F.layer_norm(hidden_states, hidden_states.shape[-1:], getattr(self, "weight", None), None, eps)

    def softmax_router(self, hidden_states):
        logits = F.linear(hidden_states.reshape(-1, self.hidden_dim), self.weight)
        chosen = logits.softmax(-1).topk(self.top_k, dim=-1)
        normalised = getattr(self, "norm_topk_prob", True)  # Mixtral's has no choice
        total = chosen.values.sum(-1, keepdim=True) if normalised else 1.0
        return logits, chosen.values / total, chosen.indices

    def grouped_router(self, hidden_states):
        logits = F.linear(hidden_states.reshape(-1, self.hidden_dim), self.weight)
        scores = logits.sigmoid()
        groups = (scores + self.e_score_correction_bias).unflatten(1, (self.num_group, -1))
        last = groups.topk(2, dim=-1).values.sum(-1).sort(descending=True).values[:, self.topk_group - 1]
        best = groups.topk(2, dim=-1).values.sum(-1) >= last[:, None]
        indices = groups.masked_fill(~best[..., None], -9.0).flatten(1).topk(self.top_k, dim=-1).indices
        weights = scores.gather(1, indices)
        total = weights.sum(-1, keepdim=True) if self.norm_topk_prob else 1.0
        return logits, weights / total * self.routed_scaling_factor, indices

    def best_groups_router(self, hidden_states):
        logits = F.linear(hidden_states.reshape(-1, self.hidden_dim), self.weight)
        scores = logits.softmax(-1)
        if self.topk_method == "group_limited_greedy":
            best = scores.unflatten(1, (self.num_group, -1)).amax(-1, keepdim=True)
            last = best.sort(dim=1, descending=True).values[:, self.topk_group - 1 : self.topk_group]
            scores = scores.unflatten(1, (self.num_group, -1)).masked_fill(best < last, 0.0).flatten(1)
        chosen = scores.topk(self.top_k, dim=-1)
        return logits, chosen.values * self.routed_scaling_factor, chosen.indices

    if model.dtype == torch.float64:
        model.set_experts_implementation("eager")  # PyTorch's grouped GEMM has no float64
        for module in model.modules():
            name = type(module).__name__
            if name.endswith("RMSNorm"):
                module.forward = MethodType(rms_norm, module)
            elif name in ("CohereLayerNorm", "Cohere2LayerNorm", "OlmoLayerNorm"):
                module.forward = MethodType(layer_norm, module)
            elif name in ("MixtralTopKRouter", "Qwen2MoeTopKRouter", "Qwen3MoeTopKRouter", "OlmoeTopKRouter"):
                module.forward = MethodType(softmax_router, module)
            elif name == "DeepseekV2TopkRouter":
                module.forward = MethodType(best_groups_router, module)
            elif name in ("Glm4MoeTopkRouter", "DeepseekV3TopkRouter", "Glm4MoeLiteTopkRouter"):
                module.forward = MethodType(grouped_router, module)
            elif hasattr(module, "scalar_embed_scale"):
                module.embed_scale = torch.tensor(module.scalar_embed_scale, dtype=torch.float64)
    return model


def token_ids(batch: int = 3, length: int = 12, seed: int = 0) -> torch.Tensor:
    """Random token ids [batch, length] that are not padding."""
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def left_padding(ids: torch.Tensor, lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask with row `i` left-padded to hold only `lengths[i]` tokens."""
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        mask[row, ids.shape[1] - length :] = 1
    return ids * mask, mask


def own_positions(model: PreTrainedModel, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """The positions of tokens that are not padding, as `generate` gives them: what a model has to be told whose scores
    depend on more than distances, and which counts columns otherwise."""
    config = model.config
    absolute = config.model_type in ("gpt2", "hunyuan_v1_dense") or getattr(
        config, "qk_norm_after_rope", False
    )
    return {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)} if absolute else {}


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Frobenius norm of the difference over that of what is expected."""
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()
