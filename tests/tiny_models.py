"""Small random Hugging Face models of every family, and the network in honest float64."""

from types import MethodType

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
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
}


def tiny_model(case: str, dtype: torch.dtype = torch.float64, seed: int = 0, **changes) -> PreTrainedModel:
    """A random model of a family in eval mode, norms and biases random as well, so that nothing folds trivially.

    `changes` are made to the case's config.
    """
    torch.manual_seed(seed)
    model_class, config_class, config = CASES[case]
    model = model_class(config_class(**(config | changes))).to(dtype).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.3 if parameter.ndim == 1 else 0.15
            centre = 1.0 if parameter.ndim == 1 and "norm" in name and name.endswith("weight") else 0.0
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(centre + scale * noise)
    return honest_norms(model)


def honest_norms(model: PreTrainedModel) -> PreTrainedModel:
    """transformers' RMSNorms compute in float32 whatever the dtype; in float64 models let them compute in float64."""

    def forward(self, hidden_states):
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        return self.weight * (hidden_states * torch.rsqrt(variance + self.variance_epsilon))

    if model.dtype == torch.float64:
        for module in model.modules():
            if hasattr(module, "variance_epsilon"):
                module.forward = MethodType(forward, module)
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


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Frobenius norm of the difference over that of what is expected."""
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()
