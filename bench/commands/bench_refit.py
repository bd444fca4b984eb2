"""What the output refit costs: slicing without it and with it in one run.

    python -m slicegpt.bench.commands.bench_refit --nsamples 128 --seqlen 512 --json refit.json

Both use the same samples. "teacher" is the dense model's stream, carried beside the sliced one; "refit" the second
moments and the solutions; "ridge" the choice of λ on held-out windows.
"""

import argparse
import time

import torch

from slicegpt.bench.harness.display import print_table, stage_table
from slicegpt.bench.harness.record import write_results
from slicegpt.bench.harness.timing import synchronise
from slicegpt.checkpoint.loading import load_dense
from slicegpt.conversion.size_plan import plan_recipe
from slicegpt.families import canonical_fields
from slicegpt.progress import Progress
from slicegpt.recipe import Recipe
from slicegpt.slicing import SlicingOptions
from slicegpt.slicing.pipeline import calibration_sources, draw_samples, slice_drawn
from slicegpt.table import fit_text


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--calibration", default="python-reference")
    parser.add_argument("--slice", type=float, default=0.25)
    parser.add_argument("--round-to", type=int, default=8)
    parser.add_argument("--nsamples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()

    device, progress = torch.device(options.device), Progress()
    model, tokenizer = load_dense(options.model)
    recipe = Recipe(
        slice=options.slice,
        round_to=options.round_to,
        calibration=options.calibration,
        nsamples=options.nsamples,
        seqlen=options.seqlen,
    )
    drawn = draw_samples(recipe, calibration_sources(recipe), model, tokenizer, device)
    config = plan_recipe(recipe, canonical_fields(model), model.dtype)
    width = config.boundary_widths[0]
    rows = []
    for refit in (False, True):
        settings = SlicingOptions.of(recipe.override(refit=refit), model.dtype, device)
        begin = time.perf_counter()
        _, report = slice_drawn(model, config, drawn, settings, progress)
        synchronise(device)
        seconds = time.perf_counter() - begin
        rows.append({"slicing": "with refit" if refit else "without", **report.seconds, "in all": seconds})
    print_table(*stage_table(rows))
    ratio = rows[1]["in all"] / rows[0]["in all"]
    told = f"{ratio:.2f} times the slicing time without the refit; {report.tokens} tokens, width {width}"
    print(fit_text(told))
    figures = {
        "settings": {name: value for name, value in vars(options).items() if name != "json"}
        | {"width": width, "tokens": report.tokens},
        "rows": rows,
        "ratio": ratio,
    }
    write_results(options.json, "refit", figures)


if __name__ == "__main__":
    main()
