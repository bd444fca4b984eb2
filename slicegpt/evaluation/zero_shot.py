"""Zero-shot accuracy on the tasks of the LM Evaluation Harness (lm-eval; SliceGPT section 4.1, tables 2 and 8)."""

from __future__ import annotations

import contextlib
import difflib
import importlib.metadata
import importlib.util
import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slicegpt.errors import SliceGPTError, first_line
from slicegpt.modeling.losses import BatchSize, check_batch_size

PAPER_TASKS = ("piqa", "winogrande", "hellaswag", "arc_easy", "arc_challenge")
"""The tasks of the paper's tables, in their order; `--tasks paper` names them all."""

_OLDEST = (0, 4, 13)

# Questions at a time that keep two to sixteen cores busy.
_CPU_BATCH = 16


@dataclass(frozen=True)
class TaskScore:
    """What one task measured.

    Attributes:
        task: its name in lm-eval.
        questions: questions asked.
        accuracy: fraction of questions whose right answer is the likeliest one (lm-eval's `acc`).
        accuracy_norm: the same with log-likelihoods divided by the answer's length in bytes (`acc_norm`);
            None where the task does not define it.
        metrics: every number that lm-eval gives, standard errors included, by its name.
    """

    task: str
    questions: int
    accuracy: float | None
    accuracy_norm: float | None
    metrics: dict[str, float]

    @property
    def reported(self) -> float | None:
        """What the paper's tables hold: `acc_norm` where there is one, else `acc`; None where there is neither."""
        return self.accuracy if self.accuracy_norm is None else self.accuracy_norm


@dataclass(frozen=True)
class ZeroShotResult:
    """Scores of one model on all tasks, in the order they were asked for.

    Attributes:
        log_likelihoods: for every task the sums of log-probabilities, in nats, of every answer to every
            question; empty for tasks that are not multiple choice.
        seconds: wall time, building the requests included.
    """

    scores: tuple[TaskScore, ...]
    log_likelihoods: dict[str, list[list[float]]]
    seconds: float

    @property
    def mean(self) -> float | None:
        """Unweighted mean over tasks of what the paper reports; None where no task has an accuracy."""
        values = [score.reported for score in self.scores if score.reported is not None]
        return math.fsum(values) / len(values) if values else None


class ZeroShotTasks:
    """Tasks whose definitions and data are there, ready to be asked of any number of models.

    Args:
        names: lm-eval's names of tasks, groups and tags, or `paper`.
        include_path: a folder of task definitions (YAML) beside lm-eval's own.
        num_fewshot: solved questions before each one; None is each task's own default, zero for the paper's.
        limit: only the first so many questions of each task: for trying out.

    Raises:
        SliceGPTError: lm-eval is missing or old, a name is unknown, or a task's data cannot be had.
    """

    def __init__(
        self,
        names: Sequence[str],
        include_path: str | Path | None = None,
        num_fewshot: int | None = None,
        limit: int | None = None,
    ) -> None:
        for argument, value, least in (("num_fewshot", num_fewshot, 0), ("limit", limit, 1)):
            if value is not None and value < least:
                raise SliceGPTError(f"must be at least {least}, got {value}", argument)
        if include_path is not None and not Path(include_path).is_dir():
            raise SliceGPTError(f"{include_path} is not a folder", "include_path")
        _check_lm_eval()
        self.num_fewshot, self.limit = num_fewshot, limit
        with _quiet_lm_eval():
            self.manager = _task_manager(_expanded(names), include_path)
            self.names = self._known(names)
            for name in self.names:
                self._load(name)

    def _known(self, names: Sequence[str]) -> list[str]:
        """The names with `paper` expanded and duplicates dropped, all of them known to lm-eval."""
        expanded = _expanded(names)
        if not expanded:
            raise SliceGPTError("at least one name is needed", "tasks")
        for name in expanded:
            if name not in self.manager.all_tasks:
                near = difflib.get_close_matches(name, self.manager.all_tasks, n=3)
                hint = f"; similar names: {', '.join(near)}" if near else ""
                raise SliceGPTError(f"{name!r} is no task of lm-eval{hint}", "tasks")
        return list(dict.fromkeys(expanded))

    def _load(self, name: str) -> None:
        """Bring a task's data here: what fails does so before a model is loaded."""
        try:
            self.manager.load([name])
        except Exception as error:  # the network stack, datasets and YAML each raise their own
            raise SliceGPTError(
                f"the data of {name!r} cannot be had: {first_line(error)}."
                " The published tasks come from the Hugging Face hub; tasks on local files"
                " (include_path) need no network",
                "tasks",
            ) from error

    def score(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: BatchSize = 1
    ) -> ZeroShotResult:
        """Ask a causal language model all tasks, on the device where it is.

        Args:
            batch_size: questions at a time; "auto": on a GPU what lm-eval finds to fit, on a CPU `_CPU_BATCH`, since
                lm-eval's search begins with 64 of the longest questions there are.

        Raises:
            SliceGPTError: the batch size is below 1, or a log-likelihood is not finite.
        """
        check_batch_size(batch_size)
        if batch_size == "auto" and model.device.type == "cpu":
            batch_size = _CPU_BATCH
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        start, training = time.perf_counter(), model.training
        with _quiet_lm_eval():
            harness = HFLM(
                pretrained=model.eval(), tokenizer=tokenizer, backend="causal", batch_size=batch_size
            )
            try:
                outcome = simple_evaluate(
                    harness,
                    tasks=list(self.names),
                    num_fewshot=self.num_fewshot,
                    limit=self.limit,
                    task_manager=self.manager,
                )
            finally:
                model.train(training)
        likelihoods = {task: _log_likelihoods(task, asked) for task, asked in outcome["samples"].items()}
        scores = tuple(_score(outcome, task) for name in self.names for task in _rows(outcome, name))
        return ZeroShotResult(scores, likelihoods, time.perf_counter() - start)


def _expanded(names: Sequence[str]) -> list[str]:
    """The names, `paper` replaced by the tasks that it stands for."""
    return [each for name in names for each in (PAPER_TASKS if name == "paper" else (name,))]


def _task_manager(names: Sequence[str], include_path: str | Path | None) -> Any:
    """lm-eval's index of task definitions; its own thousands take seconds to read, so only where they are needed."""
    from lm_eval.tasks import TaskManager

    if include_path is not None:
        manager = TaskManager(include_path=str(include_path), include_defaults=False)
        if names and set(names) <= set(manager.all_tasks):
            return manager
    return TaskManager(include_path=None if include_path is None else str(include_path))


def _check_lm_eval() -> None:
    if importlib.util.find_spec("lm_eval") is None:
        raise SliceGPTError('need lm-eval: pip install "slicegpt[eval]"', "tasks")
    version = importlib.metadata.version("lm_eval")
    numbers = tuple(int(part) for part in version.split(".")[:3] if part.isdecimal())
    if numbers < _OLDEST:
        wanted = ".".join(map(str, _OLDEST))
        raise SliceGPTError(
            f'lm-eval must be {wanted} or later, got {version}: pip install "slicegpt[eval]"', "tasks"
        )


@contextlib.contextmanager
def _quiet_lm_eval() -> Iterator[None]:
    """Without lm-eval's remarks on how it is called, and the hub's on every retry: our error says what failed."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _rows(outcome: dict[str, Any], name: str) -> list[str]:
    """The entry of a task or of a group that lm-eval aggregates; else its tasks (tags, plain groups)."""
    results = outcome["results"]
    if any(key.startswith("acc") for key in results.get(name, ())):
        return [name]
    children = outcome.get("group_subtasks", {}).get(name)
    if children:
        return [row for child in children for row in _rows(outcome, child)]
    return [name] if name in results else list(results)


def _score(outcome: dict[str, Any], task: str) -> TaskScore:
    # Keys are "metric,filter"; multiple choice has the filter "none".
    entry = outcome["results"][task]
    metrics = {key.removesuffix(",none"): value for key, value in entry.items() if _is_number(value)}
    counts = outcome.get("n-samples", {})
    below = [task, *outcome.get("group_subtasks", {}).get(task, ())]
    questions = sum(counts[name]["effective"] for name in below if name in counts)
    metrics.pop("sample_len", None)
    return TaskScore(task, questions, metrics.get("acc"), metrics.get("acc_norm"), metrics)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _log_likelihoods(task: str, asked: list[dict[str, Any]]) -> list[list[float]]:
    """Log-likelihoods of the answers, question by question, in the order of the data."""
    rows = []
    for sample in sorted(asked, key=lambda sample: sample["doc_id"]):
        answers = [response[0] for response in sample["resps"]]
        if not all(isinstance(answer, (tuple, list)) for answer in answers):
            return []  # generated text
        rows.append([float(answer[0]) for answer in answers])
        if not all(map(math.isfinite, rows[-1])):
            raise SliceGPTError(
                f"a log-likelihood of question {sample['doc_id']} of {task} is not finite", "model"
            )
    return rows
