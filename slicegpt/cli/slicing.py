"""`slicegpt slice`: slice a model and save it as a Hugging Face folder."""

import argparse
import json
from pathlib import Path

from slicegpt.calibration import check_sources
from slicegpt.checkpoint.folders import check_output
from slicegpt.checkpoint.names import check_name
from slicegpt.checkpoint.partial import check_partial, interrupted_recipe, what_is_kept
from slicegpt.errors import SliceGPTError
from slicegpt.hardware.launcher import launched
from slicegpt.recipe import (
    ALLOCATIONS,
    AUTO,
    FORMS,
    GROUP_SIZES,
    IN_MEMORY,
    NAMES,
    ORIENTATIONS,
    QUANTIZE,
    SHORTCUT_MODES,
    SIGNALS,
    UNIFORM,
    Recipe,
)
from slicegpt.table import check_writable

from . import interrupts
from .options import (
    add_json,
    add_self_contained,
    add_shared,
    check_device,
    number_or_auto,
    positive,
    shard_size,
)
from .parser import add_option
from .planning import add_planning, check_planning, run_plan
from .sharing import shared


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "slice",
        help="slice a model and save it",
        description="Slice MODEL (a folder, a hub id, a .gguf file, or smollm2-135m) and save it under --output. All "
        "choices are written there as recipe.toml, which --recipe takes. Several GPUs: torchrun --nproc-per-node N -m "
        "slicegpt slice ...",
        examples=(
            "slicegpt slice smollm2-135m --keep 0.9 --calibration python-reference --output small",
            "slicegpt slice MODEL --target-bytes 4GB --calibration notes.txt:4,self:1 --output small",
            "slicegpt slice --recipe small --keep 0.8 --output smaller",
        ),
        # What is not given is not in the namespace, so that it cannot take the place of what the recipe says.
        argument_default=argparse.SUPPRESS,
    )
    parser.set_defaults(run=run, shared=True, overwrite=False, recipe=None, resume=False)
    parser.add_argument("model", metavar="MODEL", nargs="?", help="may be left out where the recipe names it")
    parser.add_argument(
        "--recipe",
        metavar="FILE",
        help="choices to start from, .toml or .yaml, or the folder of a sliced model; options given here come first",
    )
    parser.add_argument(
        "--output", default=None, metavar="DIR", help="folder to write; appears only when whole"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output folder")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on with an interrupted run into the same --output; its other options need not be given again",
    )
    add_self_contained(parser)
    parser.set_defaults(self_contained=None)  # as it was, where a run is resumed

    size = parser.add_argument_group("how much (one of)").add_mutually_exclusive_group()
    add_option(
        size,
        "--keep",
        former=["--params"],
        type=float,
        metavar="F",
        help="fraction of all parameters to keep, in (0, 1]: the true size",
    )
    size.add_argument(
        "--target-bytes",
        metavar="SIZE",
        help="bytes the weights may take: 400MB (1e6), 1.5GiB (2**30), 4e8",
    )
    size.add_argument(
        "--target-speedup",
        type=float,
        metavar="F",
        help="tokens/s while decoding, in those of the dense model: 1.3; the runtime is timed on this machine first, "
        "and columns, neurons and key/value groups go by the time that they take",
    )
    size.add_argument("--slice", type=float, metavar="F", help="fraction of columns to delete, in [0, 1)")
    size.add_argument("--widths", metavar="FILE", help="JSON list of widths, one a boundary")

    speed = parser.add_argument_group("with --target-speedup")
    speed.add_argument(
        "--decode-batch", type=positive, metavar="N", help="sequences that are decoded at once (default: 1)"
    )
    speed.add_argument(
        "--step-times",
        metavar="TEXT",
        help="what an earlier run, or one on another machine, has measured: step_times of its recipe.toml (default: "
        "measured here)",
    )

    shape = parser.add_argument_group("shape")
    shape.add_argument(
        "--form",
        choices=FORMS,
        help="sliced (default), or stock: a model of the dense one's own class, which loads where slicegpt is not "
        "installed: one width, one number of neurons, no shortcuts; per-layer: so, but for each layer's neurons, which "
        "llama.cpp runs after `slicegpt export --gguf`",
    )
    shape.add_argument(
        "--untie",
        action="store_true",
        help="with --form stock: a tied head gets a table of its own, so that columns can go; else they all stay",
    )
    add_shared(shape, "--round-to", default=argparse.SUPPRESS)
    shape.add_argument(
        "--shortcut", choices=SHORTCUT_MODES, help="compact (default) needs aligned bases; else dense"
    )
    shape.add_argument("--orientation", choices=ORIENTATIONS, help="basis inside each subspace")
    shape.add_argument(
        "--slice-head", action="store_true", help="slice the last boundary, which the head reads, too"
    )
    shape.add_argument(
        "--neurons",
        type=number_or_auto,
        metavar="F",
        help="fraction of MLP neurons to delete as well, or auto: what the size asks for (default with --keep and "
        "--target-bytes; else 0)",
    )
    shape.add_argument(
        "--allocate",
        choices=ALLOCATIONS,
        help="which layers give up neurons: by prices, what the logits lose by them, and columns as far as they pay "
        "(default); by the refit's objective alone; or uniform, all the same",
    )
    add_option(
        shape,
        "--uniform",
        former=["--no-allocate"],
        action="store_const",
        const=UNIFORM,
        dest="allocate",
        help="as many neurons in every layer, and no columns deleted for a true size: --allocate uniform",
    )
    shape.add_argument(
        "--kv-groups",
        type=number_or_list,
        metavar="N",
        help="key/value groups of attention that every layer keeps, each a key/value head with its query heads, or "
        "one number a layer: 3,3,2,0; 0 is a layer without attention (default: all)",
    )
    shape.add_argument(
        "--group-heads",
        type=number_or_list,
        metavar="N",
        help="query heads that each key/value group keeps, in every layer, or one number a layer (default: all)",
    )
    shape.add_argument("--signal", choices=SIGNALS, help="what the covariance is taken of")

    add_refit(parser)

    data = parser.add_argument_group("calibration")
    data_options = "--calibration", "--text-column", "--nsamples", "--seqlen", "--batch-size", "--seed"
    add_shared(data, *data_options, default=argparse.SUPPRESS)
    data.add_argument(
        "--vocabulary-prior",
        type=float,
        metavar="W",
        help="the embedding's basis also counts the whole vocabulary, W times as much as the text",
    )
    data.add_argument(
        "--varied-seqlen", action="store_true", help="one document a sample, padded, not windows"
    )

    weights = parser.add_argument_group("weights")
    weights.add_argument(
        "--quantize",
        choices=QUANTIZE,
        help="store the layers in 8 bits (a scale a row) or 4 (a scale a group of columns), by GPTQ as they are sliced",
    )
    weights.add_argument(
        "--group-size",
        type=int,
        choices=GROUP_SIZES,
        help="of int4: columns at most that share a scale (default: 64); layers that it does not divide take less",
    )
    weights.add_argument("--zero-points", action="store_true", help="of int4: a zero point beside each scale")
    weights.add_argument(
        "--quantize-tables",
        action=argparse.BooleanOptionalAction,
        help="with --quantize: embedding and head in 8 bits by row (default), or in --dtype",
    )
    add_shared(weights, "--dtype", default=argparse.SUPPRESS)

    machine = parser.add_argument_group("machine")
    add_shared(machine, "--device")
    add_option(
        machine,
        "--activation-storage",
        former=["--signals"],
        choices=("auto", "device", "host", "disk"),
        default="auto",
        help="where the calibration tokens' activations stay between blocks: on the device, on the host, on the disk "
        "of --output, or auto: on the first of them where they take at most half of what is free",
    )
    machine.add_argument(
        "--keep-state",
        choices=("auto", "always", "never"),
        default="auto",
        help="write what --resume needs after every block into DIR.partial: from the second minute on (auto), from the "
        "beginning, or not",
    )
    machine.add_argument(
        "--max-shard-size",
        type=shard_size,
        default=None,
        metavar="SIZE",
        help="bytes of a weight file at most (default: 5GB)",
    )
    machine.add_argument(
        "--timing",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="measure tokens/s of the runtime, dense and sliced, for a few seconds at the end",
    )
    add_planning(parser)
    parser.set_defaults(json=None)
    add_json(parser)


def add_refit(parser: argparse.ArgumentParser) -> None:
    """`--refit`, `--no-refit` and `--ridge`."""
    group = parser.add_argument_group("output refit")
    group.add_argument(
        "--refit",
        action=argparse.BooleanOptionalAction,
        help="fit every block's output weights to the dense model's stream (default)",
    )
    group.add_argument(
        "--ridge",
        type=number_or_auto,
        metavar="L",
        help="its ridge, relative to the mean diagonal, or auto (default): 0.1, 0.3 or 1, by what the sliced model "
        "loses on windows of the calibration text that are held out",
    )
    group.add_argument(
        "--refit-share",
        type=float,
        metavar="F",
        help="share of the calibration samples that it fits to; its cost grows with it",
    )


def number_or_list(text: str) -> int | list[int]:
    """ "2" or "3,3,2,0"."""
    numbers = [int(part) for part in text.split(",")]
    return numbers if "," in text else numbers[0]


def read_widths(file: str) -> list[int]:
    """The JSON list of `--widths`."""
    try:
        widths = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SliceGPTError(f"cannot read {file} as JSON: {error}", "widths") from error
    if not isinstance(widths, list):
        raise SliceGPTError(f"{file} must hold a list of widths, got {type(widths).__name__}", "widths")
    return widths


def recipe_from(options: argparse.Namespace) -> Recipe:
    """The recipe of `--recipe`, or the defaults, with the options that were given in place of its choices."""
    choices = {name: value for name, value in vars(options).items() if name in NAMES}
    if "widths" in choices:
        choices["widths"] = read_widths(choices["widths"])
    if options.resume and launched().rank > 0:  # the first one has the folder, and tells what the run is
        return Recipe().override(**choices)
    if options.recipe is not None:
        recipe = Recipe.read(options.recipe).override(**choices)
    else:
        recipe = (interrupted_recipe(options.output) if options.resume else Recipe()).override(**choices)
    if recipe.model is None:
        raise SliceGPTError("is needed here or in a recipe, got none", "model")
    _ = recipe.size  # an error where there is none
    return recipe


def run(options: argparse.Namespace) -> None:
    # What can be checked without the model is checked before anything heavy is imported.
    check_planning(options)
    recipe = recipe_from(options)
    if options.dry_run:
        if launched().rank == 0:
            check_writable("--json", options.json)
            run_plan(options, recipe)
        return
    if recipe.model is not None:
        check_name(recipe.model, "model")
    check_device(options.device)
    if launched().rank == 0:  # the only one that reads the text, and writes
        check_output(options.output, options.overwrite, recipe.model)
        check_partial(options.output, options.resume, options.overwrite)
        check_writable("--json", options.json)
        if recipe.calibration not in (AUTO, IN_MEMORY):  # found, or refused, by the run itself
            check_sources(recipe.calibration, recipe.text_column)

    from slicegpt import api
    from slicegpt.hardware.memory import memory_limits
    from slicegpt.table import write_json

    limits = memory_limits(options.device_memory, options.host_memory)
    kept = interrupts.remark(lambda: what_is_kept(options.output))
    with limits, kept, shared(options, lambda: what_is_kept(options.output)) as (ranks, device, progress):
        result = api.slice(
            recipe=recipe,
            output=options.output,
            overwrite=options.overwrite,
            resume=options.resume,
            keep_state=options.keep_state,
            self_contained=options.self_contained,
            max_shard_size=options.max_shard_size,
            # One process alone goes on where the run was, whatever auto would be now.
            device=options.device if ranks.size == 1 else device,
            activation_storage=options.activation_storage,
            timing=options.timing,
            progress=progress,
            ranks=ranks,
        )
    if result is None:
        return
    print(result.report)
    if options.json:
        write_json(options.json, result.report.summary)
