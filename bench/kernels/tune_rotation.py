"""Measures the launch configurations of the fused Triton GEMMs and writes the winners where the kernels find them.

    python -m slicegpt.bench.kernels.tune_rotation
    python -m slicegpt.bench.kernels.tune_rotation --output tuned.json --models llama-2-7b --rows 512 8192 --seconds 240

Without --output the file beside the kernels is replaced: `kernels/tuned_sm<capability>.json`. Every candidate that the
model of `kernels/gemm_config.py` does not rule out is timed with weights from memory, and the winner again with other
tile orders. Needs a GPU with tensor cores for bfloat16 (sm_80 or newer).
"""

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import replace

import torch
import triton

from slicegpt.bench.harness.columns import SECONDARY
from slicegpt.bench.harness.record import environment
from slicegpt.bench.kernels.bench_rotation import copies_for, medians, sequence
from slicegpt.bench.kernels.rotation_methods import LaunchInputs, fused, make_inputs
from slicegpt.bench.models.shapes import Launch, NormLinearShape, launches
from slicegpt.kernels.gemm_config import (
    DeviceClass,
    GemmConfig,
    candidates,
    predicted_cycles,
    tuned_entry,
    tuned_file,
)
from slicegpt.kernels.gemm_tiles import device_class, is_supported
from slicegpt.table import format_table, write_json

DTYPE = torch.bfloat16
SIZES = ((0.0, "identity"), (0.25, "compact"), (0.25, "dense"))
MODELS = ("llama-2-7b", "llama-2-70b", "opt-13b")
ROWS = (32, 128, 512, 2048, 8192)
GROUPS = (1, 4, 16)
# A candidate whose predicted time is more than so many times the best one's is not measured.
HOPELESS = 3.0


def sizes_of(launch: Launch) -> tuple[str, int, int]:
    """Operator, columns and inner columns, as the configurations count them."""
    if isinstance(launch, NormLinearShape):
        gated = launch.activation.endswith("_gated")
        return "norm_linear_gated" if gated else "norm_linear", launch.columns, launch.inner
    return "rotate_add_dense" if launch.dense else "rotate_add", launch.columns, launch.total_inner


def tune(
    launch: Launch, rows: int, device: DeviceClass, rounds: int
) -> tuple[GemmConfig, float, float | None]:
    """The fastest configuration, its seconds, and the seconds of the one that the model alone would choose."""
    _, columns, inner = sizes_of(launch)
    cycles = {
        config: predicted_cycles(config, device, DTYPE, rows, columns, inner)
        for config in candidates(device, DTYPE)
    }
    least = min(cycles.values())
    configs = [config for config in cycles if cycles[config] <= HOPELESS * least]
    copies = copies_for(launch, rows, DTYPE)
    sets = [make_inputs(launch, rows, DTYPE, torch.device("cuda"), seed) for seed in range(copies)]
    times = _times(configs, launch, sets, rounds)
    winner = min(times, key=times.get)
    times |= _times([replace(winner, group_m=group) for group in GROUPS], launch, sets, rounds)
    winner = min(times, key=times.get)
    return winner, times[winner], times.get(min(cycles, key=cycles.get))


def _times(
    configs: list[GemmConfig], launch: Launch, sets: list[LaunchInputs], rounds: int
) -> dict[GemmConfig, float]:
    runs = {}
    for config in configs:
        try:
            runs[config] = sequence([fused(launch, one, config, triton=True) for one in sets])
        except (triton.OutOfResources, triton.CompilationError) as error:
            print(f"{config}: {type(error).__name__}", file=sys.stderr)
    return {config: seconds / len(sets) for config, seconds in medians(runs, rounds).items()}


def cases(models: list[str], rows: list[int]) -> Iterator[tuple[Launch, int]]:
    """Each operator's sizes once, the largest numbers of rows first: they matter most."""
    seen = set()
    for count in sorted(rows, reverse=True):
        for model in models:
            for size in SIZES:
                for launch in launches(model, *size):
                    key = (*sizes_of(launch), count)
                    if key not in seen:
                        seen.add(key)
                        yield launch, count


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", metavar="FILE", help="instead of the file beside the kernels")
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="start no further shape after so long"
    )
    options = parser.parse_args()
    if not torch.cuda.is_available() or not is_supported(torch.cuda.get_device_capability(), DTYPE):
        parser.error("needs a GPU of compute capability 8.0 or newer")

    device = device_class(torch.device("cuda", torch.cuda.current_device()))
    output = options.output or tuned_file(device.capability)
    facts = environment()
    entries, table, began, skipped = [], [], time.monotonic(), 0
    with torch.inference_mode():
        for launch, rows in cases(options.models, options.rows):
            if time.monotonic() - began > options.seconds:
                skipped += 1
                continue
            op, columns, inner = sizes_of(launch)
            config, seconds, untuned = tune(launch, rows, device, options.rounds)
            entry = tuned_entry(op, DTYPE, rows, columns, inner, config)
            entries.append(entry | {"microseconds": round(1e6 * seconds, 2)})
            table.append(
                {
                    "op": op, "T": rows, "columns": columns, "inner": inner, "us": 1e6 * seconds,
                    "untuned us": 1e6 * untuned if untuned else None,
                    "TFLOP/s": 2 * rows * columns * inner / seconds / 1e12,
                    "tile": f"{config.block_m}x{config.block_n}x{config.block_k}",
                    "warps": config.num_warps, "stages": config.num_stages, "group": config.group_m,
                }
            )  # fmt: skip
            # Written after every shape: an interrupted run keeps its results.
            content = {
                "device": facts["device"],
                "versions": facts["versions"] | {"triton": triton.__version__},
                "date": facts["date"],
                "commit": facts["commit"],
                "entries": entries,
            }
            write_json(output, content)
    print(
        format_table(table, list(table[0]), secondary=SECONDARY["tuned"]) if table else "nothing was measured"
    )
    if skipped:
        print(f"{skipped} shapes were not measured: --seconds {options.seconds:.0f} were over")


if __name__ == "__main__":
    main()
