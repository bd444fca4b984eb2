"""`slicegpt eval`: perplexity and zero-shot accuracy of one or more models, side by side."""

import argparse

from slicegpt.calibration import load_documents
from slicegpt.calibration.defaults import default_test
from slicegpt.checkpoint.names import check_name
from slicegpt.errors import SliceGPTError
from slicegpt.progress import Progress
from slicegpt.table import check_writable

from .options import (
    add_device,
    add_json,
    add_shared,
    check_device,
    positive,
    positive_or_auto,
    resolve_device,
)


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "eval",
        help="perplexity and zero-shot accuracy, dense and sliced side by side",
        description=(
            "Perplexity by the published protocol (documents joined, windows of --seqlen that do not overlap),"
            " accuracy on tasks of the LM Evaluation Harness, or both."
        ),
        examples=(
            "slicegpt eval smollm2-135m small --data python-reference --seqlen 512 --windows 16",
            "slicegpt eval small --tasks piqa,arc_easy --limit 200",
        ),
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "models", nargs="+", metavar="DIR|MODEL", help="name the dense model first to compare with it"
    )
    add_shared(
        parser,
        "--batch-size",
        type=positive_or_auto,
        default=1,
        help="windows or questions at a time, or auto",
    )
    parser.add_argument(
        "--layerwise",
        action=argparse.BooleanOptionalAction,
        help="load no model, but read it layer by layer for all windows: default where it does not fit into memory",
    )
    text = parser.add_argument_group("perplexity")
    text.add_argument(
        "--data",
        metavar="DATA",
        help="a text file, or whatever --calibration takes (default: wikitext2 where the hub gives it, else "
        "python-reference; with --tasks none)",
    )
    add_shared(text, "--split", "--text-column", "--seqlen")
    add_shared(text, "--windows", former=["--max-windows"])
    tasks = parser.add_argument_group("zero-shot tasks (extra: eval)")
    tasks.add_argument(
        "--tasks",
        metavar="NAMES",
        help="tasks of lm-eval, separated by commas; paper: piqa, winogrande, hellaswag, arc_easy, arc_challenge",
    )
    tasks.add_argument("--include-path", metavar="DIR", help="folder of further task definitions (YAML)")
    tasks.add_argument(
        "--num-fewshot",
        type=int,
        metavar="N",
        help="solved questions before each one (default: each task's own)",
    )
    tasks.add_argument(
        "--limit", type=positive, metavar="N", help="only the first N questions of each task (default: all)"
    )
    add_device(parser)
    add_json(parser)


def check(options: argparse.Namespace) -> None:
    """What can be told before torch is imported: what is to be measured, of which models."""
    if options.tasks is None:
        for name in ("include_path", "num_fewshot", "limit"):
            if getattr(options, name) is not None:
                raise SliceGPTError(f"--{name.replace('_', '-')} needs --tasks")
    elif options.data is None and (options.text_column is not None or options.windows is not None):
        raise SliceGPTError("--text-column and --windows need --data")
    if options.layerwise and options.tasks is not None:
        raise SliceGPTError("--layerwise is for perplexity: --tasks need the whole model in memory")
    check_device(options.device)
    check_writable("--json", options.json)
    for name in options.models:
        check_name(name, "model")


def run(options: argparse.Namespace) -> None:
    check(options)
    documents = tasks = None
    progress = Progress()
    if options.data is None and options.tasks is None:
        options.data = default_test(progress)
    if options.data is not None:  # read once for all models, and before the first of them
        documents = load_documents(options.data, options.split, options.text_column)

    from slicegpt import api
    from slicegpt.evaluation.report import evaluation_tables
    from slicegpt.evaluation.zero_shot import ZeroShotTasks
    from slicegpt.table import write_json

    device = resolve_device(options.device)
    if options.tasks is not None:
        names = [name.strip() for name in options.tasks.split(",") if name.strip()]
        with progress.step(f"loading tasks {options.tasks}"):
            tasks = ZeroShotTasks(names, options.include_path, options.num_fewshot, options.limit)
    results = [
        api.evaluate(
            name,
            data=documents,
            seqlen=options.seqlen,
            max_windows=options.windows,
            tasks=tasks,
            batch_size=options.batch_size,
            dtype=options.dtype,
            device=device,
            layerwise=options.layerwise,
            progress=progress,
        )
        for name in options.models
    ]
    print(evaluation_tables(results))
    if options.json:
        settings = {}
        if documents is not None:
            settings |= {"data": options.data, "seqlen": options.seqlen, "split": options.split}
        if tasks is not None:
            settings |= {"num_fewshot": options.num_fewshot, "limit": options.limit}
        records = [result.record for result in results]
        # The figures of the first model stand at the top as well, so one model needs no indexing.
        write_json(options.json, records[0] | settings | {"models": records})
