"""Perplexity at equal true size: compact shortcuts at a larger width against dense shortcuts, same calibration.

    python -m slicegpt.bench.bench_equal_size --json results.json

Compares layers of about the same number of weights (shortcuts counted): SmolLM2-135M at width 504 with compact
shortcuts, and at width 456 with dense ones, which is what the published method stores.
"""

import argparse

import torch

from slicegpt.bench.results import write_results
from slicegpt.calibration import load_documents, sample_batches
from slicegpt.evaluate import perplexity
from slicegpt.families import canonical_fields
from slicegpt.loading import load_dense
from slicegpt.progress import Progress
from slicegpt.schedule import Shape, constant_widths, plan
from slicegpt.sizes import decoder_parameters, stored_parameters
from slicegpt.slicing import SlicingOptions, slice_model
from slicegpt.table import format_table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument(
        "--data", default="python-reference", help="calibrates on its train split, evaluates on test"
    )
    parser.add_argument("--test-data", help="evaluate on this text instead")
    parser.add_argument("--compact-width", type=int, default=504)
    parser.add_argument("--dense-width", type=int, default=456)
    parser.add_argument("--nsamples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()

    progress = Progress()
    model, tokenizer = load_dense(options.model, torch.float32)
    train = load_documents(options.data, "train")
    test = load_documents(options.test_data or options.data, "test")
    batches = sample_batches(train, tokenizer, options.nsamples, options.seqlen)
    fields = canonical_fields(model)

    def measure(network) -> float:
        return perplexity(network, tokenizer, test, options.seqlen, 4, options.windows, progress).perplexity

    rows = [
        {
            "shortcuts": "none (dense model)",
            "width": fields["dense_hidden_size"],
            "perplexity": measure(model),
        }
    ]
    for shortcut, width in (("dense", options.dense_width), ("compact", options.compact_width)):
        config = plan(fields, constant_widths(fields, width), Shape(shortcut, round_to=8))
        sliced, _ = slice_model(model, config, batches, SlicingOptions(refit=False), progress)
        rows.append(
            {
                "shortcuts": shortcut,
                "width": width,
                "layer weights": decoder_parameters(config),
                "parameters": stored_parameters(config),
                "perplexity": measure(sliced),
            }
        )
    ratio = rows[2]["perplexity"] / rows[1]["perplexity"]
    print(format_table(rows, ["shortcuts", "width", "layer weights", "parameters", "perplexity"]))
    print(f"perplexity with compact shortcuts: {ratio:.3f} of that with dense ones")
    settings = {"data": options.data, "test_data": options.test_data or options.data}
    figures = {"nsamples": options.nsamples, "seqlen": options.seqlen, "windows": options.windows}
    write_results(options.json, "equal size", settings | figures | {"rows": rows, "ratio": ratio})


if __name__ == "__main__":
    main()
