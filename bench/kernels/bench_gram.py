"""The covariance `gram_` and the eigensolver against the published way, a float32 product, and the roofline.

    pytest bench/ --benchmark-only
    python -m slicegpt.bench.kernels.bench_gram --json results.json [--quick]

The published way (SliceGPT's code) copies X to float64 and multiplies in full: `X.double().T @ X.double()`.
TFLOP/s count 2·N·D² for every method, so that a triangular product shows its advantage. "bound" is the
roofline time of the method's own arithmetic over the measured time.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

import pytest
import torch
from torch import Tensor

from slicegpt.bench.harness.record import Record
from slicegpt.bench.models.devices import DEVICES, Device, current_device
from slicegpt.ops import cpu_decode, cuda, gram_
from slicegpt.ops.gram import EXPECTED_PLANES, choose, is_supported
from slicegpt.ops.registration import requested_backend
from slicegpt.slicing.eigensolver import leading_eigenvectors
from slicegpt.table import format_table

COLUMNS = (576, 1024, 2048, 4096, 8192)
EIGEN_COLUMNS = (576, 2048, 4096, 8192)
ON_GPU = torch.cuda.is_available()
CLASSES = ("H200", "H100 SXM", "A100 80GB", "A100 40GB", "Quadro RTX 6000", "RTX 4090")


@dataclass(frozen=True)
class Case:
    """X is [tokens, columns] of normal values."""

    tokens: int
    columns: int
    dtype: torch.dtype

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def input(self) -> Tensor:
        device = "cuda" if ON_GPU else "cpu"
        X = torch.empty(self.tokens, self.columns, dtype=self.dtype, device=device)
        generator = torch.Generator(device).manual_seed(0)
        for rows in X.split(1 << 14):  # not all in float32 at once
            rows.copy_(torch.randn(rows.shape, generator=generator, device=device))
        return X


# --- methods ------------------------------------------------------------------------------------------------


def published(X: Tensor) -> Callable[[], object]:
    def run():
        wide = X.double()
        return wide.T @ wide

    return run


def product_in(dtype: torch.dtype) -> Callable[[Tensor], Callable[[], object]]:
    """The full product alone, of an X that was converted before."""

    def prepare(X: Tensor):
        converted = X.to(dtype)
        return lambda: converted.T @ converted

    return prepare


def gram(precision: str, digits: int | None = None) -> Callable[[Tensor], Callable[[], object]]:
    def prepare(X: Tensor):
        C = torch.zeros(X.shape[1], X.shape[1], dtype=torch.float64, device=X.device)
        return lambda: gram_(C, X, precision=precision, digits=digits)

    return prepare


def gram_on(kernel: str) -> Callable[[Tensor], Callable[[], object]]:
    """ "exact" with a kernel that "auto" does not take yet."""

    def prepare(X: Tensor):
        multiply = gram("exact")(X)

        def run():
            before = os.environ.get("SLICEGPT_GRAM_EXACT", "auto")
            os.environ["SLICEGPT_GRAM_EXACT"] = kernel
            try:
                multiply()
            finally:
                os.environ["SLICEGPT_GRAM_EXACT"] = before

        return run

    return prepare


ON_WGMMA = {f"gram_ exact, {kernel}": gram_on(kernel) for kernel in ("wgmma", "wgmma-pairs")}
METHODS = {
    "published": published,
    "float64 product": product_in(torch.float64),
    "float32 product": product_in(torch.float32),
    "gram_ auto": gram("auto"),
    "gram_ fp64": gram("fp64"),
    "gram_ exact": gram("exact"),
    **ON_WGMMA,
    "gram_ exact, 3 digits": gram("exact", 3),
    "gram_ fast": gram("fast"),
}


def methods_for(case: Case) -> list[str]:
    """On a CPU all precisions of `gram_` but "fast" are the same float64 arithmetic: one line of it."""
    if not ON_GPU:
        return ["published", "float64 product", "float32 product", "gram_ fp64", "gram_ fast"]
    capability = torch.cuda.get_device_capability()
    exact = ("gram_ exact", *ON_WGMMA, "gram_ exact, 3 digits")
    precisions = {"gram_ fast": "fast", **dict.fromkeys(exact, "exact")}
    return [
        name
        for name in METHODS
        if is_supported(capability, case.dtype, precisions.get(name, "fp64"))
        and (name not in ON_WGMMA or wgmma_runs())
    ]


def cpu_path() -> str:
    """What `gram_` takes on this CPU: plain PyTorch, or the kernels for an instruction set."""
    backend, _ = choose(requested_backend(), None, torch.float32, COLUMNS[0], "fp64")
    return f"{backend}, {cpu_decode.build_info()['instruction set']}" if backend == "cpu" else backend


def wgmma_runs() -> bool:
    """Whether `gram_` would take the CUDA kernels here, with those on wgmma among them."""
    return requested_backend() in ("auto", "cuda") and cuda.gram_exact_has_wgmma()


def bound_seconds(device: Device, case: Case, method: str) -> float | None:
    """Roofline: what must be multiplied at the peak rate or moved at the peak bandwidth, the longer of both.

    A triangle has half of the full product's operations. The integer planes are written and read once in
    between, which no kernel can overlap with the product that needs them: that time is added.
    """
    full = 2 * case.tokens * case.columns**2
    read = case.tokens * case.columns * case.dtype.itemsize
    moved, planes_moved = read + 2 * 8 * case.columns**2, 0.0
    if method in ("published", "float64 product"):
        arithmetic = full / (device.fp64 * 1e12)
        copy = read + 8 * case.tokens * case.columns if method == "published" else 0
        moved = copy + 8 * case.tokens * case.columns
    elif method == "float32 product":
        arithmetic = full / (device.fp32 * 1e12)
    elif method == "gram_ fp64":
        arithmetic = full / 2 / (device.fp64 * 1e12)
    elif method == "gram_ fast":
        # Half precision on tensor cores; a CPU multiplies in float32.
        arithmetic = full / 2 / ((device.fp32 if device.capability is None else device.half) * 1e12)
    elif method.startswith("gram_ exact") and device.int8:
        # 3 digits are integers of 20 bits: 7 residues, see kernels/gram_exact.py.
        planes = 7 if method.endswith("digits") else EXPECTED_PLANES[case.dtype]
        arithmetic = planes * full / 2 / (device.int8 * 1e12)
        planes_moved = (2 * read + planes * case.tokens * case.columns) / (device.bandwidth * 1e9)
    else:
        return None
    return max(arithmetic, moved / (device.bandwidth * 1e9)) + planes_moved


# --- measuring ----------------------------------------------------------------------------------------------


def milliseconds(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Medians over `repeats` rounds after one warm-up, on a GPU by device events.

    The methods take turns, so that a change of clocks or of other load meets all of them.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(repeats):
        for name, run in runs.items():
            times[name].append(_once(run))
    return {name: statistics.median(of_one) for name, of_one in times.items()}


def _once(run: Callable[[], object]) -> float:
    if not ON_GPU:
        begin = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - begin)
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop)


def extra_bytes(case: Case, method: str) -> int:
    """Peak memory that one call takes beyond its input and (for `gram_`) its C."""
    if ON_GPU:
        run = METHODS[method](case.input())
        run()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(_extra_resident_bytes, case, method).result()


def _extra_resident_bytes(case: Case, method: str) -> int:
    """In a fresh process, whose allocator holds nothing in reserve: growth of the peak resident set."""
    METHODS[method](torch.randn(64, 64).to(case.dtype))()  # loads and starts the BLAS
    run = METHODS[method](case.input())
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak starts from here
    before = _status_bytes("VmRSS")
    result = run()
    del result
    return _status_bytes("VmHWM") - before


def _status_bytes(field: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))


def measure(case: Case, device: Device | None, repeats: int) -> Iterator[dict]:
    X = case.input()
    times = milliseconds({method: METHODS[method](X) for method in methods_for(case)}, repeats)
    del X
    for method, time_ms in times.items():
        bound = bound_seconds(device, case, method) if device else None
        yield {
            "D": case.columns,
            "N": case.tokens,
            "X": case.dtype_name,
            "method": method,
            "ms": time_ms,
            "of published": time_ms / times["published"],
            "TFLOP/s": 2 * case.tokens * case.columns**2 / time_ms / 1e9,
            "bound": f"{100e3 * bound / time_ms:.0f} %" if bound else None,
            "extra MiB": round(extra_bytes(case, method) / 2**20, 1),
        }


def cases(quick: bool) -> list[Case]:
    """What fits: at most a quarter of the GPU's memory for a float64 copy of X; seconds on a CPU."""
    dtypes = (torch.bfloat16, torch.float16, torch.float32) if ON_GPU else (torch.float32, torch.bfloat16)
    chosen = []
    for columns in COLUMNS:
        if ON_GPU:
            tokens = 1 << 18
            while tokens * columns * 8 > torch.cuda.mem_get_info()[1] // 4:
                tokens //= 2
        else:
            tokens = min(1 << 17, (1 << 36) // columns**2 // 1024 * 1024)
        if (quick and columns not in ((2048, 4096) if ON_GPU else (576,))) or tokens < 1024:
            continue
        chosen += [Case(tokens, columns, dtype) for dtype in (dtypes[:2] if quick else dtypes)]
    return chosen


def eigen_sizes(quick: bool) -> list[int]:
    limit = (4096 if quick else 8192) if ON_GPU else (576 if quick else 2048)
    return [size for size in EIGEN_COLUMNS if size <= limit]


def covariance(columns: int) -> Tensor:
    """Activations-like: variances over eight decades, and one massive direction."""
    device = "cuda" if ON_GPU else "cpu"
    generator = torch.Generator(device).manual_seed(0)
    X = torch.randn(2 * columns, columns, dtype=torch.float64, generator=generator, device=device)
    X *= torch.logspace(2, -2, columns, dtype=torch.float64, device=device)
    X[:, 0] *= 1e2
    C = torch.zeros(columns, columns, dtype=torch.float64, device=device)
    gram_(C, X, precision="fp64")
    return C


def measure_eigensolver(columns: int, repeats: int) -> Iterator[dict]:
    C = covariance(columns)
    width = columns * 3 // 4
    solvers = {
        "torch.linalg.eigh": lambda: torch.linalg.eigh(C),
        "leading_eigenvectors, 3/4 of D": lambda: leading_eigenvectors(C, width),
    }
    for name, time_ms in milliseconds(solvers, repeats).items():
        yield {"D": columns, "solver": name, "ms": time_ms}


def closing_table(device: Device | None, rows: list[dict]) -> list[dict]:
    """Predictions at N = 262144, D = 4096, fp16, for each device class, beside what this run measured."""
    case = Case(1 << 18, 4096, torch.float16)
    wanted = (case.columns, case.tokens, case.dtype_name)
    measured = {row["method"]: row["ms"] for row in rows if (row["D"], row["N"], row["X"]) == wanted}
    table = []
    for one in (one for one in DEVICES if one.name in CLASSES):
        here = device is not None and one.name == device.name
        row = {"device": one.name}
        for method in ("gram_ fp64", "gram_ exact", "gram_ fast"):
            row[f"{method}: predicted ms"] = round(1e3 * bound_seconds(one, case, method), 1)
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
    options = parser.parse_args()

    device = current_device()
    if device is None:
        print(f"{torch.cuda.get_device_name()}: peaks not listed in bench/models/devices.py, no bounds")
    else:
        print(f"{device.name}: {device}\n")
    record = Record("gram", vars(options), torch.device("cuda" if ON_GPU else "cpu"), options.json)
    rows, eigen = [], []
    figures = {"peaks": None if device is None else vars(device), "gram": rows, "eigensolver": eigen}
    if not ON_GPU:
        figures["gram_ takes"] = cpu_path()
        print(f"gram_ takes: {figures['gram_ takes']}\n")
    for case in cases(options.quick):
        rows += measure(case, device, options.repeats)
        record.save(**figures)  # an interrupted run keeps what it has, marked incomplete
    print(format_table(rows, list(rows[0])), end="\n\n")
    repeats = min(3, options.repeats)
    for size in eigen_sizes(options.quick):
        eigen += measure_eigensolver(size, repeats)
        record.save()
    print(format_table(eigen, list(eigen[0])), end="\n\n")
    closing = closing_table(device, rows)
    print("262144 tokens of width 4096 in fp16; predicted: the roofline, which no kernel can beat:")
    print(format_table(closing, list(closing[0])))
    record.save(complete=True, predictions=closing)


# --- pytest-benchmark ---------------------------------------------------------------------------------------


def synchronised(run: Callable[[], object]) -> Callable[[], object]:
    def call():
        result = run()
        if ON_GPU:
            torch.cuda.synchronize()
        return result

    return call


@pytest.fixture(scope="module")
def device() -> Device | None:
    return current_device()


# On a CPU only the small sizes: a minute or two.
PAIRS = [(case, method) for case in cases(quick=not ON_GPU) for method in methods_for(case)]


def name_of(value: Case | str) -> str:
    return value if isinstance(value, str) else f"D{value.columns}-N{value.tokens}-{value.dtype_name}"


@pytest.mark.parametrize(("case", "method"), PAIRS, ids=name_of)
def test_gram(benchmark, device, case, method):
    run = METHODS[method](case.input())
    benchmark.pedantic(synchronised(run), rounds=3, warmup_rounds=1)
    seconds = benchmark.stats.stats.median
    bound = bound_seconds(device, case, method) if device else None
    benchmark.extra_info["TFLOP/s"] = 2 * case.tokens * case.columns**2 / seconds / 1e12
    benchmark.extra_info["fraction of bound"] = bound / seconds if bound else None
    if (
        ON_GPU
    ):  # on a CPU it takes a new process each time: `python -m slicegpt.bench.kernels.bench_gram` does
        benchmark.extra_info["extra MiB"] = extra_bytes(case, method) / 2**20


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
