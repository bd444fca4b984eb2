"""How a model is fine-tuned: the settings of a run."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from slicegpt.errors import SliceGPTError
from slicegpt.finetune.trainer import Schedule

PRECISIONS = ("auto", "fp32", "bf16")


@dataclass(frozen=True)
class TrainingOptions:
    """How it is trained. Sequence length as in SliceGPT section 4; the rest as its published code has it.

    Attributes:
        seqlen: tokens in a window.
        nsamples: windows to train on; None takes all of the text.
        batch_size: windows in a forward pass of one process.
        accumulation: forward passes per optimizer step.
        epochs: passes over the windows.
        max_minutes: end after so many minutes of training and evaluation; the learning rate falls accordingly.
        schedule: the learning rate.
        shortcut_scale: the learning rate of trained shortcuts over that of the adapters. It is small because a
            step changes an entry of F by the learning rate itself, and one of W by far less (through B A).
        weight_decay: AdamW's, of the adapters.
        eval_samples: windows held out to evaluate on.
        eval_every: optimizer steps between evaluations, after each of which a checkpoint is saved.
        patience: stop after so many evaluations in a row without a new best.
        precision: `bf16` holds the frozen weights in bfloat16 and multiplies in it, `fp32` does all in float32;
            `auto` is bf16 on GPUs that have it.
        gradient_checkpointing: keep only the layers' inputs and compute the rest twice: less memory, more time.
        teacher_weight: the share of the teacher's distribution in the loss, where there is a teacher.
        seed: of the windows, their order, the adapters' first values and dropout.
    """

    seqlen: int = 1024
    nsamples: int | None = None
    batch_size: int = 1
    accumulation: int = 4
    epochs: int = 1
    max_minutes: float | None = None
    schedule: Schedule = dataclasses.field(default_factory=Schedule)
    shortcut_scale: float = 0.03
    weight_decay: float = 0.01
    eval_samples: int = 32
    eval_every: int = 16
    patience: int = 5
    precision: str = "auto"
    gradient_checkpointing: bool = False
    teacher_weight: float = 0.5
    seed: int = 42

    def __post_init__(self) -> None:
        for name in ("batch_size", "accumulation", "epochs", "eval_every", "patience"):
            if getattr(self, name) < 1:
                raise SliceGPTError(f"must be at least 1, got {getattr(self, name)}", name)
        if self.max_minutes is not None and not 0 < self.max_minutes < math.inf:
            raise SliceGPTError(f"must be above 0, got {self.max_minutes}", "max_minutes")
        for name in ("weight_decay", "shortcut_scale"):
            if not 0 <= getattr(self, name) < math.inf:
                raise SliceGPTError(f"must be at least 0, got {getattr(self, name)}", name)
        if not 0 <= self.teacher_weight <= 1:
            raise SliceGPTError(f"must lie in [0, 1], got {self.teacher_weight}", "teacher_weight")
        if self.precision not in PRECISIONS:
            raise SliceGPTError(
                f"must be one of {', '.join(PRECISIONS)}, got {self.precision!r}", "precision"
            )
