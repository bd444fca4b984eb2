"""Gemma 1: Llama's layout; norms scale by `1 + w`, and the embedding is multiplied by `sqrt(D)`.

Gemma 2 and 3 normalise what a block writes as well, which cannot be folded: rotating would change their function.
"""

from dataclasses import replace

import torch
from transformers import PreTrainedConfig

from slicegpt.errors import SliceGPTError

from .base import DenseLayer, StockForm
from .llama import LLAMA, llama_facts
from .rewriting import one_plus, one_plus_norms, scale_writers


def gemma_facts(config: PreTrainedConfig) -> dict:
    """Fields of `SlicedConfig` that a Gemma config determines; the stream is carried in units of `sqrt(D)`."""
    if getattr(config, "use_bidirectional_attention", None):
        raise SliceGPTError(
            "gemma: use_bidirectional_attention=True is not supported: attention must be causal", "model"
        )
    return llama_facts(config, config.rms_norm_eps / config.hidden_size)


def fold_scales(layer: DenseLayer, config: PreTrainedConfig) -> DenseLayer:
    """See `scale_writers`."""
    return scale_writers(one_plus_norms(layer), 1 / _root(layer, config))


def unfold_scales(layer: DenseLayer, config: PreTrainedConfig) -> DenseLayer:
    """Undoes the scaling of the writers, by the root of the width that the config has now."""
    return scale_writers(layer, _root(layer, config))


def _root(layer: DenseLayer, config: PreTrainedConfig) -> float:
    """The root of the width; transformers multiplies by it as the model's dtype rounds it."""
    return torch.tensor(config.hidden_size**0.5, dtype=torch.float64).to(layer.o.weight.dtype).item()


GEMMA = replace(
    LLAMA,
    model_type="gemma",
    architectures=("GemmaForCausalLM",),
    facts=gemma_facts,
    rewrite_layer=fold_scales,
    rewrite_final_norm=one_plus,
    stock=StockForm(eps_factor=float, restore_layer=unfold_scales, norm_offset=-1.0),
)
