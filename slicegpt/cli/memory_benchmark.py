"""`slicegpt bench memory`: a run's peak of memory beside its plan's."""

import argparse
import shlex

from slicegpt.errors import SliceGPTError

from .benchmark_options import MEMORY_SHAPES, check_files, check_shape, settings_of
from .options import add_json, add_shared, positive, resolve_dtype

_SLICING = "--keep 0.8 --nsamples 8 --seqlen 512 --batch-size 1 --ridge 0.3"


def add_memory(benchmarks) -> None:
    parser = benchmarks.add_parser(
        "memory",
        help="what slicing takes of the host's memory, beside its plan",
        description="Slices MODEL on the CPU in a process of its own, and compares the process's peak with what "
        "--dry-run says. Without MODEL, a checkpoint of a shape's widths with few layers and random weights, which is "
        "written before.",
        examples=(
            "slicegpt bench memory --width 1024 --neurons 4096",
            "slicegpt bench memory --shape llama-2-70b --layers 2 --json memory.json",
            "slicegpt bench memory smollm2-135m --slicing '--keep 0.8 --nsamples 8 --seqlen 512'",
        ),
    )
    parser.set_defaults(run=run_memory)
    parser.add_argument("model", nargs="?", metavar="MODEL", help="a model as slicegpt slice takes it")
    parser.add_argument(
        "--shape",
        metavar="NAME",
        help="whose widths: llama-2-70b, opt-66b, mixtral-8x7b, ... (default: llama-2-70b)",
    )
    parser.add_argument("--layers", type=positive, metavar="N", help="layers (default: 2)")
    parser.add_argument("--width", type=positive, metavar="N", help="columns, in place of the shape's")
    parser.add_argument("--neurons", type=positive, metavar="N", help="neurons, in place of the shape's")
    add_shared(parser, "--dtype", help="of the weights; auto is bfloat16")
    parser.add_argument(
        "--slicing", default=_SLICING, metavar="OPTIONS", help="of slicegpt slice, in one word"
    )
    parser.add_argument("--folder", metavar="DIR", help="for the checkpoint (that of temporary files)")
    add_json(parser)
    parser.set_defaults(csv=None)


def run_memory(options: argparse.Namespace) -> None:
    random = {name: getattr(options, name) for name in ("shape", "layers", "width", "neurons")}
    for name, value in random.items():
        if options.model is not None and value is not None:
            raise SliceGPTError(
                f"is of random weights, not of a model, got {value} with {options.model}", f"--{name}"
            )
    options.shape = options.shape or "llama-2-70b"
    check_shape(options.shape, MEMORY_SHAPES)
    check_files(options)
    import torch

    from slicegpt.bench.commands.wide_layers import config_of, measure_model, measure_shape
    from slicegpt.bench.harness.record import Record
    from slicegpt.hardware.scratch import scratch_folder
    from slicegpt.progress import Progress
    from slicegpt.table import format_table

    record = Record("memory", settings_of(options), torch.device("cpu"), options.json, None)
    slicing, folder, progress = shlex.split(options.slicing), scratch_folder(options.folder), Progress()
    if options.model is not None:
        measure_model(options.model, slicing, folder, record, progress)
    else:
        config = config_of(options.shape, options.layers or 2, options.width, options.neurons)
        dtype = resolve_dtype(options.dtype) or torch.bfloat16
        measure_shape(config, dtype, slicing, folder, record, progress)
    rows = [{"": name, "value": value} for name, value in record.rows[0].items()]
    print(format_table(rows, ["", "value"]))
