"""What this device reaches at best, measured: the ceilings that every other figure of the same run is held against.

    python -m slicegpt.bench.kernels.ceilings --json ceilings.json

A copy (bytes read and written), reading alone, products in bfloat16, float64 and int8 by the libraries, and cuBLAS's
DSYRK where CuPy is installed: the triangle alone, which torch has no call for. Written after every figure; what cannot
be measured here says why. With SLICEGPT_CEILINGS=FILE the other benchmarks put these figures into their own results.
"""

import argparse
import statistics
from collections.abc import Callable

import torch

from slicegpt.bench.harness.display import print_rows
from slicegpt.bench.harness.record import Record
from slicegpt.bench.harness.timing import milliseconds_of
from slicegpt.errors import first_line

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")


def median_seconds(run: Callable[[], object], repeats: int) -> float:
    """Median of single calls, after two that warm up."""
    for _ in range(2):
        run()
    return statistics.median(milliseconds_of(run, DEVICE) for _ in range(repeats)) / 1e3


def normal(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Normal values: products of zeros draw less power, and so run at higher clocks."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    return torch.randn(rows, columns, generator=generator, device=DEVICE).to(dtype)


def copy_rate(size: int, repeats: int) -> tuple[float, str]:
    """`size` bytes copied within the device's memory, counted twice."""
    source = torch.empty(size, dtype=torch.uint8, device=DEVICE).random_()
    target = torch.empty_like(source)
    return 2 * size / median_seconds(lambda: target.copy_(source), repeats) / 1e9, "GB/s"


def read_rate(size: int, repeats: int) -> tuple[float, str]:
    """A sum over `size` bytes of float32: nothing to speak of is written."""
    values = torch.empty(size // 4, dtype=torch.float32, device=DEVICE).normal_()
    return size / median_seconds(lambda: values.sum(), repeats) / 1e9, "GB/s"


def product_rate(dtype: torch.dtype, size: int, repeats: int) -> tuple[float, str]:
    """A square product of the library's, 2 size³ operations."""
    a, b = normal(size, size, dtype), normal(size, size, dtype)
    return 2 * size**3 / median_seconds(lambda: a @ b, repeats) / 1e12, "TFLOP/s"


def gram_rate(tokens: int, columns: int, repeats: int) -> tuple[float, str]:
    """`XᵀX` in float64 by the library's full product, 2 tokens columns² operations."""
    X = normal(tokens, columns, torch.float64)
    return 2 * tokens * columns**2 / median_seconds(lambda: X.T @ X, repeats) / 1e12, "TFLOP/s"


def syrk_rate(tokens: int, columns: int, repeats: int) -> tuple[float, str]:
    """cuBLAS's DSYRK, operations counted as those of the full product: comparable with `gram_rate`."""
    import cupy
    from cupy.cuda import cublas
    from cupy_backends.cuda.libs import cublas as names

    X = cupy.from_dlpack(normal(tokens, columns, torch.float64))
    C = cupy.zeros((columns, columns))
    one, zero = cupy.ones(1).get(), cupy.zeros(1).get()
    handle = cupy.cuda.device.get_cublas_handle()
    cublas.setStream(handle, torch.cuda.current_stream().cuda_stream)

    def run() -> None:
        # X [tokens, columns] in rows is Xᵀ in cuBLAS's columns: C = Xᵀ X without a transposition.
        cublas.dsyrk(
            handle, names.CUBLAS_FILL_MODE_LOWER, names.CUBLAS_OP_N, columns, tokens,
            one.ctypes.data, X.data.ptr, columns, zero.ctypes.data, C.data.ptr, columns,
        )  # fmt: skip

    seconds = median_seconds(run, repeats)
    expected = float((X[:, 0] * X[:, 0]).sum())
    if not abs(float(C[0, 0]) - expected) <= 1e-9 * expected:
        raise RuntimeError(f"DSYRK gave {float(C[0, 0])!r} where {expected!r} was expected")
    return 2 * tokens * columns**2 / seconds / 1e12, "TFLOP/s"


def int8_rate(size: int, repeats: int) -> tuple[float, str]:
    """`torch._int_mm`: int8 products, int32 sums."""
    a = torch.randint(-127, 128, (size, size), dtype=torch.int8, device=DEVICE)
    b = torch.randint(-127, 128, (size, size), dtype=torch.int8, device=DEVICE).T
    return 2 * size**3 / median_seconds(lambda: torch._int_mm(a, b), repeats) / 1e12, "TOP/s"


def measurements(tiny: bool, repeats: int) -> dict[str, Callable[[], tuple[float, str]]]:
    """Name -> measurement, the most needed first."""
    size, moved = (256, 1 << 22) if tiny else (8192, 4 << 30)
    tokens, columns = (256, 64) if tiny else (1 << 16, 4096)
    return {
        "copy": lambda: copy_rate(moved, repeats),
        "read": lambda: read_rate(moved, repeats),
        "bfloat16 product": lambda: product_rate(torch.bfloat16, size, repeats),
        "float64 product": lambda: gram_rate(tokens, columns, repeats),
        "DSYRK": lambda: syrk_rate(tokens, columns, repeats),
        "int8 product": lambda: int8_rate(size, repeats),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--tiny", action="store_true", help="sizes that show only that it runs")
    options = parser.parse_args()
    record = Record("ceilings", vars(options), DEVICE, options.json)
    for name, measure in measurements(options.tiny, options.repeats).items():
        try:
            value, unit = measure()
            record.rows.append({"ceiling": name, "value": value, "unit": unit, "reason": None})
        except Exception as error:  # one library that fails takes no other figure with it
            reason = f"{type(error).__name__}: {first_line(error)}"
            record.rows.append({"ceiling": name, "value": None, "unit": None, "reason": reason})
        record.save()
    print_rows("ceilings", record.rows)
    record.finish()


if __name__ == "__main__":
    main()
