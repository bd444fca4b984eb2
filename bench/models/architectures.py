"""Models by name, without a checkpoint: their configurations, their sliced configurations, and random weights.

The configurations are those of the checkpoints on the Hugging Face hub; the canonical fields come from a model of that
configuration on the meta device, through the code that reads a real checkpoint.
"""

from functools import lru_cache

import torch
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    LlamaConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from slicegpt.conversion.plan import Shape, constant_widths, plan, width_for_slice
from slicegpt.errors import SliceGPTError
from slicegpt.families import canonical_fields
from slicegpt.modeling import SlicedConfig
from slicegpt.modeling.random_weights import NormalValues


def _llama(
    width, layers, heads, kv_heads, mlp, vocab, positions, kind: type = LlamaConfig, **more
) -> PreTrainedConfig:
    return kind(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=mlp,
        vocab_size=vocab,
        max_position_embeddings=positions,
        **more,
    )


def _opt(width, layers, heads) -> OPTConfig:
    return OPTConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        ffn_dim=4 * width,
        word_embed_proj_dim=width,
        vocab_size=50272,
    )


MODELS: dict[str, PreTrainedConfig] = {
    "smollm2-135m": _llama(576, 30, 9, 3, 1536, 49152, 8192, tie_word_embeddings=True),
    "llama-1b": _llama(2048, 22, 32, 4, 5632, 32000, 2048),  # TinyLlama's shape
    "llama-2-7b": _llama(4096, 32, 32, 32, 11008, 32000, 4096),
    "llama-2-13b": _llama(5120, 40, 40, 40, 13824, 32000, 4096),
    "llama-2-70b": _llama(8192, 80, 64, 8, 28672, 32000, 4096),
    "llama-3-8b": _llama(4096, 32, 32, 8, 14336, 128256, 8192),
    "llama-3-70b": _llama(8192, 80, 64, 8, 28672, 128256, 8192),
    "opt-125m": _opt(768, 12, 12),
    "opt-1.3b": _opt(2048, 24, 32),
    "opt-2.7b": _opt(2560, 32, 32),
    "opt-6.7b": _opt(4096, 32, 32),
    "opt-13b": _opt(5120, 40, 40),
    "opt-30b": _opt(7168, 48, 56),
    "opt-66b": _opt(9216, 64, 72),
    "phi-2": PhiConfig(
        hidden_size=2560,
        num_hidden_layers=32,
        num_attention_heads=32,
        intermediate_size=10240,
        vocab_size=51200,
        max_position_embeddings=2048,
        partial_rotary_factor=0.4,
    ),
    "phi-3-mini": _llama(3072, 32, 32, 32, 8192, 32064, 4096, Phi3Config, sliding_window=2047),
    "phi-4": _llama(5120, 40, 40, 10, 17920, 100352, 16384, Phi3Config),
    "gemma-2b": _llama(2048, 18, 8, 1, 16384, 256000, 8192, GemmaConfig),
}


@lru_cache
def fields_of(name: str) -> dict:
    """The canonical fields (`slicegpt.families.canonical_fields`) of a model in `MODELS`."""
    if name not in MODELS:
        raise SliceGPTError(f"--shape: must be one of {', '.join(MODELS)}, got {name!r}")
    return fields_of_config(MODELS[name])


def fields_of_config(config: PreTrainedConfig) -> dict:
    """The canonical fields of a dense model of this configuration; its weights are never made."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return canonical_fields(model)  # outside: some families compute numbers, which the meta device cannot


def sliced_config(name: str, fraction: float, shortcut: str = "compact", round_to: int = 64) -> SlicedConfig:
    """The configuration of a named model, dense at `fraction` 0 or with that fraction of its columns deleted.

    Compact shortcuts have rank `D - d`, as after slicing (`slicegpt.modeling.configuration.factor_rank`).
    """
    fields = fields_of(name)
    width = width_for_slice(fields["dense_hidden_size"], fraction, round_to)
    return plan(fields, constant_widths(fields, width), Shape(shortcut, round_to=round_to))


@torch.no_grad()
def random_dense(config: PreTrainedConfig, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """A dense model in Hugging Face's own class with random weights, made on `device`; norm scales are 1, biases 0."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model = model.to(dtype).to_empty(device=device)
    model.tie_weights()
    normal = NormalValues(dtype, device, 0)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            normal.fill(parameter, 0.02)  # as the families initialise them
        else:
            parameter.fill_(0 if name.endswith("bias") else 1)
    base = model.base_model  # rotary frequencies are computed, not loaded
    if getattr(base, "rotary_emb", None) is not None:
        base.rotary_emb = type(base.rotary_emb)(model.config).to(device)
    return model.eval()
