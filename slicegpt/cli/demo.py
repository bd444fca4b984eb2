"""`slicegpt demo`: the whole path on a real model, SmolLM2-135M, in a few minutes on two CPU cores."""

import argparse
import time
from pathlib import Path

from slicegpt.checkpoint.names import check_name
from slicegpt.recipe import Recipe
from slicegpt.table import check_writable

from .options import add_json, positive

PROMPT = "The for statement is used to iterate over the elements of"
TIMED_TOKENS = 24
COLUMNS = ["model", "width", "neurons", "parameters", "bytes", "perplexity", "ms per token"]


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "demo",
        help="slice SmolLM2-135M at two sizes and compare",
        description="Slice SmolLM2-135M at two sizes on real text; compare perplexity, true size and time per token.",
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "--output", default="runs/demo", metavar="DIR", help="models, plot and report (runs/demo)"
    )
    parser.add_argument("--model", default="smollm2-135m", help="any model that `slicegpt slice` takes")
    parser.add_argument("--data", default="python-reference", help="text to calibrate on, and its test split")
    parser.add_argument(
        "--params", type=float, nargs="+", default=[0.95, 0.85], metavar="F", help="sizes to reach"
    )
    parser.add_argument("--nsamples", type=positive, default=24)
    parser.add_argument("--seqlen", type=positive, default=512)
    parser.add_argument("--windows", type=positive, default=8, help="windows of --seqlen to evaluate")
    add_json(parser)


def run(options: argparse.Namespace) -> None:
    # Multiples of 8: on a model 576 wide, steps of 64 could not come near the sizes asked for.
    shared = Recipe(
        model=options.model,
        calibration=options.data,
        nsamples=options.nsamples,
        seqlen=options.seqlen,
        round_to=8,
        dtype="float32",
    )
    recipes = [shared.override(params=size) for size in options.params]
    check_name(options.model, "model")
    check_writable("--json", options.json)

    from slicegpt import api
    from slicegpt.calibration import load_documents
    from slicegpt.evaluation.plots import plot_spectra
    from slicegpt.modeling.sizes import describe_neurons, format_bytes
    from slicegpt.progress import Progress
    from slicegpt.table import format_table, write_json

    started, progress, folder = time.perf_counter(), Progress(), Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    with progress.step(f"loading {options.model}"):
        model, tokenizer = api.load(options.model, "float32")
    test = load_documents(options.data, "test")
    rows, records = [measure("dense", model, tokenizer, test, options, progress)], {}
    for recipe in recipes:
        label = f"{100 * recipe.params:g} % of parameters"
        sliced, _, report = api.slice(
            model,
            tokenizer=tokenizer,
            recipe=recipe,
            output=folder / f"params-{recipe.params:g}",
            overwrite=True,
            device="cpu",
            progress=progress,
        )
        record = records[label] = report.record
        shape = {
            "width": record["boundaries"][0]["width"],
            "neurons": describe_neurons(record["neurons"]),
        }
        rows.append(measure(label, sliced, tokenizer, test, options, progress) | shape)
    whole = {"width": record["dense_width"], "neurons": record["dense_neurons"]}
    shown = [whole | row | {"bytes": format_bytes(row["bytes"])} for row in rows]
    plot_spectra(records, folder / "spectra.png")
    seconds = time.perf_counter() - started
    write_report(folder, rows, format_table(shown, COLUMNS, width=None), options, seconds)
    print(format_table(shown, COLUMNS, secondary=("neurons", "width")))
    for row in rows:
        print(f"\n{row['model']}: {' '.join(row['text'].split())}")
    print(f"\n{folder}/report.md, spectra.png and the sliced models, in {seconds:.0f} s")
    if options.json:
        write_json(options.json, {"models": rows, "seconds": round(seconds, 1)})


def measure(label: str, model, tokenizer, documents: list[str], options, progress) -> dict:
    """One row of the comparison: true size, perplexity, time per token, and a generated sentence."""
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
    prompt = tokenizer(PROMPT, return_tensors="pt")
    output = model.generate(**prompt, max_new_tokens=24, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return {
        "model": label,
        "parameters": evaluation.parameters,
        "bytes": evaluation.parameters * model.dtype.itemsize,
        "perplexity": evaluation.perplexity.perplexity,
        "tokens": evaluation.perplexity.tokens,
        "ms per token": time_per_token(model, prompt["input_ids"]),
        "text": tokenizer.decode(output[0], skip_special_tokens=True),
    }


def time_per_token(model, ids) -> float:
    """Median milliseconds of a decoding step at batch 1, with cache, after a warm-up."""
    import torch

    from slicegpt.modeling import CACHE

    steps = []
    with torch.no_grad():
        output = model(ids, use_cache=True)
        for _ in range(TIMED_TOKENS + 2):
            token = output.logits[:, -1:].argmax(dim=-1)
            start = time.perf_counter()
            output = model(token, use_cache=True, **{CACHE: output[CACHE]})
            steps.append(time.perf_counter() - start)
    return 1000 * sorted(steps[2:])[TIMED_TOKENS // 2]


def write_report(
    folder: Path, rows: list[dict], table: str, options: argparse.Namespace, seconds: float
) -> None:
    """`report.md`: what was done, the table, the generated sentences and the plot."""
    import torch

    sentences = "\n".join(f"- **{row['model']}**: {' '.join(row['text'].split())}" for row in rows)
    (folder / "report.md").write_text(
        f"""# SliceGPT demo: {options.model}

Calibrated on {options.nsamples} x {options.seqlen} tokens of `{options.data}`, evaluated on {options.windows} windows
of its held-out part. float32, {torch.get_num_threads()} threads, {seconds:.0f} s in all. Sizes count every stored
number, shortcuts and head included. Time per token: batch 1, with cache, median of {TIMED_TOKENS}.

```
{table}
```

Continuations of "{PROMPT}" (greedy):

{sentences}

![Spectra of the residual stream](spectra.png)
""",
        encoding="utf-8",
    )
