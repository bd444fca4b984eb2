"""What slicing costs: its wall time against one dense forward pass over the same calibration tokens, in one run.

    python -m slicegpt.bench.bench_slicing --slice 0.25 --round-to 8 --json results.json

The dense pass is Hugging Face's own model, decoder layers only (no head), with SDPA and without a cache, at the
batch size that is fastest for it among those tried.
"""

import argparse
import time

import torch
from transformers import PreTrainedModel

from slicegpt.bench.results import write_results
from slicegpt.calibration import CalibrationBatch, load_documents, sample_batches
from slicegpt.families import canonical_fields
from slicegpt.loading import load_dense
from slicegpt.progress import Progress
from slicegpt.schedule import Shape, constant_widths, plan, width_for_slice
from slicegpt.slicing import SlicingOptions, slice_model
from slicegpt.table import format_table


@torch.no_grad()
def dense_pass(model: PreTrainedModel, batches: list[CalibrationBatch]) -> float:
    """Seconds of one pass of all batches through the decoder layers."""
    start = time.perf_counter()
    for batch in batches:
        model.base_model(input_ids=batch.input_ids, use_cache=False)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--calibration", default="python-reference")
    parser.add_argument("--slice", type=float, default=0.25)
    parser.add_argument("--round-to", type=int, default=8)
    parser.add_argument("--nsamples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()

    progress = Progress()
    model, tokenizer = load_dense(options.model, torch.float32)
    documents = load_documents(options.calibration, "train")

    def batches_of(size: int, nsamples: int = options.nsamples) -> list[CalibrationBatch]:
        return sample_batches(documents, tokenizer, nsamples, options.seqlen, size)

    # A few samples tell which batch size serves the dense model best; caches are warm after that as well.
    trial = {size: dense_pass(model, batches_of(size, 8)) for size in (1, 2, 4, 8)}
    best = min(trial, key=trial.get)
    dense = dense_pass(model, batches_of(best))

    fields = canonical_fields(model)
    width = width_for_slice(fields["dense_hidden_size"], options.slice, options.round_to)
    config = plan(fields, constant_widths(fields, width), Shape(round_to=options.round_to))
    batches = batches_of(options.batch_size)
    start = time.perf_counter()
    _, report = slice_model(model, config, batches, SlicingOptions(), progress)
    total = time.perf_counter() - start

    again = dense_pass(model, batches_of(best))
    dense_mean = (dense + again) / 2
    stages = {**report.seconds, "other": total - sum(report.seconds.values())}
    rows = [{"stage": "one dense forward pass", "seconds": dense_mean, "of the dense pass": 1.0}]
    rows += [
        {"stage": name, "seconds": value, "of the dense pass": value / dense_mean}
        for name, value in [*stages.items(), ("slicing in all", total)]
    ]
    print(
        f"{options.model}, width {width}, {report.tokens:,} tokens of {options.calibration}, dense batch {best}"
    )
    print(format_table(rows, ["stage", "seconds", "of the dense pass"]))
    figures = {
        "model": options.model,
        "width": width,
        "tokens": report.tokens,
        "seqlen": options.seqlen,
        "dense_batch_size": best,
        "dense_seconds": [dense, again],
        "slicing_seconds": total,
        "stages": stages,
        "ratio": total / dense_mean,
        "tokens_per_second": report.tokens / total,
    }
    write_results(options.json, "slicing", figures)


if __name__ == "__main__":
    main()
