"""`slicegpt slice`: slice a model and save it as a Hugging Face folder."""

import argparse
import json
import sys
from pathlib import Path

from .options import add_device, add_json, positive, resolve_device, resolve_dtype, step


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "slice",
        help="slice a model and save it",
        description="Slice MODEL (a folder, a hub id, a .gguf file, or smollm2-135m) and save it under --output.",
    )
    parser.set_defaults(run=run)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument(
        "--output", required=True, metavar="DIR", help="folder to write; appears only when whole"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output folder")
    parser.add_argument(
        "--self-contained",
        action="store_true",
        help="put the modelling code beside the weights, for machines without slicegpt",
    )

    size = parser.add_argument_group("how much (one of)").add_mutually_exclusive_group(required=True)
    size.add_argument("--slice", type=float, metavar="F", help="fraction of columns to delete, in [0, 1)")
    size.add_argument(
        "--params", type=float, metavar="F", help="fraction of all parameters to keep: the true size"
    )
    size.add_argument(
        "--target-bytes", type=float, metavar="N", help="bytes the weights may take (1.5e9 is fine)"
    )
    size.add_argument("--widths", metavar="FILE", help="JSON list of widths, one a boundary")

    shape = parser.add_argument_group("shape")
    shape.add_argument(
        "--round-to", type=positive, default=64, metavar="N", help="widths are multiples of N (64)"
    )
    shape.add_argument(
        "--shortcut", choices=("compact", "dense"), help="compact (default) needs aligned bases; else dense"
    )
    shape.add_argument("--orientation", choices=("aligned", "random", "pca"), default="aligned")
    shape.add_argument(
        "--slice-head", action="store_true", help="slice the last boundary, which the head reads, too"
    )
    shape.add_argument(
        "--neurons",
        type=number_or_auto,
        metavar="F",
        help="fraction of MLP neurons to delete as well, or auto: in step with the columns (default with --params and "
        "--target-bytes; else 0)",
    )
    shape.add_argument(
        "--allocate",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="layers keep more or fewer neurons as deleting them costs (default), or all the same",
    )
    shape.add_argument("--signal", choices=("residual", "normalized"), default="residual")

    add_refit(parser)

    data = parser.add_argument_group("calibration")
    data.add_argument(
        "--calibration",
        default="wikitext2",
        metavar="DATA[:W],...",
        help="text file, folder, .jsonl, .parquet, python-reference; wikitext2 (default), ptb, c4, alpaca; self (the "
        "model writes it), random-tokens; or several of them with weights, a.txt:2,self:1",
    )
    data.add_argument(
        "--vocabulary-prior",
        type=float,
        default=0.0,
        metavar="W",
        help="the embedding's basis also counts the whole vocabulary, W times as much as the text (0)",
    )
    data.add_argument("--text-column", metavar="NAME", help="column of .jsonl and .parquet files (text)")
    data.add_argument("--nsamples", type=positive, default=128)
    data.add_argument("--seqlen", type=positive, default=2048)
    data.add_argument("--batch-size", type=positive, default=8)
    data.add_argument("--seed", type=int, default=42)
    data.add_argument(
        "--varied-seqlen", action="store_true", help="one document a sample, padded, not windows"
    )

    machine = parser.add_argument_group("machine")
    add_device(machine)
    machine.add_argument(
        "--activation-storage",
        choices=("auto", "device", "host"),
        default="auto",
        help="where the calibration tokens' activations stay between blocks: on the device, on the host, or (default) "
        "on the device where they take at most half of its free memory",
    )
    machine.add_argument(  # the option's former name
        "--signals",
        dest="activation_storage",
        choices=("auto", "device", "host"),
        default=argparse.SUPPRESS,
        help=argparse.SUPPRESS,
    )
    machine.add_argument("--max-shard-size", default="5GB", metavar="SIZE")
    add_json(parser)


def number_or_auto(text: str) -> float | str:
    """An argparse type: a number, or auto."""
    try:
        return text if text == "auto" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number or auto, got {text!r}") from None


def add_refit(parser: argparse.ArgumentParser) -> None:
    """`--refit`, `--no-refit` and `--ridge`."""
    group = parser.add_argument_group("output refit")
    group.add_argument(
        "--refit",
        action=argparse.BooleanOptionalAction,
        default=True,
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
        default=1.0,
        metavar="F",
        help="share of the calibration samples that it fits to (1); its cost grows with it",
    )


def read_widths(file: str) -> list[int]:
    """The JSON list of `--widths`."""
    from slicegpt.errors import SliceGPTError

    try:
        widths = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SliceGPTError(f"--widths: cannot read {file} as JSON: {error}") from error
    if not isinstance(widths, list):
        raise SliceGPTError(f"--widths: {file} must hold a list of widths, got {type(widths).__name__}")
    return widths


def plan_from(options: argparse.Namespace, fields: dict, dtype, shape):
    """The sliced model's configuration from the size that was asked for."""
    from slicegpt.conversion.plan import constant_widths, plan, plan_for_parameters, width_for_slice
    from slicegpt.errors import SliceGPTError

    if options.widths is not None:
        return plan(fields, read_widths(options.widths), shape)
    if options.slice is not None:
        width = width_for_slice(fields["dense_hidden_size"], options.slice, options.round_to)
        return plan(fields, constant_widths(fields, width, options.slice_head), shape)
    if options.params is not None:
        if not 0 < options.params <= 1:
            raise SliceGPTError(
                f"--params: the fraction of parameters to keep must lie in (0, 1], got {options.params}"
            )
        return plan_for_parameters(fields, int(options.params * fields["source_parameters"]), shape)
    if not 1 <= options.target_bytes < 1e18:
        raise SliceGPTError(f"--target-bytes: must lie in [1, 1e18), got {options.target_bytes}")
    return plan_for_parameters(fields, int(options.target_bytes / dtype.itemsize), shape)


def tell(warnings: list[str]) -> None:
    """Warnings about the calibration, on standard error."""
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)


def run(options: argparse.Namespace) -> None:
    # What can be checked without the model is checked before it is loaded.
    from slicegpt.calibration import calibration_warnings, coverage, load_sources, sample_sources
    from slicegpt.checkpoint.loading import load_dense
    from slicegpt.checkpoint.record import calibration_record, size_record, slicing_record
    from slicegpt.checkpoint.saving import check_output, check_space, save_sliced
    from slicegpt.conversion.plan import Shape, width_for_slice
    from slicegpt.errors import SliceGPTError
    from slicegpt.families import canonical_fields
    from slicegpt.progress import Progress
    from slicegpt.slicing import SlicingOptions, slice_model
    from slicegpt.slicing.held_out import held_out_check, held_out_warning
    from slicegpt.table import write_json

    from .report import print_sizes

    shortcut = options.shortcut or ("compact" if options.orientation == "aligned" else "dense")
    neurons = options.neurons
    if neurons is None:  # the paper's percentage is of columns alone; a true size is best reached both ways
        by_size = options.params is not None or options.target_bytes is not None
        neurons = "auto" if by_size and options.refit else 0.0
    neurons = None if neurons == "auto" else neurons
    if neurons != 0 and not options.refit:
        raise SliceGPTError("--neurons: which of them to delete is decided by the refit, got --no-refit")
    shape = Shape(shortcut, options.orientation, options.slice_head, options.round_to, neurons)
    if options.slice is not None:
        width_for_slice(1, options.slice, 1)
    if options.ridge is not None and not options.refit:
        raise SliceGPTError(f"--ridge: needs the output refit, got {options.ridge} with --no-refit")
    if options.refit_share != 1 and not options.refit:
        raise SliceGPTError(
            f"--refit-share: needs the output refit, got {options.refit_share:g} with --no-refit"
        )
    path = check_output(options.output, options.overwrite)
    device = resolve_device(options.device)
    sources = load_sources(options.calibration, options.text_column)
    progress = Progress()

    with step(progress, f"loading {options.model}"):
        model, tokenizer = load_dense(options.model, resolve_dtype(options.dtype))
    dtype = model.dtype
    config = plan_from(options, canonical_fields(model), dtype, shape)
    size = size_record(config, dtype)
    # Config, tokenizer and record come on top of the weights; a twentieth and 16 MB are ample.
    check_space(path, int(size["bytes"] * 1.05) + 16_000_000)
    if size["parameters"] >= size["dense_parameters"] and options.slice:
        print(f"note: at this size the sliced model is no smaller than the dense one ({shortcut} shortcuts)")
    settings = SlicingOptions(
        dtype,
        device,
        options.orientation,
        options.signal,
        options.activation_storage,
        options.seed,
        options.vocabulary_prior,
        refit=options.refit,
        fitted=options.refit_share,
        allocate=options.allocate,
        neuron_multiple=options.round_to,
        ridge=None if options.ridge == "auto" else options.ridge,
    )
    with step(progress, f"tokenising {options.calibration}"):
        drawn = sample_sources(
            sources,
            tokenizer,
            options.nsamples,
            options.seqlen,
            options.batch_size,
            options.seed,
            options.varied_seqlen,
            model,
            progress,
            device,
        )
    figures = coverage(drawn.batches, config.vocab_size, config.dense_hidden_size)
    warnings = calibration_warnings(figures)
    tell(warnings)
    sliced, report = slice_model(model, config, drawn.batches, settings, progress, drawn.held_out)
    check = held_out_check(model, sliced, drawn, device, progress, report.ridge_search is not None)
    if check is not None and (warning := held_out_warning(check)):
        warnings.append(warning)
        tell([warning])
    if model.generation_config is not None:
        sliced.generation_config = model.generation_config
    calibration = calibration_record(
        options.calibration,
        options.nsamples,
        options.seqlen,
        options.seed,
        drawn.batches,
        sources=drawn.sources,
        coverage=figures,
        held_out=check,
        warnings=warnings,
    )
    record = slicing_record(sliced, report, settings, options.model, calibration)
    with step(progress, f"saving {options.output}"):
        save_sliced(
            sliced,
            tokenizer,
            record,
            path,
            options.overwrite,
            options.max_shard_size,
            options.self_contained,
        )
    print_sizes(record)
    if options.json:
        write_json(options.json, {key: value for key, value in record.items() if key != "eigenvalues"})
