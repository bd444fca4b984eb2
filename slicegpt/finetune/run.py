"""The driver of recovery fine-tuning: load, attach, train, merge, save."""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback

from slicegpt.calibration import Source, check_fits
from slicegpt.checkpoint.folders import check_output
from slicegpt.checkpoint.loading import load_dense
from slicegpt.checkpoint.saving import read_record, save_sliced
from slicegpt.conversion.quantization import is_quantized
from slicegpt.errors import SliceGPTError
from slicegpt.finetune import checkpoints
from slicegpt.finetune.adapters import attach, merge
from slicegpt.finetune.data import TrainingText, training_text
from slicegpt.finetune.options import AdapterOptions, TrainingOptions
from slicegpt.finetune.saving import FinetuneResult, run_record, save_adapters
from slicegpt.finetune.trainer import ELAPSED, Clock, NonFinite, RecoveryTrainer
from slicegpt.hardware.devices import has_fast_bfloat16
from slicegpt.modeling import SlicedConfig
from slicegpt.progress import Progress


def finetune(
    folder: str | Path,
    documents: Sequence[str] | Sequence[Source],
    output: str | Path,
    adapters: AdapterOptions | None = None,
    options: TrainingOptions | None = None,
    *,
    eval_documents: Sequence[str] | None = None,
    teacher: str | None = None,
    source: str = "text",
    merged: bool = True,
    self_contained: bool = True,
    resume: bool = False,
    overwrite: bool = False,
    device: torch.device | None = None,
    progress: Progress | None = None,
) -> FinetuneResult | None:
    """Recover quality lost by slicing: train low-rank adapters on text, and merge them into the weights.

    Checkpoints lie in `<output>.checkpoints` until the run is done. Under torchrun every process calls this with
    the same arguments and trains on its share of every batch.

    Args:
        folder: written by `slicegpt slice`.
        documents: the text, or weighted sources of it; some windows are held out, unless there are
            `eval_documents`.
        output: the folder to write; it appears only when it is whole.
        teacher: a dense model (see `load_dense`) to learn the next token's distribution from.
        source: what the record calls the text.
        merged: write a sliced model of the same size; otherwise a PEFT folder that loads onto `folder`.
        self_contained: of a merged model: put the modelling code beside the weights, for machines without slicegpt.
        resume: go on from the last checkpoint where there is one.
        overwrite: replace an existing output, and start anew over another run's checkpoints.
        device: None takes the GPU where there is one.

    Returns:
        What was done; None in all processes but the first.

    Raises:
        SliceGPTError: bad input; a loss or gradient that is not finite (the last checkpoint is kept).
    """
    adapters, options = adapters or AdapterOptions(), options or TrainingOptions()
    path = check_output(output, overwrite, folder)
    work = checkpoints.working_folder(path)
    record = _sliced_record(folder)
    model, tokenizer = load_dense(str(folder))
    _check_fits(model, options)
    text = training_text(
        documents,
        tokenizer,
        options.seqlen,
        options.nsamples,
        options.eval_samples,
        eval_documents,
        options.seed,
    )
    for windows in (text.train.ids, text.held_out.ids):
        check_fits(model, windows)
    arguments = _training_arguments(work, options, device)
    settings = _settings(folder, model, text, adapters, options, teacher, arguments.world_size)
    checkpoint = _prepare(work, settings, resume, overwrite)

    torch.manual_seed(options.seed)
    precision = _precision(options, arguments.device)
    adapted = attach(model, adapters)
    _freeze_in(adapted, precision)
    model.config.use_cache = False
    if options.gradient_checkpointing:
        # transformers 5.2x renames it.
        enable = (
            getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        )
        enable({"use_reentrant": False})
    trainer = RecoveryTrainer(
        model=adapted,
        args=arguments,
        train_dataset=text.train,
        eval_dataset=text.held_out,
        callbacks=[EarlyStoppingCallback(options.patience), _Report(progress or Progress(quiet=True))],
        clock=Clock(None if options.max_minutes is None else 60 * options.max_minutes),
        schedule=options.schedule,
        shortcut_scale=options.shortcut_scale,
        autocast=None if precision == torch.float32 else precision,
        teacher=_load_teacher(teacher, model, precision),
        teacher_weight=options.teacher_weight,
    )
    trainer.remove_callback(PrinterCallback)
    # The first evaluation tells what there is to recover; a run that goes on has done it already.
    arguments.eval_on_start = checkpoint is None
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except NonFinite as error:
        raise _with_advice(error, work) from error
    PartialState().wait_for_everyone()
    if not PartialState().is_main_process:
        return None
    result = _result(path, trainer, adapted, options)
    entry = run_record(result, source, adapters, options, teacher, text)
    if merged:
        sliced, _ = load_dense(str(folder))
        record |= {"finetuning": entry}
        save_sliced(merge(sliced, adapted), tokenizer, record, path, overwrite, self_contained=self_contained)
    else:
        save_adapters(adapted, tokenizer, entry, folder, path)
    shutil.rmtree(work)
    return result


def _sliced_record(folder: str | Path) -> dict:
    record = read_record(folder) if Path(folder).is_dir() else None
    if record is None:
        raise SliceGPTError(
            f"{folder} is not a folder that `slicegpt slice` wrote (no slicing.json)", "folder"
        )
    return record


def _check_fits(model: PreTrainedModel, options: TrainingOptions) -> None:
    if not isinstance(model.config, SlicedConfig):
        raise SliceGPTError(f"must be a sliced model, got {type(model).__name__}", "folder")
    if is_quantized(model.config):
        raise SliceGPTError("its weights are quantised; fine-tune the model before that", "folder")
    positions = model.config.max_position_embeddings
    if options.seqlen > positions:
        raise SliceGPTError(f"{options.seqlen} is beyond the model's {positions} positions", "seqlen")


def _training_arguments(
    work: Path, options: TrainingOptions, device: torch.device | None
) -> TrainingArguments:
    """The Trainer's arguments; a device with a number is where one process trains (under torchrun each has its own)."""
    if device is None or device.index is None or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return _arguments(work, options, device)
    # The Trainer has no argument for it: accelerate reads the environment when it is first asked, which
    # `arguments.device` does; transformers then takes the first GPU whatever accelerate was told.
    variable = "ACCELERATE_TORCH_DEVICE"
    before = os.environ.get(variable)
    os.environ[variable] = str(device)
    try:
        arguments = _arguments(work, options, device)
        told = arguments.device
    finally:
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before
    if told != device and device.type == "cuda":
        vars(arguments)["_setup_devices"] = device
        torch.cuda.set_device(device)
    return arguments


def _arguments(work: Path, options: TrainingOptions, device: torch.device | None) -> TrainingArguments:
    on_cpu = not torch.cuda.is_available() if device is None else device.type == "cpu"
    arguments = TrainingArguments(
        output_dir=str(work),
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.batch_size,
        gradient_accumulation_steps=options.accumulation,
        num_train_epochs=options.epochs,
        learning_rate=1.0,  # see RecoveryTrainer
        weight_decay=options.weight_decay,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        eval_strategy="steps",
        eval_steps=options.eval_every,
        save_strategy="steps",
        save_steps=options.eval_every,
        save_total_limit=2,  # the best and the last
        logging_steps=options.eval_every,
        logging_nan_inf_filter=False,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        restore_callback_states_from_checkpoint=True,
        prediction_loss_only=True,
        remove_unused_columns=False,
        dataloader_pin_memory=not on_cpu,
        seed=options.seed,
        data_seed=options.seed,
        use_cpu=on_cpu,
        # accelerate takes a named backend for a group of processes, also where there is but one.
        ddp_backend="gloo" if on_cpu and int(os.environ.get("WORLD_SIZE", "1")) > 1 else None,
        ddp_find_unused_parameters=False,
        report_to="none",
        disable_tqdm=True,
        log_level="error",
    )
    # One process drives one device: DataParallel over all that are visible is not what anybody asked for.
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


def _settings(
    folder: str | Path,
    model: PreTrainedModel,
    text: TrainingText,
    adapters: AdapterOptions,
    options: TrainingOptions,
    teacher: str | None,
    processes: int,
) -> dict:
    """What must be the same when a run goes on; the learning rate, the time limit and the patience may change."""
    free = ("schedule", "max_minutes", "patience", "eval_every", "gradient_checkpointing")
    kept = {name: value for name, value in dataclasses.asdict(options).items() if name not in free}
    return {
        "model": str(Path(folder).resolve()),
        "widths": model.config.boundary_widths,
        "teacher": teacher,
        "processes": processes,
        **{f"adapters.{name}": value for name, value in dataclasses.asdict(adapters).items()},
        **kept,
        "text": text.sha256(),
    }


def _prepare(work: Path, settings: dict, resume: bool, overwrite: bool) -> Path | None:
    """The checkpoint to go on from, or None after the working folder was made ready for a new run."""
    checkpoint = checkpoints.last_checkpoint(work)
    if checkpoint is not None and resume:
        checkpoints.check_settings(work, settings)
    elif checkpoint is not None and not overwrite:
        raise SliceGPTError(
            f"{work} holds an unfinished run; resume it, or overwrite it to start anew",
            "output",
        )
    else:
        checkpoint = None
    PartialState().wait_for_everyone()  # all have looked before the first one changes anything
    if PartialState().is_main_process:
        if checkpoint is None:
            checkpoints.start_anew(work, settings)
        else:
            checkpoints.drop_broken(work)
    PartialState().wait_for_everyone()
    return checkpoint


def _precision(options: TrainingOptions, device: torch.device) -> torch.dtype:
    if options.precision == "auto":
        fast = device.type == "cuda" and has_fast_bfloat16(device)
        return torch.bfloat16 if fast else torch.float32
    return torch.bfloat16 if options.precision == "bf16" else torch.float32


def _freeze_in(adapted: PreTrainedModel, dtype: torch.dtype) -> None:
    """Bring the frozen weights into the dtype of the arithmetic; those that are trained stay float32."""
    for parameter in adapted.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


def _load_teacher(name: str | None, model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel | None:
    if name is None:
        return None
    teacher, _ = load_dense(name, dtype)
    if teacher.config.vocab_size != model.config.vocab_size:
        raise SliceGPTError(
            f"{name} has {teacher.config.vocab_size} tokens in its vocabulary, the sliced model"
            f" {model.config.vocab_size}",
            "teacher",
        )
    return teacher


def _with_advice(error: NonFinite, work: Path) -> SliceGPTError:
    checkpoint = checkpoints.last_checkpoint(work)
    state = (
        "no checkpoint was saved before it" if checkpoint is None else f"the last good state is {checkpoint}"
    )
    then = "begin again" if checkpoint is None else "resume"
    return SliceGPTError(f"{error}; {state}; {then} with a lower learning rate")


class _Report(TrainerCallback):
    """One line per evaluation."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress

    def on_evaluate(self, args, state, control, metrics=None, **_) -> None:
        if self.progress.quiet or not state.is_world_process_zero:
            return
        loss = metrics["eval_loss"]
        trained = next((entry["loss"] for entry in reversed(state.log_history) if "loss" in entry), None)
        training = "" if trained is None else f", training loss {trained:.4f}"
        minutes = state.log_history[-1].get(ELAPSED, 0.0) / 60
        self.progress.say(
            f"step {state.global_step} of {state.max_steps}: held-out loss {loss:.4f}"
            f" (perplexity {math.exp(min(loss, 700)):.4g}){training}, {minutes:.1f} min"
        )


def _result(
    path: Path, trainer: RecoveryTrainer, adapted: PreTrainedModel, options: TrainingOptions
) -> FinetuneResult:
    state = trainer.state
    windows_per_step = options.accumulation * options.batch_size * trainer.args.world_size
    windows = min(state.global_step * windows_per_step, options.epochs * len(trainer.train_dataset))
    losses = [entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry]
    return FinetuneResult(
        output=path,
        loss_before=losses[0],
        loss_after=state.best_metric,
        best_step=state.best_global_step,
        steps=state.global_step,
        tokens=windows * options.seqlen,
        trained_parameters=sum(p.numel() for p in adapted.parameters() if p.requires_grad),
        seconds=max(entry[ELAPSED] for entry in state.log_history if ELAPSED in entry),
    )
