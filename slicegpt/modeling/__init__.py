"""The canonical network, its heads and its configuration.

They are imported at first use; `slicegpt.registration` makes them known to transformers' Auto classes.
"""

from typing import TYPE_CHECKING

from slicegpt.lazy import lazy_exports

if TYPE_CHECKING:
    from .configuration import SlicedConfig, factor_rank
    from .configuration_checks import SHORTCUT_KINDS
    from .heads import (
        SlicedForQuestionAnswering,
        SlicedForSequenceClassification,
        SlicedForTokenClassification,
    )
    from .layers import CACHE, CompactShortcut, WeightlessRMSNorm
    from .network import SlicedForCausalLM, SlicedModel

__all__ = [
    "CACHE",
    "SHORTCUT_KINDS",
    "CompactShortcut",
    "SlicedConfig",
    "SlicedForCausalLM",
    "SlicedForQuestionAnswering",
    "SlicedForSequenceClassification",
    "SlicedForTokenClassification",
    "SlicedModel",
    "WeightlessRMSNorm",
    "factor_rank",
]

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "CACHE": "slicegpt.modeling.layers",
        "SHORTCUT_KINDS": "slicegpt.modeling.configuration_checks",
        "CompactShortcut": "slicegpt.modeling.layers",
        "SlicedConfig": "slicegpt.modeling.configuration",
        "SlicedForCausalLM": "slicegpt.modeling.network",
        "SlicedForQuestionAnswering": "slicegpt.modeling.heads",
        "SlicedForSequenceClassification": "slicegpt.modeling.heads",
        "SlicedForTokenClassification": "slicegpt.modeling.heads",
        "SlicedModel": "slicegpt.modeling.network",
        "WeightlessRMSNorm": "slicegpt.modeling.layers",
        "factor_rank": "slicegpt.modeling.configuration",
    },
)
