"""The covariance `gram_` against the published method, plain products and the roofline; and the eigensolver.

    pytest bench/ --benchmark-only
    python -m slicegpt.bench.kernels.bench_gram --json results.json [--quick]

The published method (SliceGPT's code) copies X to float64 and multiplies in full: `X.double().T @ X.double()`.
TFLOP/s count 2·N·D² for every method, so that a triangular product shows its advantage. "bound" is the
roofline time of the method's own arithmetic over the measured time.
"""

import argparse
import statistics
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context

import pytest
import torch
from torch import Tensor

from slicegpt.bench.harness.display import print_rows
from slicegpt.bench.harness.memory import bytes_in_use, peak_bytes, release_unused_memory, start_peak
from slicegpt.bench.harness.record import Record
from slicegpt.bench.harness.timing import milliseconds_of, synchronise
from slicegpt.bench.kernels.gram_methods import (
    DEVICE,
    METHODS,
    ON_GPU,
    GramShape,
    bound_seconds,
    methods_for,
)
from slicegpt.bench.models.devices import DEVICES, DevicePeaks, current_device
from slicegpt.ops import gram_
from slicegpt.ops.cpu import extension as cpu_extension
from slicegpt.ops.dispatch import requested_backend
from slicegpt.ops.gram import choose
from slicegpt.slicing.eigensolver import leading_eigenvectors
from slicegpt.table import fit_text

COLUMNS = (576, 1024, 2048, 4096, 8192)
EIGEN_COLUMNS = (576, 2048, 4096, 8192)
CLASSES = ("H200", "H100 SXM", "A100 80GB", "A100 40GB", "Quadro RTX 6000", "RTX 4090")


def cpu_path() -> str:
    """What `gram_` takes on this CPU: plain PyTorch, or the kernels for an instruction set."""
    backend, _ = choose(requested_backend(), None, torch.float32, COLUMNS[0], "fp64")
    return f"{backend}, {cpu_extension.build_info()['instruction set']}" if backend == "cpu" else backend


# --- measuring ----------------------------------------------------------------------------------------------


def median_milliseconds(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Medians over `repeats` rounds after one warm-up, on a GPU by device events.

    The methods take turns, so that a change of clocks or other load affects all of them alike.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(repeats):
        for name, run in runs.items():
            times[name].append(milliseconds_of(run, DEVICE))
    return {name: statistics.median(of_one) for name, of_one in times.items()}


def extra_bytes(shape: GramShape, method: str) -> int:
    """Peak memory that one call takes beyond its input and (for `gram_`) its C."""
    if ON_GPU:
        run = METHODS[method](shape.input())
        run()
        release_unused_memory(DEVICE)
        return _growth_of_peak(run)
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(_extra_resident_bytes, shape, method).result()


def _extra_resident_bytes(shape: GramShape, method: str) -> int:
    """Of the resident set; called in a new process, whose allocator holds nothing in reserve."""
    METHODS[method](torch.randn(64, 64).to(shape.dtype))()  # loads and starts the BLAS
    return _growth_of_peak(METHODS[method](shape.input()))


def _growth_of_peak(run: Callable[[], object]) -> int:
    start_peak(DEVICE)
    before = bytes_in_use(DEVICE)
    run()
    return peak_bytes(DEVICE) - before


def measure(
    shape: GramShape,
    peaks: DevicePeaks | None,
    repeats: int,
    methods: Collection[str] = METHODS,
    memory: bool = True,
) -> Iterator[dict]:
    """A row for every one of `methods` that runs here; with `memory`, what it takes beyond its input."""
    wanted = [method for method in methods_for(shape) if method in methods]
    X = shape.input()
    times = median_milliseconds({method: METHODS[method](X) for method in wanted}, repeats)
    del X
    for method, time_ms in times.items():
        bound = bound_seconds(peaks, shape, method) if peaks else None
        yield {
            "D": shape.columns,
            "N": shape.tokens,
            "X": shape.dtype_name,
            "values": shape.values,
            "method": method,
            "ms": time_ms,
            "of published": time_ms / times["published"] if "published" in times else None,
            "of float64 product": time_ms / times["float64 product"] if "float64 product" in times else None,
            "TFLOP/s": 2 * shape.tokens * shape.columns**2 / time_ms / 1e9,
            "bound": f"{100e3 * bound / time_ms:.0f} %" if bound else None,
            "extra MiB": round(extra_bytes(shape, method) / 2**20, 1) if memory else None,
        }


def shapes(quick: bool, tokens: int | None = None, wanted: Collection[int] | None = None) -> list[GramShape]:
    """The shapes to measure: a float64 copy of X takes at most a quarter of a GPU's memory; seconds on a CPU.

    tokens, wanted: so many tokens, and columns, instead of those.
    """
    dtypes = (torch.bfloat16, torch.float16, torch.float32) if ON_GPU else (torch.float32, torch.bfloat16)
    dtypes = dtypes[:2] if quick else dtypes
    if wanted is None:
        small = (2048, 4096) if ON_GPU else (576,)
        wanted = [columns for columns in COLUMNS if not quick or columns in small]
    chosen = []
    for columns in wanted:
        count = tokens or default_tokens(columns)
        if tokens or count >= 1024:
            chosen += [GramShape(count, columns, dtype) for dtype in dtypes]
    return chosen


def default_tokens(columns: int) -> int:
    """Tokens of an X of so many columns."""
    if not ON_GPU:
        return min(1 << 17, (1 << 36) // columns**2 // 1024 * 1024)
    tokens = 1 << 18
    while tokens * columns * 8 > torch.cuda.mem_get_info()[1] // 4:
        tokens //= 2
    return tokens


def eigen_sizes(quick: bool) -> list[int]:
    limit = (4096 if quick else 8192) if ON_GPU else (576 if quick else 2048)
    return [size for size in EIGEN_COLUMNS if size <= limit]


def covariance(columns: int) -> Tensor:
    """Like that of activations: variances over eight decades, and one massive direction."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    X = torch.randn(2 * columns, columns, dtype=torch.float64, generator=generator, device=DEVICE)
    X *= torch.logspace(2, -2, columns, dtype=torch.float64, device=DEVICE)
    X[:, 0] *= 1e2
    C = torch.zeros(columns, columns, dtype=torch.float64, device=DEVICE)
    gram_(C, X, precision="fp64")
    return C


def measure_eigensolver(columns: int, repeats: int) -> Iterator[dict]:
    C = covariance(columns)
    width = columns * 3 // 4
    solvers = {
        "torch.linalg.eigh": lambda: torch.linalg.eigh(C),
        "leading_eigenvectors, 3/4 of D": lambda: leading_eigenvectors(C, width),
    }
    for name, time_ms in median_milliseconds(solvers, repeats).items():
        yield {"D": columns, "solver": name, "ms": time_ms}


def closing_table(peaks: DevicePeaks | None, rows: list[dict]) -> list[dict]:
    """Predictions at N = 262144, D = 4096, fp16, for each device class, beside this run's measurements."""
    shape = GramShape(1 << 18, 4096, torch.float16)
    wanted = (shape.columns, shape.tokens, shape.dtype_name)
    measured = {
        row["method"]: row["ms"]
        for row in rows
        if (row["D"], row["N"], row["X"]) == wanted and row.get("values") != "heavy"
    }
    table = []
    for one in (one for one in DEVICES if one.name in CLASSES):
        here = peaks is not None and one.name == peaks.name
        row = {"device": one.name}
        for method in ("gram_ fp64", "gram_ exact", "gram_ fast"):
            row[f"{method}: predicted ms"] = round(1e3 * bound_seconds(one, shape, method), 1)
            row[f"{method}: measured ms"] = measured.get(method, "not measured") if here else "not measured"
        table.append(row)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", metavar="FILE", help="also write everything as JSON")
    parser.add_argument("--quick", action="store_true", help="few sizes: about a minute")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--columns", type=int, nargs="+", help="instead of the default ones")
    parser.add_argument("--tokens", type=int, help="instead of as many as take a while")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--values", choices=["normal", "heavy"], default="normal", help="heavy: heavy-tailed")
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True, help="extra MiB")
    parser.add_argument("--eigensolver", action=argparse.BooleanOptionalAction, default=True)
    options = parser.parse_args()

    peaks = current_device()
    if peaks is None:
        print(
            fit_text(
                f"{torch.cuda.get_device_name()}: peaks not listed in bench/models/devices.py, no bounds"
            )
        )
    else:
        print(fit_text(f"{peaks.name}: {peaks}") + "\n")
    record = Record("gram", vars(options), DEVICE, options.json)
    rows, eigen = [], []
    figures = {"peaks": None if peaks is None else vars(peaks), "gram": rows, "eigensolver": eigen}
    if not ON_GPU:
        figures["gram_ takes"] = cpu_path()
        print(f"gram_ takes: {figures['gram_ takes']}\n")
    for shape in shapes(options.quick, options.tokens, options.columns):
        rows += measure(
            replace(shape, values=options.values), peaks, options.repeats, options.methods, options.memory
        )
        record.save(**figures)  # an interrupted run keeps what it has, marked incomplete
    print_rows("gram", rows)
    print()
    repeats = min(3, options.repeats)
    for size in eigen_sizes(options.quick) if options.eigensolver else ():
        eigen += measure_eigensolver(size, repeats)
        record.save()
    if eigen:
        print_rows("eigensolver", eigen)
        print()
    closing = closing_table(peaks, rows)
    print(fit_text("262144 tokens of width 4096 in fp16; predicted: the roofline, which no kernel can beat:"))
    print_rows("gram predictions", closing)
    record.save(complete=True, predictions=closing)


# --- pytest-benchmark ---------------------------------------------------------------------------------------


def synchronised(run: Callable[[], object]) -> Callable[[], object]:
    def call():
        result = run()
        synchronise(DEVICE)
        return result

    return call


@pytest.fixture(scope="module")
def peaks() -> DevicePeaks | None:
    return current_device()


# On a CPU only the small sizes: a minute or two.
PAIRS = [(shape, method) for shape in shapes(quick=not ON_GPU) for method in methods_for(shape)]


def name_of(value: GramShape | str) -> str:
    return value if isinstance(value, str) else f"D{value.columns}-N{value.tokens}-{value.dtype_name}"


@pytest.mark.parametrize(("shape", "method"), PAIRS, ids=name_of)
def test_gram(benchmark, peaks, shape, method):
    run = METHODS[method](shape.input())
    benchmark.pedantic(synchronised(run), rounds=3, warmup_rounds=1)
    seconds = benchmark.stats.stats.median
    bound = bound_seconds(peaks, shape, method) if peaks else None
    benchmark.extra_info["TFLOP/s"] = 2 * shape.tokens * shape.columns**2 / seconds / 1e12
    benchmark.extra_info["fraction of bound"] = bound / seconds if bound else None
    if ON_GPU:  # on a CPU it takes a new process each time, which the command line's form starts
        benchmark.extra_info["extra MiB"] = extra_bytes(shape, method) / 2**20


@pytest.mark.parametrize("columns", eigen_sizes(quick=not ON_GPU))
@pytest.mark.parametrize("solver", ["torch.linalg.eigh", "leading_eigenvectors"])
def test_eigensolver(benchmark, columns, solver):
    C = covariance(columns)
    if solver == "leading_eigenvectors":
        benchmark.pedantic(synchronised(lambda: leading_eigenvectors(C, columns * 3 // 4)), rounds=2)
    else:
        benchmark.pedantic(synchronised(lambda: torch.linalg.eigh(C)), rounds=2)


if __name__ == "__main__":
    main()
