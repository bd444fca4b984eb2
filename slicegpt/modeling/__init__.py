"""The canonical network and its configuration, registered with transformers' Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .configuration import SHORTCUT_KINDS, SlicedConfig, factor_rank
from .layers import CACHE, CompactShortcut, WeightlessRMSNorm
from .network import SlicedForCausalLM, SlicedModel

__all__ = [
    "CACHE",
    "SHORTCUT_KINDS",
    "CompactShortcut",
    "SlicedConfig",
    "SlicedForCausalLM",
    "SlicedModel",
    "WeightlessRMSNorm",
    "factor_rank",
]

AutoConfig.register(SlicedConfig.model_type, SlicedConfig)
AutoModel.register(SlicedConfig, SlicedModel)
AutoModelForCausalLM.register(SlicedConfig, SlicedForCausalLM)
