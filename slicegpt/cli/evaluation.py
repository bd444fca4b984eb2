"""`slicegpt eval`: perplexity and zero-shot accuracy of one or more models, side by side."""

import argparse

from .options import add_device, add_json, positive, resolve_device, resolve_dtype, step


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "eval",
        help="perplexity and zero-shot accuracy, dense and sliced side by side",
        description=(
            "Perplexity by the published protocol (documents joined, windows of --seqlen that do not overlap),"
            " accuracy on tasks of the LM Evaluation Harness, or both."
        ),
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "models", nargs="+", metavar="DIR|MODEL", help="name the dense model first to compare with it"
    )
    parser.add_argument("--batch-size", type=positive, default=1)
    text = parser.add_argument_group("perplexity")
    text.add_argument("--data", metavar="DATA", help="a text file, or whatever --calibration takes")
    text.add_argument("--split", choices=("train", "test"), default="test", help="of a named data set (test)")
    text.add_argument("--text-column", metavar="NAME")
    text.add_argument("--seqlen", type=positive, default=2048)
    text.add_argument("--max-windows", type=positive, metavar="N", help="only the first N windows")
    tasks = parser.add_argument_group("zero-shot tasks (extra: eval)")
    tasks.add_argument(
        "--tasks",
        metavar="NAMES",
        help="tasks of lm-eval, separated by commas; paper: piqa, winogrande, hellaswag, arc_easy, arc_challenge",
    )
    tasks.add_argument("--include-path", metavar="DIR", help="folder of further task definitions (YAML)")
    tasks.add_argument("--num-fewshot", type=int, metavar="N", help="solved questions before each one (0)")
    tasks.add_argument("--limit", type=positive, metavar="N", help="only the first N questions of each task")
    add_device(parser)
    add_json(parser)


def check(options: argparse.Namespace) -> None:
    """Something to measure is named, and no option is left without the one that it belongs to."""
    from slicegpt.errors import SliceGPTError

    if options.data is None and options.tasks is None:
        raise SliceGPTError("--data or --tasks is needed: a text for perplexity, or names of zero-shot tasks")
    if options.tasks is None:
        for name in ("include_path", "num_fewshot", "limit"):
            if getattr(options, name) is not None:
                raise SliceGPTError(f"--{name.replace('_', '-')} needs --tasks")
    if options.data is None and (options.text_column is not None or options.max_windows is not None):
        raise SliceGPTError("--text-column and --max-windows need --data")


def run(options: argparse.Namespace) -> None:
    from slicegpt.calibration import load_documents
    from slicegpt.checkpoint.loading import load_dense
    from slicegpt.evaluation.perplexity import perplexity
    from slicegpt.evaluation.zero_shot import ZeroShotTasks
    from slicegpt.progress import Progress
    from slicegpt.table import write_json

    check(options)
    device, dtype, progress = resolve_device(options.device), resolve_dtype(options.dtype), Progress()
    documents = tasks = None
    if options.data is not None:
        documents = load_documents(options.data, options.split, options.text_column)
    if options.tasks is not None:
        names = [name.strip() for name in options.tasks.split(",") if name.strip()]
        with step(progress, f"loading tasks {options.tasks}"):
            tasks = ZeroShotTasks(names, options.include_path, options.num_fewshot, options.limit)
    results, answers = [], []
    model = None
    for name in options.models:
        del model  # one at a time on the device
        with step(progress, f"loading {name}"):
            model, tokenizer = load_dense(name, dtype, device)
        results.append(
            {
                "model": name,
                "parameters": sum(parameter.numel() for parameter in model.parameters()),
                "dtype": str(model.dtype).removeprefix("torch."),
            }
        )
        if documents is not None:
            measured = perplexity(
                model, tokenizer, documents, options.seqlen, options.batch_size, options.max_windows, progress
            )
            results[-1] |= {
                "perplexity": measured.perplexity,
                "tokens": measured.tokens,
                "seconds": round(measured.seconds, 2),
            }
        if tasks is not None:
            answers.append(tasks.score(model, tokenizer, options.batch_size))
            results[-1] |= task_figures(answers[-1])
    if documents is not None:
        print(perplexity_table(results))
    if tasks is not None:
        print(("\n" if documents is not None else "") + task_table(results, answers))
    if options.json:
        settings = {}
        if documents is not None:
            settings |= {"data": options.data, "seqlen": options.seqlen, "split": options.split}
        if tasks is not None:
            settings |= {"num_fewshot": options.num_fewshot, "limit": options.limit}
        # The figures of the first model stand at the top as well, so one model needs no indexing.
        write_json(options.json, results[0] | settings | {"models": results})


def perplexity_table(results: list[dict]) -> str:
    """One line a model, with the ratio to the first one where there are several."""
    from slicegpt.table import format_table

    rows = [row | {"against first": row["perplexity"] / results[0]["perplexity"]} for row in results]
    columns = ["model", "parameters", "perplexity", "tokens", "seconds"]
    return format_table(rows, columns if len(rows) == 1 else [*columns[:3], "against first", *columns[3:]])


def task_figures(answers) -> dict:
    """What JSON says of one model's answers."""
    return {
        "tasks": {score.task: {"questions": score.questions} | score.metrics for score in answers.scores},
        "mean_accuracy": answers.mean,
        "task_seconds": round(answers.seconds, 2),
    }


def task_table(results: list[dict], answers: list) -> str:
    """One line a task and measure, one column a model, and the mean as the paper takes it."""
    from slicegpt.table import format_table

    # A model may be named twice (another dtype, say): its columns must not become one.
    names = [f"{row['model']} ({index})" if [each["model"] for each in results].count(row["model"]) > 1
             else row["model"] for index, row in enumerate(results, start=1)]  # fmt: skip
    rows = []
    for position, score in enumerate(answers[0].scores):
        accuracies = [measure for measure in ("acc", "acc_norm") if measure in score.metrics]
        others = [measure for measure in score.metrics if "_stderr" not in measure]
        for measure in accuracies or others:
            values = [each.scores[position].metrics.get(measure) for each in answers]
            row = {"task": score.task, "measure": measure, "questions": score.questions}
            rows.append(row | dict(zip(names, values, strict=True)))
    means = [each.mean for each in answers]
    rows.append({"task": "mean", "measure": "acc_norm or acc"} | dict(zip(names, means, strict=True)))
    return format_table(rows, ["task", "measure", "questions", *names])
