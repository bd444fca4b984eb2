"""Recovery fine-tuning: low-rank adapters trained on a sliced model and merged into its weights (extra: finetune)."""

import importlib.util
from typing import TYPE_CHECKING

from slicegpt.errors import SliceGPTError
from slicegpt.lazy import lazy_exports

for _package in ("peft", "accelerate"):
    if importlib.util.find_spec(_package) is None:
        raise SliceGPTError(f'fine-tuning needs {_package}: pip install "slicegpt[finetune]"')

if TYPE_CHECKING:
    from .adapters import attach, merge
    from .data import TrainingText, training_text
    from .options import TARGETS, AdapterOptions, Schedule, TrainingOptions
    from .run import finetune
    from .saving import FinetuneResult

__all__ = [
    "TARGETS",
    "AdapterOptions",
    "FinetuneResult",
    "Schedule",
    "TrainingOptions",
    "TrainingText",
    "attach",
    "finetune",
    "merge",
    "training_text",
]

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "AdapterOptions": "slicegpt.finetune.options",
        "FinetuneResult": "slicegpt.finetune.saving",
        "Schedule": "slicegpt.finetune.options",
        "TARGETS": "slicegpt.finetune.options",
        "TrainingOptions": "slicegpt.finetune.options",
        "TrainingText": "slicegpt.finetune.data",
        "attach": "slicegpt.finetune.adapters",
        "finetune": "slicegpt.finetune.run",
        "merge": "slicegpt.finetune.adapters",
        "training_text": "slicegpt.finetune.data",
    },
)
