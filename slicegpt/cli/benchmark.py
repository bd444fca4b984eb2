"""`slicegpt bench`: what a sliced model gains, against the dense one."""

import argparse
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from slicegpt.errors import SliceGPTError
from slicegpt.recipe import NAMES, Recipe

from .benchmark_options import (
    SHORTCUTS,
    add_sequences,
    check_networks,
    dtypes,
    fraction,
    fractions,
    names,
    settings_of,
)
from .memory_benchmark import add_memory
from .options import add_device, add_json, add_shared, byte_size, positive, resolve_device, resolve_dtype
from .prediction import add_predict
from .report_page import add_report
from .sharing import shared


def add_parser(commands) -> None:
    parser = commands.add_parser("bench", help="speed and memory, dense and sliced side by side")
    benchmarks = parser.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    add_token(benchmarks)
    add_throughput(benchmarks)
    add_layers(benchmarks)
    add_slicing(benchmarks)
    add_memory(benchmarks)
    add_predict(benchmarks)
    add_report(benchmarks)


# The compiled forward pass with a static cache is the best dense baseline on a GPU, where launches count. Every batch
# of the search is compiled anew, which takes a CPU half a minute each: there it must be asked for.
THROUGHPUT_ENGINES = {"cpu": "hf,fused", "cuda": "hf,hf-compile,fused"}


def add_networks(parser: argparse.ArgumentParser, engines: str | None, on_gpu: str | None = None) -> None:
    """What is measured.

    Args:
        engines: the default of `--engines`; None leaves the option out.
        on_gpu: the default where the device is a GPU, if another; the option is then None until it is known.
    """
    group = parser.add_argument_group("networks")
    group.add_argument(
        "--model",
        nargs="+",
        default=[],
        metavar="M",
        help="dense models, measured at every --slice, and sliced folders, as they are (default: none; --model or "
        "--shape is needed)",
    )
    group.add_argument(
        "--shape",
        metavar="NAME",
        help="random weights: llama-2-7b, llama-1b, opt-66b, ... (default: none; --model or --shape is needed)",
    )
    group.add_argument(
        "--slice",
        type=fractions,
        default=[0.0, 0.25],
        metavar="F,...",
        help="0 is the dense model; sliced sizes have random weights, for speed alone",
    )
    group.add_argument(
        "--shortcut", choices=SHORTCUTS, default="compact", help="compact, or the published form, dense"
    )
    add_shared(group, "--round-to")
    if engines:
        group.add_argument(
            "--engines",
            type=names,
            default=engines.split(",") if on_gpu is None else None,
            metavar="E,...",
            help="of hf, hf-eager, hf-static, hf-compile: Hugging Face's forward pass; hf-generate, "
            f"hf-generate-static: its generate(); plain, plain-compile, fused: this package's; fused-int8, fused-int4: "
            f"the same with weights rounded to nearest; llama-cpp: --gguf (default: {engines}"
            + (f"; on a GPU {on_gpu})" if on_gpu else ")"),
        )
    add_device(group, dtypes)


def add_results(parser: argparse.ArgumentParser) -> None:
    """Where the results go."""
    group = parser.add_argument_group(
        "results", "rewritten as the run goes: an interrupted one keeps what it has"
    )
    add_json(group)
    group.add_argument("--csv", metavar="FILE", help="the rows as CSV, each with device, versions and commit")
    group.add_argument("--plot", metavar="FILE", help="a plot, .png or .svg (extra plot)")


def add_trace(parser: argparse.ArgumentParser, what: str) -> None:
    """`--trace`."""
    parser.add_argument(
        "--trace", metavar="FILE", help=f"a Chrome trace with named ranges {what}, for ui.perfetto.dev"
    )


def networks_of(options: argparse.Namespace) -> list:
    from slicegpt.bench.models.networks import choose_networks
    from slicegpt.conversion.plan import Shape

    shape = Shape(options.shortcut, round_to=options.round_to)
    device, dtypes = resolve_device(options.device), [resolve_dtype(name) for name in options.dtype]
    return choose_networks(options.model, options.shape, options.slice, dtypes, device, shape)


def record_of(options: argparse.Namespace, device):
    from slicegpt.bench.harness.record import Record

    return Record(options.benchmark, settings_of(options), device, options.json, options.csv)


@contextmanager
def measuring(record, options: argparse.Namespace) -> Iterator[None]:
    """Print the table at the end, and write the files.

    Whatever ends the run before, Ctrl-C or an error, what was measured until then is printed and written, marked
    incomplete.
    """
    from slicegpt.bench.harness.display import print_skipped

    try:
        yield
        if not record.rows:
            print_skipped(record.content.get("skipped", ()))
            raise SliceGPTError("nothing could be measured")
        record.finish()
    except BaseException as error:
        record.content["complete"] = False
        kept = keep(record, options)
        if isinstance(error, KeyboardInterrupt):
            print(f"interrupted: {kept}", file=sys.stderr)
            raise SystemExit(130) from None
        if record.rows:
            print(f"stopped by an error: {kept}", file=sys.stderr)
        raise
    show(record, options)
    if options.json:
        print(f"next: slicegpt bench report {shlex.quote(os.path.dirname(options.json) or '.')}")


def show(record, options: argparse.Namespace) -> None:
    from slicegpt.bench.harness.display import print_summary

    print_summary(record.content)
    if options.plot:
        from slicegpt.bench.report.charts import plot_results

        plot_results(record.content, options.plot)


def keep(record, options: argparse.Namespace) -> str:
    """Write and print what an unfinished run has, and say what that is; never an error in place of the first one."""
    if not record.rows:
        return "0 rows are kept"
    try:
        record.save()
        show(record, options)
    except Exception as error:
        return f"{len(record.rows)} rows were measured, and not all written: {error}"
    files = ", ".join(file for file in (options.json, options.csv) if file)
    return f"{len(record.rows)} rows are kept" + (f"; {files} marked incomplete" if files else "")


def add_token(benchmarks) -> None:
    parser = benchmarks.add_parser(
        "token",
        help="time per token while decoding",
        description="Milliseconds per token, the prompt apart. Networks and engines take turns, so that other load "
        "meets them all; every step is waited for.",
        examples=(
            "slicegpt bench token --model smollm2-135m small --slice 0 --tokens 64",
            "slicegpt bench token --shape llama-1b --dtype bfloat16 --engines hf,fused",
        ),
    )
    parser.set_defaults(run=run_token)
    add_networks(parser, "hf,hf-generate,hf-generate-static,hf-compile,plain,fused")
    parser.add_argument(
        "--gguf",
        type=names,
        default=[],
        metavar="FILE,...",
        help="GGUF files of the dense models, for the engine llama-cpp (needs llama-cpp-python; default: none)",
    )
    parser.add_argument("--tokens", type=positive, default=128, help="steps that are timed")
    parser.add_argument("--prompt", type=positive, default=16, metavar="N", help="tokens of the prompt")
    add_sequences(parser)
    parser.add_argument("--rounds", type=positive, default=8, help="turns that the steps are split into")
    parser.add_argument("--cold-l2", action="store_true", help="overwrite the last cache before every step")
    add_trace(parser, "of one more step of every network and engine")
    add_results(parser)


def run_token(options: argparse.Namespace) -> None:
    check_networks(options)
    from slicegpt.bench.commands.token_time import TokenOptions, check_positions, measure_token_times
    from slicegpt.bench.models.devices import current_device
    from slicegpt.bench.models.engines import benchmark_cases, chosen_engines
    from slicegpt.progress import Progress

    networks = networks_of(options)
    cases, skipped = benchmark_cases(networks, chosen_engines(options.engines, options.gguf))
    how = TokenOptions(
        options.tokens,
        options.prompt,
        options.batch,
        options.rounds,
        cold=options.cold_l2,
        traced=options.trace is not None,
    )
    check_positions(cases, how.length, "--prompt, --tokens")
    record = record_of(options, networks[0].device)
    record.content["skipped"] = skipped
    peaks = current_device(networks[0].device)
    record.content["peaks"] = None if peaks is None else vars(peaks)
    with measuring(record, options):
        measure_token_times(cases, how, peaks, record, Progress(), options.trace)
        if networks[0].device.type == "cpu":  # other load may have hidden the peak the first time
            use_higher_bandwidth(record, current_device(networks[0].device))


def use_higher_bandwidth(record, again) -> None:
    """Take the peaks as measured again where that bandwidth is higher."""
    if again.bandwidth > record.content["peaks"]["bandwidth"]:
        record.content["peaks"] = vars(again)
        for row in record.rows:
            row["bandwidth_fraction"] = row["gigabytes_per_second"] / again.bandwidth


def add_throughput(benchmarks) -> None:
    parser = benchmarks.add_parser(
        "throughput",
        help="most tokens per second over all batches",
        description="Doubles the batch until memory is exhausted or throughput drops, refines around the best, and "
        "measures the best batches again in turns.",
        examples=(
            "slicegpt bench throughput --model smollm2-135m --slice 0,0.25 --max-memory 8GB",
            "slicegpt bench throughput --shape llama-2-7b --dtype float16",
        ),
    )
    parser.set_defaults(run=run_throughput)
    add_networks(parser, THROUGHPUT_ENGINES["cpu"], THROUGHPUT_ENGINES["cuda"])
    add_shared(parser, "--seqlen", default=128, help="tokens of a sequence at its end")
    parser.add_argument(
        "--steps",
        type=positive,
        metavar="N",
        help="time N steps in the middle of the sequence (default: all of it on a GPU, 8 on a CPU)",
    )
    parser.add_argument(
        "--max-batch", type=positive, default=1 << 16, metavar="N", help="largest batch to try"
    )
    parser.add_argument(
        "--max-memory",
        type=byte_size,
        metavar="SIZE",
        help="of one network's weights and run: 8GB, 8GiB, 8e9 (default: on a CPU 80 %% of what is free)",
    )
    parser.add_argument("--tolerance", type=fraction, default=0.02, help="changes below it are noise")
    parser.add_argument("--rounds", type=positive, default=3, help="turns of the last measurement")
    add_results(parser)


def run_throughput(options: argparse.Namespace) -> None:
    check_networks(options)
    from slicegpt.bench.commands.throughput import ThroughputOptions, measure_throughput
    from slicegpt.bench.models.engines import benchmark_cases, chosen_engines
    from slicegpt.hardware.memory import free_memory
    from slicegpt.progress import Progress

    networks = networks_of(options)
    device = networks[0].device
    options.engines = options.engines or THROUGHPUT_ENGINES[device.type].split(",")
    cases, skipped = benchmark_cases(networks, chosen_engines(options.engines))
    if device.type == "cpu":  # a GPU says when it is full; a CPU begins to swap, or the process is killed
        options.max_memory = options.max_memory or 0.8 * free_memory(device) or None
        options.steps = options.steps or 8
    record = record_of(options, device)
    record.content["skipped"] = skipped
    how = ThroughputOptions(
        options.seqlen,
        options.steps,
        options.max_batch,
        options.max_memory,
        options.tolerance,
        options.rounds,
    )
    with measuring(record, options):
        measure_throughput(cases, how, record, Progress())


def add_layers(benchmarks) -> None:
    parser = benchmarks.add_parser(
        "layers",
        help="time of every operation of one transformer layer",
        description="Times the operations of one layer where they stand, shortcuts included: dense, 2:4 sparse and "
        "sliced, unfused and fused. The sum is held against the whole layer.",
        examples=(
            "slicegpt bench layers --model smollm2-135m --seqlen 512",
            "slicegpt bench layers --shape llama-2-7b --batch-size 8 --trace layers.json",
        ),
    )
    parser.set_defaults(run=run_layers)
    add_networks(parser, None)
    add_sequences(parser)
    add_shared(parser, "--seqlen", help="tokens of a sequence")
    parser.add_argument(
        "--repeats", type=positive, default=40, help="runs, of which the fastest quarter counts"
    )
    parser.add_argument("--cold-l2", action="store_true", help="overwrite the last cache before every run")
    parser.add_argument(
        "--sparse",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="2:4 sparse weights too, where they run",
    )
    add_trace(parser, "of one run of every variant")
    add_results(parser)


def run_layers(options: argparse.Namespace) -> None:
    check_networks(options)
    from slicegpt.bench.commands.layers import LayersOptions, measure_layers
    from slicegpt.progress import Progress

    networks = networks_of(options)
    record = record_of(options, networks[0].device)
    how = LayersOptions(options.batch, options.seqlen, options.repeats, options.cold_l2, options.sparse)
    with measuring(record, options):
        measure_layers(networks, how, record, Progress(), options.trace)


def add_slicing(benchmarks) -> None:
    parser = benchmarks.add_parser(
        "slicing",
        help="what slicing costs, stage by stage",
        description="Slices a model once and compares every stage with a dense forward pass over the same tokens. "
        "Nothing is kept; --shape takes random weights and tokens. Several GPUs share the tokens: torchrun "
        "--nproc-per-node N -m slicegpt bench slicing ...",
        examples=(
            "slicegpt bench slicing --model smollm2-135m --nsamples 16 --seqlen 512",
            "slicegpt bench slicing --shape llama-1b --nsamples 4 --seqlen 128 --no-refit",
        ),
    )
    parser.set_defaults(run=run_slicing, shared=True)
    parser.add_argument(
        "--model", metavar="M", help="a dense model (default: none; --model or --shape is needed)"
    )
    parser.add_argument(
        "--shape",
        metavar="NAME",
        help="random weights: llama-2-7b, llama-1b, opt-66b, ... (default: none)",
    )
    parser.add_argument("--slice", type=float, default=0.25, metavar="F", help="fraction of columns")
    parser.add_argument(
        "--shortcut", choices=SHORTCUTS, default="compact", help="compact, or the published form, dense"
    )
    add_shared(parser, "--round-to")
    parser.add_argument(
        "--refit", action=argparse.BooleanOptionalAction, default=True, help="as in slicegpt slice"
    )
    # Only its number of tokens matters, so one that is always there.
    add_shared(parser, "--calibration", default="python-reference", help="as in slicegpt slice")
    add_shared(parser, "--nsamples", "--seqlen", "--batch-size")
    add_device(parser)
    add_trace(parser, "of a second run, of one batch,")
    add_results(parser)


def run_slicing(options: argparse.Namespace) -> None:
    check_networks(options)
    from slicegpt.bench.commands.slicing_time import SlicingTimeOptions, measure_slicing

    recipe = Recipe(**{name: value for name, value in vars(options).items() if name in NAMES})
    what, dtype = SlicingTimeOptions(recipe, options.shape), resolve_dtype(options.dtype)
    with shared(options) as (ranks, device, progress):
        record = record_of(options, device)
        with measuring(record, options) if ranks.first else nullcontext():
            measure_slicing(what, dtype, device, record, progress, options.trace, ranks)
