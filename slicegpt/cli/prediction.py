"""`slicegpt bench predict`: what a device can do on paper."""

import argparse

from .benchmark_options import SHORTCUTS, fraction, fractions
from .options import add_json, positive


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
