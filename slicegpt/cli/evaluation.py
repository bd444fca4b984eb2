"""`slicegpt eval`: perplexity of one or more models on the same text, side by side."""

import argparse

from .options import add_device, add_json, positive, resolve_device, resolve_dtype, step


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "eval",
        help="perplexity, dense and sliced side by side",
        description="Perplexity by the published protocol: documents joined, windows of --seqlen that do not overlap.",
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "models", nargs="+", metavar="DIR|MODEL", help="name the dense model first to compare with it"
    )
    parser.add_argument(
        "--data", required=True, metavar="DATA", help="a text file, or whatever --calibration takes"
    )
    parser.add_argument(
        "--split", choices=("train", "test"), default="test", help="of a named data set (test)"
    )
    parser.add_argument("--text-column", metavar="NAME")
    parser.add_argument("--seqlen", type=positive, default=2048)
    parser.add_argument("--batch-size", type=positive, default=1)
    parser.add_argument("--max-windows", type=positive, metavar="N", help="only the first N windows")
    add_device(parser)
    add_json(parser)


def run(options: argparse.Namespace) -> None:
    from slicegpt.calibration import load_documents
    from slicegpt.evaluate import perplexity
    from slicegpt.loading import load_dense
    from slicegpt.progress import Progress
    from slicegpt.table import format_table, write_json

    device, dtype, progress = resolve_device(options.device), resolve_dtype(options.dtype), Progress()
    documents = load_documents(options.data, options.split, options.text_column)
    results = []
    for name in options.models:
        with step(progress, f"loading {name}"):
            model, tokenizer = load_dense(name, dtype, device)
        measured = perplexity(
            model, tokenizer, documents, options.seqlen, options.batch_size, options.max_windows, progress
        )
        parameters = sum(parameter.numel() for parameter in model.parameters())
        results.append(
            {
                "model": name,
                "parameters": parameters,
                "perplexity": measured.perplexity,
                "tokens": measured.tokens,
                "seconds": round(measured.seconds, 2),
                "dtype": str(model.dtype).removeprefix("torch."),
            }
        )
    rows = [row | {"against first": row["perplexity"] / results[0]["perplexity"]} for row in results]
    columns = ["model", "parameters", "perplexity", "tokens", "seconds"]
    print(format_table(rows, columns if len(rows) == 1 else [*columns[:3], "against first", *columns[3:]]))
    if options.json:
        # The figures of the first model stand at the top as well, so one model needs no indexing.
        settings = {"data": options.data, "seqlen": options.seqlen, "split": options.split}
        write_json(options.json, results[0] | settings | {"models": results})
