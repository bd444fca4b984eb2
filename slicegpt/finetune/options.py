"""How a model is fine-tuned: the settings of a run, checked without torch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

from slicegpt.errors import SliceGPTError

TARGETS = {
    "inputs": ("q_proj", "k_proj", "v_proj", "q_a_proj", "kv_a_proj_with_mqa", "gate_proj", "up_proj"),
    "qv": ("q_proj", "v_proj", "q_b_proj", "kv_b_proj"),
    "all-linear": None,
}
"""Named choices of linear layers; "inputs" (what reads the residual stream) is the paper's for SliceGPT."""

PRECISIONS = ("auto", "fp32", "bf16")
SCHEDULES = ("linear", "cosine", "constant")


@dataclass(frozen=True)
class AdapterOptions:
    """What is trained. Defaults: SliceGPT section 4, "Recovery fine-tuning".

    Attributes:
        targets: a key of `TARGETS`, or names of linear layers, such as ("q_proj", "o_proj").
        rank: r, columns of B and rows of A in `W + alpha / r * B A`.
        alpha: the adapters' scale, before the division by r.
        dropout: probability of dropping an entry of an adapter's input.
        train_shortcuts: train the shortcuts too: the compact factors F, or the dense matrices.
    """

    targets: str | Sequence[str] = "inputs"
    rank: int = 32
    alpha: float = 10
    dropout: float = 0.05
    train_shortcuts: bool = False

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise SliceGPTError(f"must be at least 1, got {self.rank}", "rank")
        if not self.alpha > 0:
            raise SliceGPTError(f"must be above 0, got {self.alpha}", "alpha")
        if not 0 <= self.dropout < 1:
            raise SliceGPTError(f"must lie in [0, 1), got {self.dropout}", "dropout")


@dataclass(frozen=True)
class Schedule:
    """The learning rate over a run: a rise over its first `warmup` (a fraction), then a fall to 0, or none.

    Attributes:
        peak: the highest learning rate.
        kind: `linear`, `cosine` (half a period) or `constant`.
    """

    peak: float = 2e-4
    warmup: float = 0.05
    kind: str = "linear"

    def __post_init__(self) -> None:
        if not 0 < self.peak < math.inf:
            raise SliceGPTError(f"must be above 0, got {self.peak}", "learning_rate")
        if not 0 <= self.warmup < 1:
            raise SliceGPTError(f"must lie in [0, 1), got {self.warmup}", "warmup")
        if self.kind not in SCHEDULES:
            raise SliceGPTError(f"must be one of {', '.join(SCHEDULES)}, got {self.kind!r}", "schedule")

    def rate(self, progress: float) -> float:
        """The learning rate at `progress` in [0, 1] through the run."""
        if progress < self.warmup:
            return self.peak * progress / self.warmup
        if self.kind == "constant":
            return self.peak
        left = 1 - min(1.0, (progress - self.warmup) / (1 - self.warmup))
        return self.peak * (left if self.kind == "linear" else 0.5 * (1 - math.cos(math.pi * left)))


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
