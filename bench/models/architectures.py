"""Models by name, without a checkpoint: their configurations, their sliced configurations, and random weights.

The configurations are those of the checkpoints on the Hugging Face hub; the canonical fields come from a model of that
configuration on the meta device, through the code that reads a real checkpoint.
"""

from functools import lru_cache

import torch
from torch import nn
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
from slicegpt.modeling import CompactShortcut, SlicedConfig, SlicedForCausalLM


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


# Large tensors are filled with copies of so many random values: drawing a billion takes a CPU half a minute. Odd, so
# that rows whose length is a power of two differ.
_BLOCK = (1 << 20) + 7


class NormalValues:
    """Fills tensors with normally distributed values at memory bandwidth."""

    def __init__(self, dtype: torch.dtype, device: torch.device, seed: int):
        generator = torch.Generator(device).manual_seed(seed)
        self.values = torch.randn(_BLOCK, device=device, generator=generator).to(dtype)

    def fill(self, tensor: torch.Tensor, deviation: float) -> None:
        """Overwrite a contiguous tensor with values of this standard deviation."""
        scaled = self.values * deviation
        for piece in tensor.view(-1).split(_BLOCK):
            piece.copy_(scaled[: len(piece)])


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


@torch.no_grad()
def random_model(
    config: SlicedConfig,
    dtype: torch.dtype = torch.float16,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> SlicedForCausalLM:
    """A model of this configuration with random weights, made on `device` at its sliced size: no dense model is made.

    Weights are normal with variance 1 / inputs, so that activations stay in the range of half precision; compact
    factors have orthogonal directions and random angles, as after slicing.
    """
    device = torch.device(device)
    with torch.device("meta"):
        model = SlicedForCausalLM(config)
    model = model.to(dtype).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(seed)
    normal = NormalValues(dtype, device, seed)
    # A QR factorisation is slow: one set of directions for each shape.
    directions: dict[tuple[int, int], torch.Tensor] = {}
    for module in model.modules():
        if isinstance(module, CompactShortcut):
            rank, width = module.factor.shape
            if (width, rank) not in directions:
                start = torch.randn(width, rank, device=device, generator=generator)
                directions[width, rank] = torch.linalg.qr(start)[0] if rank else start
            angles = torch.rand(rank, device=device, generator=generator)
            module.factor.copy_((directions[width, rank] * (1 - angles.cos()).sqrt()).mT)
        elif isinstance(module, nn.Linear):
            normal.fill(module.weight, module.in_features**-0.5)
            if module.bias is not None:
                module.bias.zero_()
        elif isinstance(module, nn.Embedding):
            normal.fill(module.weight, 1)
        else:
            for name, parameter in module.named_parameters(recurse=False):
                parameter.fill_(0 if name == "bias" else 1)
    if model.model.rotary_emb is not None:
        model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    if config.tie_word_embeddings:
        # The head shares the embedding's rows: keep the logits near unit variance.
        model.model.embed_tokens.weight.mul_(config.dense_hidden_size**-0.5)
        model.tie_weights()
    return model.eval()
