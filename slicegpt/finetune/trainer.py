"""transformers' Trainer with a clock, a guard against non-finite numbers, and an optional teacher."""

from __future__ import annotations

import contextlib
import math
import time

import torch
from torch.nn import functional
from transformers import PreTrainedModel, Trainer, TrainerCallback

from slicegpt.errors import SliceGPTError
from slicegpt.finetune.options import Schedule

# Keys of what the Trainer logs; the log is part of every checkpoint.
ELAPSED = "elapsed"


def distillation_loss(
    student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor, weight: float
) -> torch.Tensor:
    """Mean over tokens of `weight * KL(teacher || student) + (1 - weight) * CE(student)`, in nats.

    Args:
        student, teacher: logits [b, s, V]; the softmaxes are float32.
        labels: int64 [b, s], the tokens that came next.
    """
    student = student.flatten(0, 1).float().log_softmax(-1)
    teacher = teacher.flatten(0, 1).float().log_softmax(-1)
    divergence = functional.kl_div(student, teacher, log_target=True, reduction="batchmean")
    return weight * divergence + (1 - weight) * functional.nll_loss(student, labels.flatten())


class Clock(TrainerCallback):
    """How far the run is, by its steps and by its time limit, whichever is further.

    A run that is given minutes rather than steps then still ends with a small learning rate. Time is counted over
    all parts of a run that was interrupted. All processes go by the first one's time, since their weights stay
    equal only while their learning rates do.

    Args:
        seconds: the limit; None is none.
    """

    def __init__(self, seconds: float | None = None) -> None:
        self.seconds = seconds
        self.progress = 0.0
        self.evaluating = 0.0  # seconds that an evaluation takes: time is kept for the last one
        self._started = time.monotonic()
        self._before = 0.0

    def elapsed(self) -> float:
        """Seconds of training and evaluation so far, those before an interruption included."""
        return self._before + time.monotonic() - self._started

    def on_train_begin(self, args, state, control, **_) -> None:
        self._before = max((entry.get(ELAPSED, 0.0) for entry in state.log_history), default=0.0)
        self._started = time.monotonic()

    def on_step_begin(self, args, state, control, **_) -> None:
        self.progress = max((state.global_step + 1) / state.max_steps, self._share_of_time())

    def on_step_end(self, args, state, control, **_) -> None:
        # The last step is evaluated and saved wherever it falls, or its work could not be chosen as the best.
        if state.global_step >= state.max_steps or self._share_of_time() >= 1:
            control.should_training_stop = control.should_evaluate = control.should_save = True

    def _share_of_time(self) -> float:
        if self.seconds is None:
            return 0.0
        share = self.elapsed() / max(self.seconds - self.evaluating, 1e-9)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            shared = [share]
            torch.distributed.broadcast_object_list(shared, src=0)
            share = shared[0]
        return share


class _LearningRate(TrainerCallback):
    """Sets the rate of the step that begins; the Trainer's own scheduler would be a step behind the clock."""

    def __init__(self, clock: Clock, schedule: Schedule) -> None:
        self.clock, self.schedule = clock, schedule

    def on_step_begin(self, args, state, control, optimizer=None, **_) -> None:
        for group in optimizer.param_groups:
            group["lr"] = group["scale"] * self.schedule.rate(self.clock.progress)


class FiniteGuard(TrainerCallback):
    """Stops before an optimizer step that would spoil the weights.

    Gradients are looked at and not losses: they are the same in all processes by then, so all stop together.
    """

    def on_pre_optimizer_step(self, args, state, control, model=None, **_) -> None:
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        if not torch.nn.utils.get_total_norm(gradients).isfinite():
            raise NonFinite(f"the gradient of step {state.global_step + 1} is not finite")

    def on_evaluate(self, args, state, control, metrics=None, **_) -> None:
        loss = metrics.get("eval_loss", 0.0)
        if not math.isfinite(loss):
            raise NonFinite(f"the held-out loss after step {state.global_step} is {loss}")


class NonFinite(SliceGPTError):
    """The run met a NaN or an infinity; the caller adds where the last good state is."""


class RecoveryTrainer(Trainer):
    """The Trainer for a sliced model with adapters.

    Args:
        clock: where in the run we are; also a callback.
        schedule: the learning rate as a function of that. The optimizer's own must be 1, as the one that stands
            in a checkpoint: a run that is resumed with another learning rate gets it at once.
        shortcut_scale: the learning rate of trained shortcuts over that of the adapters.
        autocast: dtype of the matrix products, None for that of the weights.
        teacher: a dense model whose distribution of the next token is learned rather than the token itself.
        teacher_weight: the share of that loss, `KL(teacher || student)`; the rest is cross entropy.
    """

    def __init__(
        self,
        *arguments,
        clock: Clock,
        schedule: Schedule,
        shortcut_scale: float = 1.0,
        autocast: torch.dtype | None = None,
        teacher: PreTrainedModel | None = None,
        teacher_weight: float = 0.5,
        **keywords,
    ) -> None:
        super().__init__(*arguments, **keywords)
        self.clock, self.schedule, self.autocast = clock, schedule, autocast
        self.shortcut_scale = shortcut_scale
        for callback in (clock, _LearningRate(clock, schedule), FiniteGuard()):
            self.add_callback(callback)
        self.teacher, self.teacher_weight = teacher, teacher_weight
        if teacher is not None:
            self.teacher = teacher.to(self.args.device).eval().requires_grad_(False)
            # Our loss is the mean of a batch: the Trainer is to divide it by the steps of an accumulation.
            self.model_accepts_loss_kwargs = False

    def create_optimizer(self, model=None):
        """AdamW. Shortcuts have a rate of their own, and no decay: it would pull every S towards the identity."""
        if self.optimizer is None:
            trained = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
            groups = [
                {
                    "params": [p for name, p in trained if "modules_to_save" not in name],
                    "weight_decay": self.args.weight_decay,
                    "scale": 1.0,
                },
                {
                    "params": [p for name, p in trained if "modules_to_save" in name],
                    "weight_decay": 0.0,
                    "scale": self.shortcut_scale,
                },
            ]
            betas = (self.args.adam_beta1, self.args.adam_beta2)
            filled = [group for group in groups if group["params"]]
            self.optimizer = torch.optim.AdamW(filled, lr=self.args.learning_rate, betas=betas)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        if self.lr_scheduler is None:
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer or self.optimizer, lambda _: self.schedule.rate(self.clock.progress)
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        with self._arithmetic():
            if self.teacher is None or not model.training:
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            outputs = model(input_ids=inputs["input_ids"], use_cache=False)
            with torch.no_grad():
                taught = self.teacher(input_ids=inputs["input_ids"], use_cache=False).logits
        loss = distillation_loss(
            outputs.logits[:, :-1], taught[:, :-1], inputs["labels"][:, 1:], self.teacher_weight
        )
        return (loss, outputs) if return_outputs else loss

    def _arithmetic(self) -> contextlib.AbstractContextManager:
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self.args.device.type, self.autocast)

    def evaluate(self, *arguments, **keywords) -> dict[str, float]:
        start = time.monotonic()
        metrics = super().evaluate(*arguments, **keywords)
        self.clock.evaluating = time.monotonic() - start
        return metrics

    def log(self, logs: dict[str, float], *arguments, **keywords) -> None:
        super().log(logs | {ELAPSED: round(self.clock.elapsed(), 3)}, *arguments, **keywords)
