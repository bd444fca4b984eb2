"""Model families, one short file each: how a Hugging Face checkpoint maps onto the canonical network."""

from collections.abc import Mapping

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from slicegpt.errors import SliceGPTError

from .apertus import APERTUS
from .base import (
    Checkpoint,
    DenseLayer,
    Expert,
    Family,
    LayerNames,
    Linear,
    Mixture,
    Norm,
    StockForm,
)
from .checks import check_config, check_facts
from .cohere import COHERE, COHERE2
from .deepseek import DEEPSEEK_V2, DEEPSEEK_V3, GLM4_MOE_LITE, SARVAM_MLA, YOUTU
from .exaone4 import EXAONE4
from .experts import GLM4_MOE, GPT_OSS, MIXTRAL, OLMOE, PHIMOE, QWEN2_MOE, QWEN3_MOE
from .falcon import FALCON
from .gemma import GEMMA, GEMMA2, GEMMA3
from .glm import ERNIE, GLM, GLM4, HELIUM
from .gpt2 import GPT2
from .gpt_neox import GPT_NEOX
from .granite import GRANITE, GRANITE4, GRANITE_SWA
from .hunyuan import HUNYUAN
from .llama import LLAMA
from .llama_layouts import EXAONE, INTERNLM3, IQUEST_CODER, SEED_OSS
from .mistral import CWM, MINISTRAL, MINISTRAL3, MISTRAL
from .nemotron import ARCEE, JAIS2, NEMOTRON
from .olmo import OLMO, OLMO2, OLMO3
from .opt import OPT
from .phi import PHI
from .phi3 import PHI3
from .qwen import QWEN2, QWEN3
from .refused import reason_for
from .smollm3 import SMOLLM3
from .source import DenseSource, Weights, source_of
from .stablelm import STABLELM
from .starcoder2 import STARCODER2

__all__ = [
    "FAMILIES",
    "Checkpoint",
    "DenseLayer",
    "DenseSource",
    "Expert",
    "Family",
    "LayerNames",
    "Linear",
    "Mixture",
    "Norm",
    "StockForm",
    "Weights",
    "canonical_fields",
    "checkpoint_of",
    "facts_of",
    "family_of",
    "source_of",
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
        MINISTRAL,
        CWM,
        SEED_OSS,
        EXAONE,
        INTERNLM3,
        IQUEST_CODER,
        GPT2,
        FALCON,
        NEMOTRON,
        ARCEE,
        JAIS2,
        GLM,
        ERNIE,
        HELIUM,
        SMOLLM3,
        COHERE2,
        GRANITE4,
        MINISTRAL3,
        HUNYUAN,
        APERTUS,
        GEMMA2,
        GEMMA3,
        OLMO2,
        OLMO3,
        EXAONE4,
        GLM4,
        GRANITE_SWA,
        MIXTRAL,
        QWEN2_MOE,
        QWEN3_MOE,
        OLMOE,
        PHIMOE,
        GLM4_MOE,
        GPT_OSS,
        DEEPSEEK_V2,
        DEEPSEEK_V3,
        SARVAM_MLA,
        GLM4_MOE_LITE,
        YOUTU,
    )
}

_TOKEN_FIELDS = ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id", "initializer_range")


def family_of(config: PreTrainedConfig) -> Family:
    """The family of a Hugging Face config; `SliceGPTError` says why there is none, and names the supported ones."""
    family = FAMILIES.get(config.model_type)
    if family is None:
        what, reason = f"model_type {config.model_type!r}", reason_for(config)
        if config.model_type == "slicegpt":
            what, reason = "an already sliced model", None
        why = "" if reason is None else f": {reason}"
        raise SliceGPTError(f"{what} is not supported{why}; supported are {', '.join(FAMILIES)}", "model")
    return family


def facts_of(config: PreTrainedConfig) -> dict:
    """The fields of `SlicedConfig` that a Hugging Face config determines.

    Raises:
        SliceGPTError: no family of ours, a variant of one that the canonical network cannot represent, or numbers that
            describe no network; the line names the config's field.
    """
    family = family_of(config)
    check_config(config)
    facts = family.facts(config)
    learned = isinstance(family.layer, LayerNames) and family.layer.activation is not None
    check_facts(config, facts, learned)
    return facts


def checkpoint_of(model: PreTrainedModel | DenseSource) -> Checkpoint:
    """A Hugging Face model's tensors by their canonical names: of a loaded one no copies, of a source read at access.

    Raises:
        SliceGPTError: the model is of no family of ours, or has tensors that its family has no place for.
    """
    if isinstance(model, DenseSource):
        # Its shell knows whether the head is the table: no tensor need be compared.
        return _checked(model.shell, model.tensors, None if model.in_memory else _is_tied(model.shell))
    return _checked(model, model.state_dict(), None)


def _is_tied(shell: PreTrainedModel) -> bool:
    head = shell.get_output_embeddings()
    return head is not None and head.weight is shell.get_input_embeddings().weight


def _checked(model: PreTrainedModel, tensors: Mapping[str, torch.Tensor], tied: bool | None) -> Checkpoint:
    family = family_of(model.config)
    if getattr(model, "_hf_peft_config_loaded", False):
        raise SliceGPTError("an adapter is loaded into it; merge it into the weights first", "model")
    checkpoint = Checkpoint(family, tensors, model.config, tied)
    unread = checkpoint.unread()
    if unread:
        more = f" and {len(unread) - 3} more" if len(unread) > 3 else ""
        raise SliceGPTError(
            f"{type(model).__name__} has weights that {family.architectures[0]} has no place for:"
            f" {', '.join(unread[:3])}{more}",
            "model",
        )
    return checkpoint


def canonical_fields(model: PreTrainedModel | DenseSource) -> dict:
    """The fields of `SlicedConfig` that do not depend on slicing, from a dense Hugging Face model or a source of one.

    Which biases exist is read off its tensors: a norm's shift becomes a bias of the layers that read it. Of a source
    only their shapes are needed, and none is read.
    """
    shell = model.shell if isinstance(model, DenseSource) else model
    config = shell.config
    facts = facts_of(config)
    if isinstance(model, DenseSource) and not model.in_memory:
        shapes = {name: tensor.to("meta") for name, tensor in shell.state_dict().items()}
        checkpoint = _checked(shell, shapes, _is_tied(shell))
    else:
        checkpoint = checkpoint_of(model)
    layer, head, norm = checkpoint.layer(0), checkpoint.head, checkpoint.final_norm
    tied = checkpoint.tied
    fields = {name: getattr(config, name) for name in _TOKEN_FIELDS if hasattr(config, name)}
    return (
        fields
        | facts
        | {
            "tie_word_embeddings": tied,
            "attention_bias": (layer.kv_a or layer.q).bias is not None
            or layer.attention_norm.bias is not None,
            "attention_output_bias": layer.o.bias is not None,
            "qk_norm": layer.q_norm is not None,
            "attention_sinks": layer.sinks is not None,
            **_mlp_fields(checkpoint),
            "lm_head_bias": head.bias is not None or (not tied and norm.bias is not None),
            "final_norm_bias": tied and norm.bias is not None,
            "source_model_type": config.model_type,
            "source_parameters": sum(parameter.numel() for parameter in shell.parameters()),
        }
    )


def _mlp_fields(checkpoint: Checkpoint) -> dict:
    """Which biases there are in MLPs and experts; of each kind of layer the first one tells."""
    layers = map(checkpoint.layer, range(checkpoint.config.num_hidden_layers))
    kinds: dict[bool, DenseLayer] = {}
    for layer in layers:
        kinds.setdefault(layer.mixture is not None, layer)
        if len(kinds) == 2 or checkpoint.names.experts is None:
            break
    fields: dict = {"gated_mlp": True, "mlp_bias": False, "mlp_output_bias": False}
    if (layer := kinds.get(False)) is not None:
        fields = {
            "gated_mlp": layer.gate is not None,
            "mlp_bias": layer.up.bias is not None or layer.mlp_norm.bias is not None,
            "mlp_output_bias": layer.down.bias is not None,
        }
    if (layer := kinds.get(True)) is not None:
        shifted, expert = layer.mlp_norm.bias is not None, layer.mixture.expert(0)
        fields |= {
            "router_bias": layer.mixture.router.bias is not None or shifted,
            "score_correction_bias": layer.mixture.correction is not None,
            "expert_bias": expert.up.bias is not None or shifted,
            "expert_output_bias": expert.down.bias is not None,
        }
    return fields
