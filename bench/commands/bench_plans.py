"""Plans of one size, measured: the exchange between neurons, key/value groups and columns, and each of them alone.

    python -m slicegpt.bench.commands.bench_plans MODEL --calibration TEXT --sizes 0.8,0.5 --json plans.json

The costs and prices are taken once. Of every size, a fraction of the decoder layers' weights, each plan is sliced on a
quarter of the samples (`slicegpt.slicing.trials`); what it loses is the divergence of its logits from the dense model's
on windows of the text that the fits do not see.
"""

import argparse
import time
from collections.abc import Iterator
from dataclasses import replace

import torch

from slicegpt.bench.harness.record import write_results
from slicegpt.checkpoint.loading import load_dense
from slicegpt.conversion.plan import Shape, constant_widths, plan
from slicegpt.conversion.size_plan import choices_for_parameters, settled
from slicegpt.families import canonical_fields, checkpoint_of
from slicegpt.modeling.sizes import decoder_parameters
from slicegpt.progress import Progress
from slicegpt.recipe import OBJECTIVE, PRICES, Recipe
from slicegpt.slicing import Objective, SlicingOptions
from slicegpt.slicing.allocation import Costs, looked_at
from slicegpt.slicing.pipeline import calibration_sources, draw_samples
from slicegpt.slicing.plans import Plan, find_costs, predicted_plans
from slicegpt.slicing.prices import priced_windows
from slicegpt.slicing.trials import trial
from slicegpt.table import format_table

COLUMNS = [
    "size",
    "plan",
    "exponent",
    "width",
    "neurons",
    "kv_groups",
    "kept",
    "predicted",
    "measured",
    "seconds",
]


def plans_of(fields: dict, target: int, costs: Costs, multiple: int) -> Iterator[tuple[str, Plan]]:
    """The plans that store at most `target` elements of the decoder layers, by what they give up."""
    shape = Shape(round_to=multiple, neurons=None)

    def choices(allocate: str, neurons: float | None = None):
        own = replace(shape, neurons=neurons)
        return choices_for_parameters(fields, target, own, allocate, decoder_parameters)

    for found in predicted_plans(choices(PRICES), costs, multiple):
        yield "exchange", found
    for found in predicted_plans(choices(PRICES)[:1], replace(costs, groups=[]), multiple):
        yield "neurons, priced", found
    rises = replace(costs, groups=[], prices=None)
    yield "neurons, by the objective", predicted_plans(choices(PRICES)[:1], rises, multiple)[0]
    yield "columns and neurons in step", predicted_plans(choices(OBJECTIVE), rises, multiple)[0]
    yield "columns", Plan(choices(PRICES, 0.0)[0])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--calibration", default="python-reference")
    parser.add_argument("--sizes", default="0.8,0.5", help="fractions of the decoder layers' weights")
    parser.add_argument("--nsamples", type=int, default=24)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()

    device, progress = torch.device(options.device), Progress()
    model, tokenizer = load_dense(options.model)
    fields = canonical_fields(model)
    recipe = Recipe(
        keep=0.8, calibration=options.calibration, nsamples=options.nsamples, seqlen=options.seqlen
    )
    recipe = settled(recipe, fields, device)
    batches = draw_samples(recipe, calibration_sources(recipe), model, tokenizer, device, progress).batches
    settings, objective = SlicingOptions.of(recipe, model.dtype, device), Objective()
    checkpoint, ridge, multiple = checkpoint_of(model), objective.ridges[0], recipe.round_to
    part = looked_at(batches)
    windows = priced_windows(batches, len(part))
    whole = decoder_parameters(plan(fields, constant_widths(fields, fields["dense_hidden_size"])))
    sizes = [float(size) for size in options.sizes.split(",")]
    targets = [round(size * whole) for size in sizes]
    shape = Shape(round_to=multiple, neurons=None)
    all_choices = [
        config
        for target in targets
        for config in choices_for_parameters(fields, target, shape, PRICES, decoder_parameters)
    ]
    began = time.perf_counter()
    costs = find_costs(checkpoint, all_choices, part, windows, settings, objective, ridge, progress)
    rows: list[dict] = []
    figures = {
        "settings": {name: value for name, value in vars(options).items() if name != "json"},
        "price_seconds": time.perf_counter() - began,
        "prices": {
            "neurons": costs.prices.neurons,
            "groups": costs.prices.groups,
            "columns": costs.prices.columns,
        },
        "rows": rows,
    }
    write_results(options.json, "plans", figures)
    for size, target in zip(sizes, targets, strict=True):
        for name, found in plans_of(fields, target, costs, multiple):
            began = time.perf_counter()
            found.measured = trial(
                checkpoint, found.config, part, windows, costs.dense, settings, objective, ridge
            )
            record = found.record()
            rows.append(
                {
                    "size": size,
                    "plan": name,
                    **record,
                    "neurons": round(sum(record["neurons"]) / len(record["neurons"])),
                    "kv_groups": round(sum(record["kv_groups"]) / len(record["kv_groups"]), 2),
                    "kept": decoder_parameters(found.config) / whole,
                    "layers": record,
                    "seconds": time.perf_counter() - began,
                }
            )
            progress.say(f"{size:g} {name}: {found.measured:.4f}")
            write_results(options.json, "plans", figures)
    print(format_table(rows, COLUMNS))


if __name__ == "__main__":
    main()
