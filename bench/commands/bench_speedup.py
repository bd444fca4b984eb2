"""Whether `--target-speedup` gives what it is asked for: plans by measured times, and how fast networks of them decode.

    python -m slicegpt.bench.commands.bench_speedup --shape smollm2-135m --speedups 1.15,1.3 --json FILE

The runtime is timed once, as `slicegpt slice --target-speedup` does it; for every speed-up that is asked for the plan
is made, and a network of its shape decodes in turns with the dense one. Weights are random: speed depends on shapes.
"""

import argparse
from collections.abc import Iterator, Sequence

import torch

from slicegpt.bench.harness.record import Record
from slicegpt.bench.models.architectures import MODELS, fields_of
from slicegpt.conversion.size_plan import plan_choices
from slicegpt.conversion.speed_plan import dense_config, step_units
from slicegpt.hardware.devices import find_device, find_dtype
from slicegpt.modeling.random_weights import random_model
from slicegpt.recipe import OBJECTIVE, UNIFORM, Recipe
from slicegpt.runtime.speed import tokens_per_second
from slicegpt.runtime.step_times import measure_step_times
from slicegpt.step_times import StepTimes
from slicegpt.table import check_writable, format_table

# At full width, and with columns and their shortcuts.
PLANS = (UNIFORM, OBJECTIVE)


def rows_of(
    fields: dict,
    times: StepTimes,
    speedups: Sequence[float],
    dtype: torch.dtype,
    device: torch.device,
    batch: int,
    tokens: int,
    turns: int,
) -> Iterator[dict]:
    """A row for every speed-up that is asked for, and each of `PLANS`."""
    whole = dense_config(fields)
    dense = random_model(whole, dtype, device)
    prompt = torch.arange(16, device=device).remainder(fields["vocab_size"]).repeat(batch, 1)
    for asked in speedups:
        for allocate in PLANS:
            recipe = Recipe(target_speedup=asked, step_times=str(times), allocate=allocate)
            config = plan_choices(recipe, fields, dtype, device)[0]
            sliced = random_model(config, dtype, device)
            rates = tokens_per_second([dense, sliced], prompt, tokens, turns)
            yield {
                "dtype": str(dtype).removeprefix("torch."),
                "batch": batch,
                "asked": asked,
                "columns": config.boundary_widths[0],
                "neurons": config.neurons[0],
                "planned": step_units(whole, times) / step_units(config, times),
                "measured": rates[1] / rates[0],
                "dense tokens/s": batch * rates[0],
                "sliced tokens/s": batch * rates[1],
            }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=sorted(MODELS), default="smollm2-135m")
    parser.add_argument("--speedups", default="1.15,1.3", metavar="F,...")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--decode-batch", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=32, help="of a turn")
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args(arguments)
    check_writable("--json", options.json)
    device, fields = find_device(options.device), fields_of(options.shape)
    record = Record("speedup", vars(options), device, options.json)
    speedups = [float(one) for one in options.speedups.split(",")]
    rows, measured = [], {}
    for dtype in map(find_dtype, options.dtypes.split(",")):
        times = measure_step_times(fields, dtype, device, options.decode_batch)
        measured[str(dtype).removeprefix("torch.")] = str(times)
        common = dtype, device, options.decode_batch, options.tokens, options.turns
        for row in rows_of(fields, times, speedups, *common):
            rows.append(row)
            record.content["step_times"] = measured
            record.save(rows=rows)
    record.save(complete=True, rows=rows)
    print(format_table(rows, list(rows[0])))


if __name__ == "__main__":
    main()
