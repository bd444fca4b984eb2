"""`slicegpt demo`: the whole path on a real model, SmolLM2-135M, in a few minutes on two CPU cores."""

import argparse
import shutil
import textwrap
import time
from pathlib import Path

from slicegpt.checkpoint.names import check_name
from slicegpt.recipe import OBJECTIVE, Recipe
from slicegpt.table import check_writable

from .options import add_json, add_shared, positive
from .parser import add_option

PROMPT = "The for statement is used to iterate over the elements of"
SHORT_PROMPT = "The for statement"  # of the proposed command, which fits a terminal's line
CONTINUED = 24  # tokens


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "demo",
        help="slice SmolLM2-135M at two sizes and compare",
        description="Slice SmolLM2-135M at two sizes on real text; compare bytes, perplexity, and tokens/s of Hugging "
        "Face's generate() and of the runtime.",
        examples=(
            "slicegpt demo",
            "slicegpt demo --keep 0.9 --nsamples 12 --output runs/quick",
        ),
    )
    parser.set_defaults(run=run)
    parser.add_argument("--output", default="runs/demo", metavar="DIR", help="models, plot and reports")
    parser.add_argument(
        "--model", default="smollm2-135m", metavar="MODEL", help="any model that `slicegpt slice` takes"
    )
    parser.add_argument(
        "--data", default="python-reference", help="text to calibrate on, and its test split to evaluate on"
    )
    add_option(
        parser,
        "--keep",
        former=["--params"],
        type=float,
        nargs="+",
        default=[0.95, 0.85],
        metavar="F",
        help="sizes to reach, fractions of all parameters",
    )
    add_shared(parser, "--nsamples", default=24)
    add_shared(parser, "--seqlen", default=512)
    parser.add_argument(
        "--windows", type=positive, default=8, metavar="N", help="windows of --seqlen tokens to evaluate"
    )
    add_json(parser)


def run(options: argparse.Namespace) -> None:
    shared = Recipe(
        model=options.model,
        calibration=options.data,
        nsamples=options.nsamples,
        seqlen=options.seqlen,
        dtype="float32",
        allocate=OBJECTIVE,  # prices take longer than all the rest of the demo
    )
    recipes = {f"{100 * size:g} %": shared.override(keep=size) for size in options.keep}
    check_name(options.model, "model")
    check_writable("--json", options.json)

    import torch

    from slicegpt import api
    from slicegpt.bench.commands.demo_speed import measure_demo_speed, networks_of
    from slicegpt.bench.harness.demo_results import demo_rows
    from slicegpt.bench.harness.record import Record
    from slicegpt.calibration import load_documents
    from slicegpt.progress import Progress
    from slicegpt.slicing import Reuse
    from slicegpt.table import write_json

    started, progress, folder = time.perf_counter(), Progress(), Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"model": options.model, "data": options.data, "keep": options.keep}
    settings |= {"nsamples": options.nsamples, "seqlen": options.seqlen, "windows": options.windows}
    device = torch.device("cpu")
    speed = Record("token", settings, device, str(folder / "token.json"))
    record = Record("demo", settings, device, str(folder / "demo.json"))
    with progress.step(f"loading {options.model}"):
        model, tokenizer = api.load(options.model, "float32")
    test, reuse = load_documents(options.data, "test"), Reuse()
    quality = {"dense": measure(model, tokenizer, test, options, progress)}
    sliced = {}
    for label, recipe in recipes.items():
        path = folder / f"keep-{recipe.keep:g}"
        small = api.slice(
            model,
            tokenizer=tokenizer,
            recipe=recipe,
            output=path,
            overwrite=True,
            device="cpu",
            # Both are measured here, of all models together, and on text that is stricter than held-out windows.
            timing=False,
            held_out=False,
            reuse=reuse,
            progress=progress,
        ).model
        quality[label] = measure(small, tokenizer, test, options, progress)
        sliced[label] = (small, path)
    del reuse  # the dense model's streams
    runtimes = measure_demo_speed(networks_of(model, options.model, sliced), speed, progress)
    prompt = tokenizer(PROMPT, return_tensors="pt").input_ids
    for label, runtime in runtimes.items():
        output = runtime.generate(prompt, max_new_tokens=CONTINUED)
        quality[label]["text"] = tokenizer.decode(output[0], skip_special_tokens=True)
    record.rows.extend(demo_rows(quality, speed.rows))
    seconds = time.perf_counter() - started
    record.save(complete=True, seconds=round(seconds, 1), notes=notes_of(options))
    files = write_reports(folder, record, speed, quality, table_of(record.rows, width=None), progress)
    print(table_of(record.rows))
    columns = shutil.get_terminal_size().columns
    for label, row in quality.items():
        print("\n" + textwrap.fill(f"{label}: {' '.join(row['text'].split())}", columns))
    written = f"in {folder}: {', '.join(files)} and the sliced models; {seconds:.0f} s in all"
    print("\n" + textwrap.fill(written, columns, break_long_words=False, break_on_hyphens=False))
    print(f'next: slicegpt generate {next(iter(sliced.values()))[1]} --prompt "{SHORT_PROMPT}"')
    if options.json:
        write_json(options.json, record.content)


def measure(model, tokenizer, documents: list[str], options: argparse.Namespace, progress) -> dict:
    """True size and perplexity of a model."""
    from slicegpt import api

    evaluation = api.evaluate(
        model,
        tokenizer=tokenizer,
        data=documents,
        seqlen=options.seqlen,
        max_windows=options.windows,
        batch_size=4,
        progress=progress,
    )
    return {
        "parameters": evaluation.parameters,
        "bytes": evaluation.parameters * model.dtype.itemsize,
        "perplexity": evaluation.perplexity.perplexity,
    }


def notes_of(options: argparse.Namespace) -> list[str]:
    """What the figures were measured on."""
    return [
        f"Sliced by {options.nsamples} x {options.seqlen} tokens of {options.data}; perplexity on {options.windows} "
        f"windows of {options.seqlen} tokens of its test part.",
        "Sizes count every stored number, shortcuts and head included. float32; tokens/s of one sequence, the prompt "
        "apart; all take turns.",
    ]


def table_of(rows: list[dict], **fit) -> str:
    """The comparison, for people; `fit` is what `format_table` takes."""
    from slicegpt.bench.harness.demo_results import COLUMNS
    from slicegpt.modeling.sizes import format_bytes
    from slicegpt.table import format_table

    shown = [
        {
            "model": row["model"],
            "runs in": row["engine"],
            "bytes": format_bytes(row["bytes"]),
            "perplexity": row["perplexity"],
            "tokens/s": row["tokens_per_second"],
            "speed-up": f"{row['speedup']:.2f} x" if row["speedup"] else None,
        }
        for row in rows
    ]
    return format_table(shown, COLUMNS, **fit)


def write_reports(folder: Path, record, speed, quality: dict[str, dict], table: str, progress) -> list[str]:
    """`report.md`, and where matplotlib is there `demo.svg` and `report.html`; returns their names."""
    from slicegpt.bench.report.charts import plot_results
    from slicegpt.bench.report.page import render
    from slicegpt.errors import SliceGPTError

    files = ["report.md"]
    try:
        plot_results(record.content, folder / "demo.svg")
        results = [(folder / f"{each.content['benchmark']}.json", each.content) for each in (record, speed)]
        (folder / "report.html").write_text(render(results), encoding="utf-8")
        files += ["report.html", "demo.svg"]
    except SliceGPTError as error:
        progress.warn(f"no report.html, no plot: {error}")
    sentences = "\n".join(f"- **{label}**: {' '.join(row['text'].split())}" for label, row in quality.items())
    plot = "![Perplexity over bytes, tokens/s](demo.svg)\n" if "demo.svg" in files else ""
    content = record.content
    (folder / "report.md").write_text(
        f"""# SliceGPT demo: {content["settings"]["model"]}

{" ".join(content["notes"])} {content["environment"]["threads"]} threads, {content["seconds"]:.0f} s in all.

```text
{table}
```

{plot}
Continuations of "{PROMPT}" (greedy, by the runtime):

{sentences}
""",
        encoding="utf-8",
    )
    return files
