"""What was measured of a model, and tables of one or several of them side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from slicegpt.evaluation.perplexity import PerplexityResult
from slicegpt.evaluation.zero_shot import ZeroShotResult
from slicegpt.table import format_table


@dataclass(frozen=True)
class Evaluation:
    """What `slicegpt.evaluate` measured of one model; it prints as a table.

    Attributes:
        model: its name.
        parameters: stored numbers, shortcuts and head included; a tied table counts once.
        dtype: of the weights.
        perplexity: on a text; None where none was given.
        zero_shot: accuracy on tasks; None where none were given.
    """

    model: str
    parameters: int
    dtype: str
    perplexity: PerplexityResult | None = None
    zero_shot: ZeroShotResult | None = None

    @property
    def record(self) -> dict[str, Any]:
        """The figures as plain numbers, as `slicegpt eval --json` writes them."""
        record: dict[str, Any] = {"model": self.model, "parameters": self.parameters, "dtype": self.dtype}
        if self.perplexity is not None:
            record |= {
                "perplexity": self.perplexity.perplexity,
                "tokens": self.perplexity.tokens,
                "seconds": round(self.perplexity.seconds, 2),
            }
        if self.zero_shot is not None:
            scores = self.zero_shot.scores
            record |= {
                "tasks": {score.task: {"questions": score.questions} | score.metrics for score in scores},
                "mean_accuracy": self.zero_shot.mean,
                "task_seconds": round(self.zero_shot.seconds, 2),
            }
        return record

    def __str__(self) -> str:
        return evaluation_tables([self])


def evaluation_tables(evaluations: Sequence[Evaluation]) -> str:
    """Models side by side: a table of perplexities, and one of tasks, with a blank line between them."""
    tables = []
    if all(each.perplexity is not None for each in evaluations):
        tables.append(perplexity_table(evaluations))
    if all(each.zero_shot is not None for each in evaluations):
        tables.append(task_table(evaluations))
    return "\n\n".join(tables)


def perplexity_table(evaluations: Sequence[Evaluation]) -> str:
    """One line a model, with the ratio to the first one where there are several."""
    results = [each.record for each in evaluations]
    rows = [row | {"against first": row["perplexity"] / results[0]["perplexity"]} for row in results]
    columns = ["model", "parameters", "perplexity", "tokens", "seconds"]
    columns = columns if len(rows) == 1 else [*columns[:3], "against first", *columns[3:]]
    return format_table(rows, columns, secondary=("seconds", "tokens"))


def task_table(evaluations: Sequence[Evaluation]) -> str:
    """One line a task and measure, one column a model, and the mean as the paper takes it."""
    names = [each.model for each in evaluations]
    # A model may be named twice (another dtype, say): its columns must not become one.
    columns = [
        f"{name} ({index})" if names.count(name) > 1 else name for index, name in enumerate(names, start=1)
    ]
    answers = [each.zero_shot for each in evaluations]
    rows = []
    for position, score in enumerate(answers[0].scores):
        accuracies = [measure for measure in ("acc", "acc_norm") if measure in score.metrics]
        others = [measure for measure in score.metrics if "_stderr" not in measure]
        for measure in accuracies or others:
            values = [each.scores[position].metrics.get(measure) for each in answers]
            row = {"task": score.task, "measure": measure, "questions": score.questions}
            rows.append(row | dict(zip(columns, values, strict=True)))
    means = [each.mean for each in answers]
    rows.append({"task": "mean", "measure": "acc_norm or acc"} | dict(zip(columns, means, strict=True)))
    return format_table(rows, ["task", "measure", "questions", *columns], secondary=("questions",))
