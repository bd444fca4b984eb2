"""Methods that compute a covariance: the published one, plain products and `gram_`; and their roofline."""

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from slicegpt.bench.models.devices import DevicePeaks
from slicegpt.ops import gram_
from slicegpt.ops.cuda import gram as cuda_gram
from slicegpt.ops.dispatch import requested_backend
from slicegpt.ops.gram import EXPECTED_PLANES, is_supported

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")


@dataclass(frozen=True)
class GramShape:
    """X is [tokens, columns]: normal values, or heavy-tailed ones as activations have."""

    tokens: int
    columns: int
    dtype: torch.dtype
    values: str = "normal"

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def input(self) -> Tensor:
        X = torch.empty(self.tokens, self.columns, dtype=self.dtype, device=DEVICE)
        generator = torch.Generator(DEVICE).manual_seed(0)
        for rows in X.split(1 << 14):  # not all in float32 at once
            normal = torch.randn(rows.shape, generator=generator, device=DEVICE)
            rows.copy_(normal if self.values == "normal" else self._heavy(normal, generator))
        return X

    def _heavy(self, normal: Tensor, generator: torch.Generator) -> Tensor:
        """Heavy tails: every value times e to the power of a normal one, a few massive columns in some tokens.

        Column scales spread over three decades. One token in 2048 has four columns a thousand times as large, as the
        first tokens of a text have in many models.
        """
        columns = torch.logspace(0, -3, normal.shape[1], device=DEVICE)
        heavy = normal * torch.randn(normal.shape, generator=generator, device=DEVICE).exp() * columns
        heavy[::2048, :: max(1, normal.shape[1] // 4)] *= 1000
        return heavy


def published(X: Tensor) -> Callable[[], object]:
    """A full product of a float64 copy of X."""

    def run():
        wide = X.double()
        return wide.T @ wide

    return run


def product_in(dtype: torch.dtype) -> Callable[[Tensor], Callable[[], object]]:
    """The full product alone, of an X that is already converted."""

    def prepare(X: Tensor):
        converted = X.to(dtype)
        return lambda: converted.T @ converted

    return prepare


def gram(precision: str) -> Callable[[Tensor], Callable[[], object]]:
    def prepare(X: Tensor):
        C = torch.zeros(X.shape[1], X.shape[1], dtype=torch.float64, device=X.device)
        return lambda: gram_(C, X, precision=precision)

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
    "gram_ fast": gram("fast"),
}


def methods_for(shape: GramShape) -> list[str]:
    """The methods available here. On a CPU all precisions of `gram_` but "fast" are the same arithmetic: one line."""
    if not ON_GPU:
        return ["published", "float64 product", "float32 product", "gram_ fp64", "gram_ fast"]
    capability = torch.cuda.get_device_capability()
    exact = ("gram_ exact", *ON_WGMMA)
    precisions = {"gram_ fast": "fast", **dict.fromkeys(exact, "exact")}
    return [
        name
        for name in METHODS
        if is_supported(capability, shape.dtype, precisions.get(name, "fp64"))
        and (name not in ON_WGMMA or wgmma_runs())
    ]


def wgmma_runs() -> bool:
    """Whether `gram_` uses CUDA kernels here, and they include those on wgmma."""
    return requested_backend() in ("auto", "cuda") and cuda_gram.exact_has_wgmma()


def bound_seconds(peaks: DevicePeaks, shape: GramShape, method: str) -> float | None:
    """Roofline: the operations at the peak rate or the bytes at the peak bandwidth, whichever takes longer.

    A triangle has half of the full product's operations. The integer planes are written and read once before the
    product, which cannot overlap with it: that time is added.
    """
    full = 2 * shape.tokens * shape.columns**2
    read = shape.tokens * shape.columns * shape.dtype.itemsize
    moved, planes_moved = read + 2 * 8 * shape.columns**2, 0.0
    if method in ("published", "float64 product"):
        arithmetic = full / (peaks.fp64 * 1e12)
        copy = read + 8 * shape.tokens * shape.columns if method == "published" else 0
        moved = copy + 8 * shape.tokens * shape.columns
    elif method == "float32 product":
        arithmetic = full / (peaks.fp32 * 1e12)
    elif method == "gram_ fp64":
        arithmetic = full / 2 / (peaks.fp64 * 1e12)
    elif method == "gram_ fast":
        # Half precision on tensor cores; a CPU multiplies in float32.
        arithmetic = full / 2 / ((peaks.fp32 if peaks.capability is None else peaks.half) * 1e12)
    elif method.startswith("gram_ exact") and peaks.int8:
        planes = EXPECTED_PLANES["triton" if requested_backend() == "triton" else "cuda"][shape.dtype]
        arithmetic = planes * full / 2 / (peaks.int8 * 1e12)
        planes_moved = (2 * read + planes * shape.tokens * shape.columns) / (peaks.bandwidth * 1e9)
    else:
        return None
    return max(arithmetic, moved / (peaks.bandwidth * 1e9)) + planes_moved
