"""`gram_` and `cross_gram_` on a CPU: kernels that upcast while they pack, and compute one triangle of a covariance.

Arguments are those of `slicegpt.ops`; the tensors are validated. The same call gives the same bits, whatever the number
of threads.
"""

import torch
from torch import Tensor

from slicegpt.ops.contracts import DTYPES, dtype_code
from slicegpt.ops.cpu import extension
from slicegpt.ops.cpu.extension import address, threads_for

# Plain C++ is slower than a BLAS; the operators do not take it.
SLOW_INSTRUCTION_SETS = ("portable",)

# Multiply-adds that are worth waking a second thread.
PRODUCTS_PER_THREAD = 1 << 18


def is_supported(dtype: torch.dtype, fast: bool) -> bool:
    """Whether the kernels are built, faster here than a BLAS, and take this dtype."""
    if not extension.is_available() or extension.module.instruction_set() in SLOW_INSTRUCTION_SETS:
        return False
    return dtype in DTYPES and not (fast and dtype is torch.float64)


def gram_(C: Tensor, X: Tensor, weight: Tensor | None, fast: bool) -> None:
    """See `slicegpt.ops.gram_`; fast: float32 products and sums over runs of tokens, added up in float64.

    A run is 1024 tokens; 2048 where bfloat16 is multiplied as it is (AMX and AVX512-BF16, without weights).
    """
    _run(C, X, X, weight, fast, triangle=True)


def cross_gram_(C: Tensor, A: Tensor, B: Tensor, weight: Tensor | None, fast: bool) -> None:
    """See `slicegpt.ops.cross_gram_`; fast: as in `gram_`."""
    _run(C, A, B, weight, fast, triangle=False)


def _run(C: Tensor, A: Tensor, B: Tensor, weight: Tensor | None, fast: bool, triangle: bool) -> None:
    tokens, rows = A.shape[0], None
    if weight is not None:
        rows, weight = _present(weight.to(torch.float64))
        tokens = tokens if rows is None else len(rows)
    left, right = (extension.module.Columns(X.data_ptr(), *X.stride(), X.shape[1]) for X in (A, B))
    products = tokens * C.numel()
    extension.module.gram(
        left,
        right,
        dtype_code(A.dtype),
        address(rows),
        address(weight),
        tokens,
        C.data_ptr(),
        triangle,
        fast,
        threads_for(products, PRODUCTS_PER_THREAD),
    )


def _present(weight: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """(the tokens of other weights than 0, their weights); None for all tokens, and for ones."""
    rows = weight.nonzero()[:, 0]
    present = weight[rows]
    return (None if len(rows) == len(weight) else rows), (None if present.eq(1).all() else present)
