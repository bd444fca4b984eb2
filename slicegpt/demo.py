"""The demo: slice a real model at several sizes, compare with the dense one, write a report."""

import argparse
import time
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slicegpt.calibration import Source, load_documents, sample_sources
from slicegpt.checkpoint.loading import load_dense
from slicegpt.checkpoint.record import calibration_record, slicing_record
from slicegpt.checkpoint.saving import save_sliced
from slicegpt.conversion.plan import Shape, plan_for_parameters
from slicegpt.errors import SliceGPTError
from slicegpt.evaluation.perplexity import perplexity
from slicegpt.evaluation.plots import plot_spectra
from slicegpt.families import canonical_fields
from slicegpt.modeling import CACHE
from slicegpt.modeling.sizes import describe_neurons, format_bytes
from slicegpt.progress import Progress
from slicegpt.slicing import SlicingOptions, slice_model
from slicegpt.table import format_table, write_json

PROMPT = "The for statement is used to iterate over the elements of"
SEED = 42
TIMED_TOKENS = 24


@torch.no_grad()
def time_per_token(model: PreTrainedModel, ids: torch.Tensor) -> float:
    """Median milliseconds of a decoding step at batch 1, with cache, after a warm-up."""
    steps = []
    output = model(ids, use_cache=True)
    for _ in range(TIMED_TOKENS + 2):
        token = output.logits[:, -1:].argmax(dim=-1)
        start = time.perf_counter()
        output = model(token, use_cache=True, **{CACHE: output[CACHE]})
        steps.append(time.perf_counter() - start)
    return 1000 * sorted(steps[2:])[TIMED_TOKENS // 2]


def measure(
    label: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: list[str],
    options: argparse.Namespace,
    progress: Progress,
) -> dict:
    """One row of the comparison: true size, perplexity, time per token, and a generated sentence."""
    result = perplexity(model, tokenizer, documents, options.seqlen, 4, options.windows, progress)
    prompt = tokenizer(PROMPT, return_tensors="pt")
    output = model.generate(**prompt, max_new_tokens=24, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {
        "model": label,
        "parameters": parameters,
        "bytes": parameters * model.dtype.itemsize,
        "perplexity": result.perplexity,
        "tokens": result.tokens,
        "ms per token": time_per_token(model, prompt["input_ids"]),
        "text": tokenizer.decode(output[0], skip_special_tokens=True),
    }


def write_report(
    folder: Path, rows: list[dict], table: str, options: argparse.Namespace, seconds: float
) -> None:
    """`report.md`: what was done, the table, the generated sentences and the plot."""
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


def run_demo(options: argparse.Namespace) -> None:
    """Slice at every size of `options.params`; print the comparison and write models, plot and report."""
    for size in options.params:
        if not 0 < size <= 1:
            raise SliceGPTError(
                f"--params: the fraction of parameters to keep must lie in (0, 1], got {size}"
            )
    started, progress, folder = time.perf_counter(), Progress(), Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    with progress.stage(f"loading {options.model}", 1, "step") as advance:
        model, tokenizer = load_dense(options.model, torch.float32)
        advance(1)
    train, test = (load_documents(options.data, split) for split in ("train", "test"))
    sources = [Source(options.data, documents=train)]
    drawn = sample_sources(sources, tokenizer, options.nsamples, options.seqlen, 8, SEED)
    calibration = calibration_record(options.data, options.nsamples, options.seqlen, SEED, drawn.batches)
    fields = canonical_fields(model)
    rows, records = [measure("dense", model, tokenizer, test, options, progress)], {}
    for size in options.params:
        label = f"{100 * size:g} % of parameters"
        # Multiples of 8: on a model 576 wide, steps of 64 could not come near the sizes asked for.
        shape = Shape(round_to=8, neurons=None)
        config = plan_for_parameters(fields, int(size * fields["source_parameters"]), shape)
        settings = SlicingOptions(neuron_multiple=shape.round_to)
        sliced, report = slice_model(model, config, drawn.batches, settings, progress, drawn.held_out)
        sliced.generation_config = model.generation_config
        records[label] = slicing_record(sliced, report, settings, options.model, calibration)
        save_sliced(sliced, tokenizer, records[label], folder / f"params-{size:g}", overwrite=True)
        left = {"width": config.boundary_widths[0], "neurons": describe_neurons(sliced.config.neurons)}
        rows.append(measure(label, sliced, tokenizer, test, options, progress) | left)
    whole = {"width": fields["dense_hidden_size"], "neurons": fields["intermediate_size"]}
    shown = [whole | row | {"bytes": format_bytes(row["bytes"])} for row in rows]
    table = format_table(
        shown, ["model", "width", "neurons", "parameters", "bytes", "perplexity", "ms per token"]
    )
    plot_spectra(records, folder / "spectra.png")
    seconds = time.perf_counter() - started
    write_report(folder, rows, table, options, seconds)
    print(table)
    for row in rows:
        print(f"\n{row['model']}: {' '.join(row['text'].split())}")
    print(f"\n{folder}/report.md, spectra.png and the sliced models, in {seconds:.0f} s")
    if options.json:
        write_json(options.json, {"models": rows, "seconds": round(seconds, 1)})
