"""Model families, one short file each: how a Hugging Face checkpoint maps onto the canonical network."""

from transformers import PreTrainedConfig, PreTrainedModel

from slicegpt.errors import SliceGPTError

from .base import Checkpoint, DenseLayer, Family, LayerNames, Linear, Norm
from .cohere import COHERE
from .gemma import GEMMA
from .gpt_neox import GPT_NEOX
from .granite import GRANITE
from .llama import LLAMA
from .mistral import MISTRAL
from .olmo import OLMO
from .opt import OPT
from .phi import PHI
from .phi3 import PHI3
from .qwen import QWEN2, QWEN3
from .stablelm import STABLELM
from .starcoder2 import STARCODER2

__all__ = [
    "FAMILIES",
    "Checkpoint",
    "DenseLayer",
    "Family",
    "LayerNames",
    "Linear",
    "Norm",
    "canonical_fields",
    "checkpoint_of",
    "family_of",
]

FAMILIES = {
    family.model_type: family
    for family in (
        LLAMA,
        MISTRAL,
        QWEN2,
        QWEN3,
        OPT,
        PHI,
        PHI3,
        GEMMA,
        GRANITE,
        GPT_NEOX,
        STABLELM,
        STARCODER2,
        OLMO,
        COHERE,
    )
}

# They scale what a block writes by its own length, which neither a linear layer nor a sliced stream can know.
_NORMS_BEHIND_BLOCKS = ("gemma2", "gemma3", "gemma3_text", "olmo2", "olmo3")

_TOKEN_FIELDS = ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id", "initializer_range")


def family_of(config: PreTrainedConfig) -> Family:
    """The family of a Hugging Face config; `SliceGPTError` names the supported ones where there is none."""
    family = FAMILIES.get(config.model_type)
    if family is None:
        supported = ", ".join(f"{name} ({family.architectures[0]})" for name, family in FAMILIES.items())
        what, why = f"model_type {config.model_type!r}", ""
        if config.model_type == "slicegpt":
            what = "an already sliced model"
        elif config.model_type in _NORMS_BEHIND_BLOCKS:
            why = ", whose blocks normalise what they write,"
        raise SliceGPTError(f"{what}{why} is not supported; supported are {supported}", "model")
    return family


def checkpoint_of(model: PreTrainedModel) -> Checkpoint:
    """A loaded Hugging Face model's tensors by their canonical names (no copies)."""
    return Checkpoint(family_of(model.config), model.state_dict(), model.config)


def canonical_fields(model: PreTrainedModel) -> dict:
    """The fields of `SlicedConfig` that do not depend on slicing, from a dense Hugging Face model.

    Which biases exist is read off its tensors: a norm's shift becomes a bias of the layers that read it.
    """
    config, checkpoint = model.config, checkpoint_of(model)
    layer, head, norm = checkpoint.layer(0), checkpoint.head, checkpoint.final_norm
    tied = bool(config.tie_word_embeddings)
    fields = {name: getattr(config, name) for name in _TOKEN_FIELDS if hasattr(config, name)}
    return (
        fields
        | checkpoint.family.facts(config)
        | {
            "tie_word_embeddings": tied,
            "attention_bias": layer.q.bias is not None or layer.attention_norm.bias is not None,
            "attention_output_bias": layer.o.bias is not None,
            "qk_norm": layer.q_norm is not None,
            "gated_mlp": layer.gate is not None,
            "mlp_bias": layer.up.bias is not None or layer.mlp_norm.bias is not None,
            "mlp_output_bias": layer.down.bias is not None,
            "lm_head_bias": head.bias is not None or (not tied and norm.bias is not None),
            "final_norm_bias": tied and norm.bias is not None,
            "source_model_type": config.model_type,
            "source_parameters": sum(parameter.numel() for parameter in model.parameters()),
        }
    )
