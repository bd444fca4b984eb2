"""What `bench/gpu.sh` should measure on a GPU, predicted from its data sheet: nothing of it has been measured.

    python -m slicegpt.bench.commands.expected --device h200
    python -m slicegpt.bench.commands.expected --device rtx-6000 --shape phi-2 --slice 0,0.25

The rates are shares of the data sheet's (`kernel_times.COPY_SHARE`, `PRODUCT_SHARE`); beside a measurement, the summary
of `bench/gpu.sh` takes the rates that the same run has reached.
"""

import argparse
from collections.abc import Iterator, Sequence

import torch

from slicegpt.bench.models.architectures import MODELS, sliced_config
from slicegpt.bench.models.devices import ALIASES, DevicePeaks, device_named
from slicegpt.bench.models.kernel_times import Ceilings, attention_seconds, gram_seconds, product_seconds
from slicegpt.bench.models.network_times import heads_of, layer_seconds, shortcut_of, step_seconds
from slicegpt.bench.models.processors import PROCESSORS
from slicegpt.bench.models.shapes import launches
from slicegpt.table import format_table

TITLES = ("what", "predicted", "measured")
NOT_MEASURED = "not measured"
ROWS = (1, 16, 2048, 8192)
BATCHES = (16, 256)
CONTEXTS = (128, 2048, 16384)
SEQLEN = 2048
GRAMS = ("gram_ fp64", "gram_ exact", "gram_ exact, wgmma", "gram_ fast")


def expected(device: DevicePeaks, shape: str, fractions: Sequence[float]) -> Iterator[dict]:
    """A row for every figure."""
    rates = Ceilings.on_paper(device)
    dense = sliced_config(shape, 0.0)
    width = dense.hidden_size
    half = torch.bfloat16 if device.capability >= (8, 0) else torch.float16
    dtype = str(half).removeprefix("torch.")

    def row(what: str, figure: str) -> dict:
        return {"what": what, "predicted": figure, "measured": NOT_MEASURED}

    for name in GRAMS:
        if ("wgmma" in name) <= (device.capability == (9, 0)):
            seconds = gram_seconds(1 << 18, width, half, name, rates)
            yield row(f"{name}, 262144 x {width} {dtype}", f"{1e3 * seconds:.4g} ms")
    for fraction in fractions:
        size = f"{shape}, {100 * fraction:g} % sliced"
        for launch in launches(shape, fraction, shortcut_of(fraction)):
            for rows in ROWS:
                seconds = product_seconds(launch, rows, rates, dtype=half)
                yield row(f"{size}: {launch.part}, {rows} rows", f"{1e6 * seconds:.4g} µs")
        seconds = layer_seconds(shape, fraction, 1, SEQLEN, rates)
        yield row(f"{size}: a layer, {SEQLEN} tokens", f"{1e3 * seconds:.4g} ms")
        seconds = step_seconds(shape, fraction, 1, 64, 128, rates)
        yield row(f"{size}: a token", f"{1e3 * seconds:.4g} ms")
        for batch in BATCHES:
            seconds = step_seconds(shape, fraction, batch, 64, 128, rates)
            yield row(f"{size}: throughput, batch {batch}", f"{batch / seconds:.4g} tokens/s")
    for batch in (1, 16):
        for context in CONTEXTS:
            seconds = attention_seconds(heads_of(dense), batch, context, 2 * context, rates)
            yield row(f"decode attention, batch {batch}, {context} tokens", f"{1e6 * seconds:.4g} µs a layer")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = [alias for alias, name in ALIASES.items() if device_named(name).capability in PROCESSORS]
    parser.add_argument("--device", choices=known, default="h200")
    parser.add_argument("--shape", choices=sorted(MODELS), default="llama-2-7b")
    parser.add_argument("--slice", default="0,0.25,0.5", help="fractions of the columns deleted")
    options = parser.parse_args(arguments)
    fractions = [float(one) for one in options.slice.split(",")]
    print(format_table(list(expected(device_named(options.device), options.shape, fractions)), TITLES))


if __name__ == "__main__":
    main()
