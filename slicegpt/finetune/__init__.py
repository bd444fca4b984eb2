"""Recovery fine-tuning: low-rank adapters trained on a sliced model and merged into its weights (extra: finetune)."""

import importlib.util

from slicegpt.errors import SliceGPTError

for _package in ("peft", "accelerate"):
    if importlib.util.find_spec(_package) is None:
        raise SliceGPTError(f'finetune: needs {_package}: pip install "slicegpt[finetune]"')

from .adapters import TARGETS, AdapterOptions, attach, merge  # noqa: E402
from .data import TrainingText, training_text  # noqa: E402
from .options import TrainingOptions  # noqa: E402
from .run import finetune  # noqa: E402
from .saving import FinetuneResult  # noqa: E402
from .trainer import Schedule  # noqa: E402

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
