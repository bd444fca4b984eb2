"""Perplexity at several true sizes, beside the dense model's.

python examples/compare_with_dense.py smollm2-135m --keep 0.95 0.9 0.8
"""

import argparse

import slicegpt
from slicegpt.slicing import Reuse
from slicegpt.table import format_table

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", help="a folder, a hub id, a .gguf file or smollm2-135m")
parser.add_argument("--keep", type=float, nargs="+", default=[0.95, 0.9], help="fractions to keep (0.95 0.9)")
parser.add_argument("--calibration", default="python-reference", help="text to calibrate on")
parser.add_argument(
    "--data", default="python-reference", help="text to measure on; its test part, where it has one"
)
parser.add_argument("--nsamples", type=int, default=32)
parser.add_argument("--seqlen", type=int, default=512)
parser.add_argument("--windows", type=int, default=8, help="windows of the text to measure on (8)")
options = parser.parse_args()

dense, tokenizer = slicegpt.load(options.model)
rows, reuse = [], Reuse()  # what all sizes need of the dense model is found once
drawn = {"calibration": options.calibration, "nsamples": options.nsamples, "seqlen": options.seqlen}
for size in [1.0, *options.keep]:
    model = dense
    if size < 1:
        model = slicegpt.slice(
            dense, tokenizer=tokenizer, keep=size, reuse=reuse, timing=False, **drawn
        ).model
    windows = {"data": options.data, "seqlen": options.seqlen, "max_windows": options.windows}
    found = slicegpt.evaluate(model, tokenizer=tokenizer, **windows)
    rows.append({"size": size, "parameters": found.parameters, "perplexity": found.perplexity.perplexity})
print(format_table(rows, ["size", "parameters", "perplexity"]))
