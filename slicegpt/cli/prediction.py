"""`slicegpt bench predict`: what a device can do on paper."""

import argparse

from slicegpt.errors import SliceGPTError

from .benchmark_options import (
    PAPER_DEVICES,
    SHORTCUTS,
    add_sequences,
    check_files,
    check_shape,
    fraction,
    fractions,
    settings_of,
)
from .options import DTYPES, add_json, add_shared, positive, resolve_dtype

# Columns of the published tables that a narrow terminal leaves out, the least important first.
SECONDARY = (
    "own efficiency",
    "cache %",
    "batch that fits",
    "speed-up error %",
    "GPUs predicted",
    "GPUs published",
)


def add_predict(benchmarks) -> None:
    parser = benchmarks.add_parser(
        "predict",
        help="time per token and throughput on a device's data sheet",
        description="Predicts decoding from bytes, operations and memory; no model is run. "
        "--published compares the method with the published tables instead.",
        examples=(
            "slicegpt bench predict --device h100 --shape llama-2-7b --slice 0,0.25",
            "slicegpt bench predict --published",
        ),
    )
    parser.set_defaults(run=run_predict)
    parser.add_argument("--published", action="store_true", help="reproduce the paper's tables and the error")
    parser.add_argument(
        "--device",
        default="h200",
        help="h100, h200, a100-40, a100-80, rtx-6000, rtx-4090, b200; cpu: this one, its peaks measured",
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="of weights and cache; auto: float16, on a CPU float32",
    )
    parser.add_argument(
        "--gpus", type=positive, metavar="N", help="how many (default: the fewest that hold the model)"
    )
    parser.add_argument("--shape", default="llama-2-7b", metavar="MODEL", help="llama-2-7b, opt-66b, ...")
    parser.add_argument(
        "--slice", type=fractions, default=[0.0, 0.25], metavar="F,...", help="0 is the dense model"
    )
    parser.add_argument(
        "--shortcut", choices=SHORTCUTS, default="compact", help="compact, or the published form, dense"
    )
    parser.add_argument("--runtime", choices=("fused", "eager"), default="fused", help="eager: transformers'")
    add_sequences(parser, "sequences, for the time per token")
    add_shared(
        parser,
        "--seqlen",
        former=["--length"],
        dest="length",
        default=128,
        help="tokens of a sequence at its end",
    )
    parser.add_argument(
        "--efficiency",
        type=fraction,
        metavar="E",
        help="share of the peaks that is reached (default: eager as the published figures give it; else 0.7, assumed)",
    )
    add_json(parser)
    parser.add_argument(
        "--csv", metavar="FILE", help="the rows as CSV, each with device, versions and commit"
    )


def run_predict(options: argparse.Namespace) -> None:
    check_files(options)
    if options.published:
        run_published(options)
        return
    on_cpu = options.device == "cpu"
    if not on_cpu and options.device.lower() not in PAPER_DEVICES:
        raise SliceGPTError(
            f"--device: must be one of {', '.join(PAPER_DEVICES)} or cpu, got {options.device!r}"
        )
    if on_cpu and (options.gpus or 1) > 1:
        raise SliceGPTError(f"--gpus: must be 1 (or not given) where --device is cpu, got {options.gpus}")
    check_shape(options.shape)
    import torch

    from slicegpt.bench.commands import predict
    from slicegpt.bench.harness.display import print_summary
    from slicegpt.bench.models.devices import device_named, measured_cpu

    dtype = resolve_dtype(options.dtype) or (torch.float32 if on_cpu else torch.float16)
    device = measured_cpu(half=dtype) if on_cpu else device_named(options.device)
    record = paper_record("predict", options, None if on_cpu else device.name)
    record.content["peaks"] = vars(device)
    efficiency = predict.efficiency_of(device, options.runtime, options.efficiency)
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
            efficiency=efficiency.value,
            itemsize=dtype.itemsize,
        )
        for value in options.slice
    ]
    source = device.source
    if on_cpu:
        rate = device.fp32 if dtype.itemsize == 4 else device.half
        source = f"this CPU's peaks, {source}: {device.bandwidth:.1f} GB/s and {1000 * rate:.0f} GFLOP/s"
    notes = [
        f"Predicted in {str(dtype).removeprefix('torch.')} from {source}.",
        f"Efficiency {efficiency.value:.2f} of the peaks: {efficiency.origin}.",
        f"The largest batch is a power of two, of {options.length} tokens each. No model was run.",
    ]
    record.content["rows"] = rows
    record.save(complete=True, efficiency=vars(efficiency), notes=notes)
    print_summary(record.content)


def run_published(options: argparse.Namespace) -> None:
    from slicegpt.bench.commands import reproduce
    from slicegpt.bench.commands.published import TOKEN_TIMES
    from slicegpt.bench.harness.record import write_csv
    from slicegpt.table import fit_text, format_table

    devices = dict.fromkeys([row.device for row in TOKEN_TIMES] + [reproduce.THROUGHPUT_DEVICE])
    record = paper_record("published", options, ", ".join(devices))
    tables, notes = reproduce.tables(), []
    for title, (rows, own) in tables.items():
        print(f"{title}, published and predicted\n{format_table(rows, list(rows[0]), secondary=SECONDARY)}")
        print(*map(fit_text, own), "", sep="\n")
        notes += own
    notes.append(reproduce.calibration_note())
    print(fit_text(notes[-1]))
    figures = {title: rows for title, (rows, _) in tables.items()}
    record.save(complete=True, efficiencies=reproduce.efficiencies(), notes=notes, **figures)
    if options.csv:
        rows = [
            {"table": title, "device": reproduce.DEVICE_OF.get(title), **row}
            for title, own in figures.items()
            for row in own
        ]
        write_csv(options.csv, rows, record.content["environment"])


def paper_record(name: str, options: argparse.Namespace, device: str | None):
    """A record whose device is the predicted one, and not the machine that did the sums; None is this CPU."""
    import torch

    from slicegpt.bench.harness.record import Record

    record = Record(name, settings_of(options), torch.device("cpu"), options.json, options.csv)
    if device is not None:
        paper = {"device": f"{device} (on paper)", "driver": None, "threads": None, "load_average": None}
        record.content["environment"] |= paper
    return record
