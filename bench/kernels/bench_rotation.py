"""`norm_linear` and `rotate_add` at real shapes against unfused torch, torch.compile, plain GEMMs and the roofline.

    python -m slicegpt.bench.kernels.bench_rotation --json results.json
    python -m slicegpt.bench.kernels.bench_rotation --models llama-2-7b --slices 0 0.25 --rows 1 8192
    pytest bench/kernels/bench_rotation.py --benchmark-only
    SLICEGPT_BENCH_MODELS=all pytest bench/kernels/bench_rotation.py --benchmark-only -k "T8192 and fused"

"cold" calls cycle over copies of the inputs that together are four times the last-level cache, so that weights come
from memory, as they do in a model; "warm" calls repeat one copy. On a GPU every method is captured into a CUDA graph:
the figures exclude host time. "of library" is the time over that of the library's GEMM alone, of the same rows, columns
and total K: 1.02 is the goal of `rotate_add` for many rows. "one product, library" is that GEMM as the runtime's
prefill uses it, and the norm's row scale, which it leaves to be computed. "unfused torch" is two GEMMs and an addition
where the shortcut is dense. "bound" is the roofline over the cold time; a CPU's peaks are measured at the start.
Results are compared with float64.

pytest measures all models and sizes on a GPU, until SLICEGPT_BENCH_SECONDS (1800) have passed, and a quick subset on a
CPU; SLICEGPT_BENCH_MODELS names other models, separated by spaces, or all, at all sizes.
"""

import argparse
import os
import shutil
import statistics
import sys
import time
from collections.abc import Iterator
from functools import lru_cache

import pytest
import torch

from slicegpt.bench.harness.display import print_rows
from slicegpt.bench.harness.record import Record
from slicegpt.bench.harness.timing import last_level_cache
from slicegpt.bench.kernels.rotation_methods import (
    Call,
    LaunchInputs,
    bound_seconds,
    is_correct,
    least_bytes,
    make_inputs,
    methods,
    operations,
    relative_errors,
)
from slicegpt.bench.models.devices import DevicePeaks, current_device
from slicegpt.bench.models.shapes import MODELS, SIZES, Launch, NormLinearShape, launches
from slicegpt.table import fit_text

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
ROWS = (1, 4, 16, 512, 8192) if ON_GPU else (1, 16, 128)
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
QUICK_MODELS = ("llama-2-7b",) if ON_GPU else ("smollm2-135m",)
QUICK_SIZES = ((0.0, "identity"), (0.25, "compact"), (0.25, "dense"))
MAX_COPIES = 64 if ON_GPU else 4
ROUND_SECONDS = 0.01


# --- timing -------------------------------------------------------------------------------------------------


def copies_for(launch: Launch, rows: int, dtype: torch.dtype) -> int:
    """The number of input sets such that four times the last-level cache is read before one repeats."""
    bytes_a_call = least_bytes(launch, rows, dtype.itemsize)
    return max(2, min(MAX_COPIES, -(-4 * last_level_cache(DEVICE) // bytes_a_call)))


def sequence(runs: list[Call]) -> Call:
    """One call that does all of `runs`: the replay of a CUDA graph on a GPU."""
    for run in runs:
        run()  # compiles, and allocates workspaces

    def all_of_them():
        for run in runs:
            run()

    if not ON_GPU:
        return all_of_them
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        all_of_them()
    return graph.replay


def seconds_once(run: Call) -> float:
    if not ON_GPU:
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3


def medians(runs: dict[str, Call], rounds: int) -> dict[str, float]:
    """Median seconds; the methods take turns, so that a change of clocks or other load affects all of them alike.

    A turn repeats short calls, up to 50 times, for `ROUND_SECONDS`.
    """
    repeats = {}
    for name, run in runs.items():
        run()
        repeats[name] = max(1, min(50, int(ROUND_SECONDS / max(seconds_once(run), 1e-7))))
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name] += [seconds_once(run) for _ in range(repeats[name])]
    return {name: statistics.median(of_one) for name, of_one in times.items()}


def cold_and_warm(
    launch: Launch, rows: int, dtype: torch.dtype, compiled: bool, rounds: int
) -> dict[str, tuple[float, float]]:
    """Seconds of one call of each method."""
    copies = copies_for(launch, rows, dtype)
    sets = [
        methods(launch, make_inputs(launch, rows, dtype, DEVICE, seed), compiled) for seed in range(copies)
    ]
    cold = {name: sequence([one[name] for one in sets]) for name in sets[0]}
    warm = {name: sequence([sets[0][name]] * copies) for name in sets[0]}
    cold_times, warm_times = medians(cold, rounds), medians(warm, rounds)
    return {name: (cold_times[name] / copies, warm_times[name] / copies) for name in cold}


# --- rows of the table --------------------------------------------------------------------------------------


def measure(
    model: str, size: tuple[float, str], launch: Launch, rows: int, dtype: torch.dtype,
    device: DevicePeaks | None, options,
) -> Iterator[dict]:  # fmt: skip
    times = cold_and_warm(launch, rows, dtype, options.compile, options.rounds)
    inputs = make_inputs(launch, rows, dtype, DEVICE, seed=1000)
    comparable = [name for name in times if not name.startswith("plain") and "compile" not in name]
    errors = relative_errors(launch, inputs, comparable)
    bound = bound_seconds(launch, rows, dtype, device) if device else None
    for name, (cold, warm) in times.items():
        # A kernel of this package is compared with its own plain product: the cost of epilogue and second source.
        plain = times.get("plain GEMM, Triton" if name == "fused, Triton" else "plain GEMM, library")
        yield {
            "model": model,
            "slice": f"{100 * size[0]:.0f} %",
            "shortcut": size[1],
            "part": launch.part,
            "op": "norm_linear" if isinstance(launch, NormLinearShape) else "rotate_add",
            "T": rows,
            "columns": launch.columns,
            "inner": launch.inner if isinstance(launch, NormLinearShape) else launch.total_inner,
            "dtype": str(dtype).removeprefix("torch."),
            "method": name,
            "cold us": 1e6 * cold,
            "warm us": 1e6 * warm,
            "of unfused": cold / times["unfused torch"][0],
            "of plain": cold / plain[0],
            "of library": cold / times["plain GEMM, library"][0],
            "TFLOP/s": operations(launch, rows) / cold / 1e12,
            "GB/s": least_bytes(launch, rows, dtype.itemsize) / cold / 1e9,
            "bound": f"{100 * bound / cold:.0f} %" if bound else None,
            "error": errors.get(name),
            "correct": is_correct(name, errors, dtype) if name in errors else None,
        }


def chosen(options) -> Iterator[tuple[str, tuple[float, str], Launch, int, torch.dtype]]:
    sizes = [
        size for size in SIZES if size[0] in options.slices and size[1] in (*options.shortcuts, "identity")
    ]
    for model in options.models:
        for size in sizes:
            for launch in launches(model, *size):
                for rows in options.rows:
                    yield from ((model, size, launch, rows, getattr(torch, name)) for name in options.dtype)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", metavar="FILE", help="also write everything as JSON")
    parser.add_argument("--models", nargs="+", default=list(QUICK_MODELS), help="of bench/models; or: all")
    parser.add_argument("--slices", nargs="+", type=float, default=[0.0, 0.25])
    parser.add_argument("--shortcuts", nargs="+", choices=["compact", "dense"], default=["compact", "dense"])
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS), help="tokens a call")
    parser.add_argument(
        "--dtype",
        nargs="+",
        choices=["float16", "bfloat16", "float32"],
        default=[str(DTYPE).removeprefix("torch.")],
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="start no further shape after so long"
    )
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=ON_GPU)
    options = parser.parse_args()
    options.models = MODELS if options.models == ["all"] else options.models

    device = current_device()
    known = (
        f"{device.name}: {device}\n"
        if device
        else f"{torch.cuda.get_device_name()}: no peaks known, no bounds"
    )
    print(fit_text(known))
    settings = {name: value for name, value in vars(options).items() if value != float("inf")}
    record = Record("rotation", settings, DEVICE, options.json)
    record.content["peaks"] = None if device is None else vars(device)
    began, rows, skipped = time.monotonic(), record.rows, 0
    with torch.inference_mode():
        for case in chosen(options):
            if time.monotonic() - began > options.seconds:
                skipped += 1
                continue
            rows += measure(*case, device, options)
            record.save()  # an interrupted run keeps what it has, marked incomplete
            torch._dynamo.reset()  # each shape is compiled separately: the limit of recompilations is not reached
    print_rows("rotation", rows)
    if skipped:
        print(f"{skipped} shapes were not measured: --seconds {options.seconds:.0f} were over")
    wrong = [row for row in rows if row["correct"] is False]
    for row in wrong:
        where = f"{row['model']} {row['part']}, T = {row['T']}, {row['method']}"
        print(fit_text(f"WRONG: {where}: error {row['error']:.3g}"))
    record.save(complete=True, not_measured=skipped)
    sys.exit(1 if wrong else 0)


# --- pytest-benchmark ---------------------------------------------------------------------------------------

BEGAN = time.monotonic()
SECONDS = float(os.environ.get("SLICEGPT_BENCH_SECONDS", "1800"))
METHODS = ["fused", "unfused torch", "unfused, addmm", "unfused, torch.compile", "plain GEMM, library"]
METHODS += ["one product, library"]
ROTATE_ADD_ONLY = ("unfused, addmm", "one product, library", "fused, wgmma", "fused, wgmma-pairs")
METHODS += ["fused, Triton", "plain GEMM, Triton", "fused, wgmma", "fused, wgmma-pairs"] if ON_GPU else []


def cases(names: str, on_gpu: bool) -> list[tuple[str, tuple[float, str], Launch, int]]:
    """What pytest measures. names: of models, separated by spaces, or all; empty for the device's default."""
    models = names.split() or ["all" if on_gpu else "quick"]
    chosen_models = {"all": MODELS, "quick": QUICK_MODELS}.get(models[0], models)
    sizes = QUICK_SIZES if models == ["quick"] else SIZES
    return [
        (model, size, launch, rows)
        for model in chosen_models
        for size in sizes
        for launch in launches(model, *size)
        for rows in ROWS
    ]


def name_of(case) -> str:
    model, size, launch, rows = case
    return f"{model}-{100 * size[0]:.0f}-{size[1]}-{launch.part.replace(' ', '_')}-T{rows}"


@lru_cache
def peaks() -> DevicePeaks | None:
    """Measured once on a CPU."""
    return current_device()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", cases(os.environ.get("SLICEGPT_BENCH_MODELS", ""), ON_GPU), ids=name_of)
@torch.inference_mode()
def test_rotation(benchmark, case, method):
    _, _, launch, rows = case
    if time.monotonic() - BEGAN > SECONDS:
        pytest.skip(f"not measured: SLICEGPT_BENCH_SECONDS={SECONDS:.0f} are over")
    compiled = method == "unfused, torch.compile"
    if method in ROTATE_ADD_ONLY and isinstance(launch, NormLinearShape):
        pytest.skip("not for this operator")
    if compiled and not ON_GPU and shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("torch.compile needs a C++ compiler on a CPU")
    device = peaks()
    inputs: LaunchInputs = make_inputs(launch, rows, DTYPE, DEVICE)
    runs = methods(launch, inputs, compiled)
    if method not in runs:
        pytest.skip("not on this device, or not for so few rows")
    run = runs[method]

    def call():
        run()
        if ON_GPU:
            torch.cuda.synchronize()

    benchmark.pedantic(call, rounds=10, warmup_rounds=2)
    benchmark.extra_info["TFLOP/s"] = operations(launch, rows) / benchmark.stats.stats.median / 1e12
    if device:
        bound = bound_seconds(launch, rows, DTYPE, device)
        benchmark.extra_info["fraction of bound"] = bound / benchmark.stats.stats.median
    if compiled:
        torch._dynamo.reset()  # each shape is compiled separately: the limit of recompilations is not reached


if __name__ == "__main__":
    main()
