"""`slicegpt bench`: what a sliced model gains, against the dense one."""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from .options import add_device, add_json, positive, resolve_device, resolve_dtype

SHORTCUTS = ("compact", "dense")


def fractions(text: str) -> list[float]:
    """An argparse type: slicing fractions, `0,0.25,0.5`."""
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected fractions such as 0,0.25, got {text!r}") from error
    if not all(0 <= value < 1 for value in values):
        raise argparse.ArgumentTypeError(f"fractions must lie in [0, 1), got {text!r}")
    return values


def fraction(text: str) -> float:
    """An argparse type: a number in (0, 1]."""
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must lie in (0, 1], got {value:g}")
    return value


def memory(text: str) -> float:
    """An argparse type: bytes, `8e9` or `8GB`, in powers of 1000."""
    units = {"GB": 1e9, "MB": 1e6, "kB": 1e3}
    unit = next((unit for unit in units if text.endswith(unit)), None)
    value = float(text.removesuffix(unit)) * units[unit] if unit else float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"must be above 0, got {text!r}")
    return value


def names(text: str) -> list[str]:
    """An argparse type: names between commas."""
    return [part for part in text.split(",") if part]


def add_parser(commands) -> None:
    parser = commands.add_parser("bench", help="speed and memory, dense and sliced side by side")
    benchmarks = parser.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    add_token(benchmarks)
    add_throughput(benchmarks)
    add_layers(benchmarks)
    add_predict(benchmarks)
    add_report(benchmarks)


def add_networks(parser: argparse.ArgumentParser, engines: str | None) -> None:
    """What is measured."""
    group = parser.add_argument_group("networks")
    group.add_argument(
        "--model",
        nargs="+",
        default=[],
        metavar="M",
        help="dense models, measured at every --slice, and sliced folders, as they are",
    )
    group.add_argument("--shape", metavar="NAME", help="random weights: llama-2-7b, llama-1b, opt-66b, ...")
    group.add_argument(
        "--slice",
        type=fractions,
        default=[0.0, 0.25],
        metavar="F,...",
        help="0 is the dense model; sliced sizes have random weights, for speed alone (0,0.25)",
    )
    group.add_argument("--shortcut", choices=SHORTCUTS, default="compact")
    group.add_argument(
        "--round-to", type=positive, default=64, metavar="N", help="widths are multiples of N (64)"
    )
    if engines:
        group.add_argument(
            "--engines",
            type=names,
            default=engines.split(","),
            metavar="E,...",
            help=f"of hf, hf-eager, hf-static, hf-compile, plain, plain-compile, fused ({engines})",
        )
    add_device(group)


def add_results(parser: argparse.ArgumentParser) -> None:
    """Where the results go."""
    group = parser.add_argument_group(
        "results", "rewritten as the run goes: an interrupted one keeps what it has"
    )
    add_json(group)
    group.add_argument("--csv", metavar="FILE", help="the rows as CSV, each with device, versions and commit")
    group.add_argument("--plot", metavar="FILE", help="a plot, .png or .svg (extra plot)")


def networks_of(options: argparse.Namespace) -> list:
    from slicegpt.bench.networks import choose_networks
    from slicegpt.schedule import Shape

    shape = Shape(options.shortcut, round_to=options.round_to)
    device, dtype = resolve_device(options.device), resolve_dtype(options.dtype)
    return choose_networks(options.model, options.shape, options.slice, dtype, device, shape)


def settings_of(options: argparse.Namespace) -> dict:
    """The options, as the results record them."""
    unsaid = ("run", "verbose", "command", "benchmark", "json", "csv", "plot")
    return {name: value for name, value in vars(options).items() if name not in unsaid}


def record_of(options: argparse.Namespace, device):
    """The record of a run, once every file it shall write has been found writable."""
    from slicegpt.bench.results import Record, check_writable

    check_writable("--plot", options.plot)
    if options.plot:
        from slicegpt.bench.charts import check_plot

        check_plot("--plot", options.plot)
    return Record(options.benchmark, settings_of(options), device, options.json, options.csv)


@contextmanager
def measuring(record, options: argparse.Namespace) -> Iterator[None]:
    """Print the table at the end, and write the files; also what there is when the run is interrupted."""
    from slicegpt.bench.display import print_summary

    interrupted = False
    try:
        yield
        record.finish()
    except KeyboardInterrupt:
        interrupted = True
        if record.rows:
            record.save()
    if record.rows:
        print_summary(record.content)
        if options.plot:
            from slicegpt.bench.charts import plot_results

            plot_results(record.content, options.plot)
    if interrupted:
        kept = [file for file in (options.json, options.csv) if file] if record.rows else []
        where = f"; {', '.join(kept)} marked incomplete" if kept else ""
        print(f"interrupted: {len(record.rows)} rows are kept{where}", file=sys.stderr)
        raise SystemExit(130)


def add_token(benchmarks) -> None:
    parser = benchmarks.add_parser(
        "token",
        help="time per token while decoding",
        description="Milliseconds per token, the prompt apart. Networks and engines take turns, so that other load "
        "meets them all; every step is waited for.",
    )
    parser.set_defaults(run=run_token)
    add_networks(parser, "hf,hf-compile,plain,fused")
    parser.add_argument("--tokens", type=positive, default=128, help="steps that are timed (128)")
    parser.add_argument("--prompt", type=positive, default=16, metavar="N", help="tokens of the prompt (16)")
    parser.add_argument("--batch", type=positive, default=1, help="sequences (1)")
    parser.add_argument("--rounds", type=positive, default=8, help="turns that the steps are split into (8)")
    parser.add_argument("--cold-l2", action="store_true", help="overwrite the last cache before every step")
    add_results(parser)


def run_token(options: argparse.Namespace) -> None:
    from slicegpt.bench.devices import current_device
    from slicegpt.bench.engines import chosen_engines, pair
    from slicegpt.bench.token_time import TokenOptions, measure_token_times
    from slicegpt.progress import Progress

    networks = networks_of(options)
    cases, skipped = pair(networks, chosen_engines(options.engines))
    record = record_of(options, networks[0].device)
    record.content["skipped"] = skipped
    peaks = current_device(networks[0].device)
    record.content["peaks"] = None if peaks is None else vars(peaks)
    how = TokenOptions(options.tokens, options.prompt, options.batch, options.rounds, cold=options.cold_l2)
    with measuring(record, options):
        measure_token_times(cases, how, peaks, record, Progress())


def add_throughput(benchmarks) -> None:
    parser = benchmarks.add_parser(
        "throughput",
        help="most tokens per second over all batches",
        description="Doubles the batch until memory is exhausted or throughput drops, refines around the best, and "
        "measures the best batches again in turns.",
    )
    parser.set_defaults(run=run_throughput)
    add_networks(parser, "hf,fused")
    parser.add_argument("--seqlen", type=positive, default=128, help="tokens of a sequence at its end (128)")
    parser.add_argument(
        "--steps",
        type=positive,
        metavar="N",
        help="time N steps in the middle of the sequence (all of it on a GPU, 8 on a CPU)",
    )
    parser.add_argument(
        "--max-batch", type=positive, default=1 << 16, metavar="N", help="largest batch to try"
    )
    parser.add_argument(
        "--max-memory",
        type=memory,
        metavar="BYTES",
        help="of one network's weights and run, 8e9 or 8GB (a CPU: 80 %% of what is free)",
    )
    parser.add_argument("--tolerance", type=fraction, default=0.02, help="changes below it are noise (0.02)")
    parser.add_argument("--rounds", type=positive, default=3, help="turns of the last measurement (3)")
    add_results(parser)


def run_throughput(options: argparse.Namespace) -> None:
    from slicegpt.bench.engines import chosen_engines, pair
    from slicegpt.bench.memory import available_bytes
    from slicegpt.bench.throughput import ThroughputOptions, measure_throughput
    from slicegpt.progress import Progress

    networks = networks_of(options)
    cases, skipped = pair(networks, chosen_engines(options.engines))
    device = networks[0].device
    if device.type == "cpu":  # a GPU says when it is full; a CPU begins to swap, or the process is killed
        options.max_memory = options.max_memory or 0.8 * available_bytes(device)
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
    )
    parser.set_defaults(run=run_layers)
    add_networks(parser, None)
    parser.add_argument("--batch", type=positive, default=1, help="sequences (1)")
    parser.add_argument("--seqlen", type=positive, default=2048, help="tokens of a sequence (2048)")
    parser.add_argument("--repeats", type=positive, default=20, help="runs of which medians are taken (20)")
    parser.add_argument("--cold-l2", action="store_true", help="overwrite the last cache before every run")
    parser.add_argument(
        "--trace", metavar="FILE", help="a Chrome trace with named ranges, for ui.perfetto.dev"
    )
    add_results(parser)


def run_layers(options: argparse.Namespace) -> None:
    from slicegpt.bench.layers import LayersOptions, measure_layers
    from slicegpt.bench.results import check_writable
    from slicegpt.progress import Progress

    networks = networks_of(options)
    check_writable("--trace", options.trace)
    record = record_of(options, networks[0].device)
    how = LayersOptions(options.batch, options.seqlen, options.repeats, options.cold_l2)
    with measuring(record, options):
        measure_layers(networks, how, record, Progress(), options.trace)


def add_report(benchmarks) -> None:
    parser = benchmarks.add_parser(
        "report",
        help="the results in a folder as one HTML page",
        description="Collects the JSON results below DIR into one self-contained page with plots (extra plot).",
    )
    parser.set_defaults(run=run_report)
    parser.add_argument("folder", metavar="DIR")
    parser.add_argument("--output", metavar="FILE", help="the page (DIR/report.html)")


def run_report(options: argparse.Namespace) -> None:
    from pathlib import Path

    from slicegpt.bench.report import read_results, render
    from slicegpt.bench.results import check_writable

    output = options.output or str(Path(options.folder) / "report.html")
    results = read_results(options.folder)
    check_writable("--output", output)
    Path(output).write_text(render(results), encoding="utf-8")
    print(f"{output}: {len(results)} results")


def add_predict(benchmarks) -> None:
    parser = benchmarks.add_parser(
        "predict",
        help="time per token and throughput on a device's data sheet",
        description="Predicts decoding in float16 from bytes, operations and memory; nothing is run. "
        "--published compares the method with the published tables instead.",
    )
    parser.set_defaults(run=run_predict)
    parser.add_argument("--published", action="store_true", help="reproduce the paper's tables and the error")
    parser.add_argument(
        "--device", default="h200", help="h100, h200, a100-40, a100-80, rtx-6000, rtx-4090, b200"
    )
    parser.add_argument(
        "--gpus", type=positive, metavar="N", help="the fewest that hold the model, if not given"
    )
    parser.add_argument(
        "--shape", default="llama-2-7b", metavar="MODEL", help="llama-2-7b (default), opt-66b, ..."
    )
    parser.add_argument(
        "--slice", type=fractions, default=[0.0, 0.25], metavar="F,...", help="default 0,0.25"
    )
    parser.add_argument("--shortcut", choices=SHORTCUTS, default="compact")
    parser.add_argument("--runtime", choices=("fused", "eager"), default="fused", help="eager: transformers'")
    parser.add_argument("--batch", type=positive, default=1, help="for the time per token (1)")
    parser.add_argument("--length", type=positive, default=128, help="tokens a sequence at the end (128)")
    parser.add_argument(
        "--efficiency", type=fraction, metavar="E", help="share of the peaks that is reached (0.7, assumed)"
    )
    add_json(parser)


def run_predict(options: argparse.Namespace) -> None:
    from slicegpt.bench import predict
    from slicegpt.bench.devices import device_named
    from slicegpt.table import format_table, write_json

    if options.published:
        tables = {
            "time per token": predict.reproduce_token_times(),
            "throughput": predict.reproduce_throughputs(),
        }
        efficiencies = predict.calibrated_efficiencies()
        for title, rows in tables.items():
            print(f"{title}, published and predicted\n{format_table(rows, list(rows[0]))}\n")
        calibrated = ", ".join(f"{name} {value:.2f}" for name, value in efficiencies.items())
        print(f"One number a device is fitted to these figures, its efficiency: {calibrated}.")
        if options.json:
            write_json(options.json, {"efficiencies": efficiencies, **tables})
        return
    device = device_named(options.device)
    rows = [
        predict.predict(
            options.shape,
            value,
            device,
            options.gpus,
            shortcut=options.shortcut,
            runtime=options.runtime,
            batch=options.batch,
            length=options.length,
            efficiency=options.efficiency,
        )
        for value in options.slice
    ]
    print(format_table(rows, list(rows[0])))
    efficiency = options.efficiency or predict.ASSUMED_EFFICIENCY
    how = "as given" if options.efficiency else "assumed, not measured"
    print(
        f"Predicted from {device.source}; at {efficiency:.0%} of its peaks ({how}); the largest batch is a power of "
        f"two, of {options.length} tokens each. Nothing was measured."
    )
    if options.json:
        settings = {
            name: value for name, value in vars(options).items() if name not in ("run", "json", "verbose")
        }
        write_json(options.json, {"settings": settings, "efficiency": efficiency, "rows": rows})
