"""`gram_` and `cross_gram_` on a CPU: kernels that upcast while they pack, and compute one triangle of a covariance.

Arguments are those of `slicegpt.ops`; the tensors are validated. The module, its threads and its instruction sets are
those of `slicegpt.ops.cpu_decode`. The same call gives the same bits, whatever the number of threads.
"""

import torch
from torch import Tensor

from slicegpt.ops import cpu_decode
from slicegpt.ops.cpu_decode import address

# The order is csrc/cpu/gram.h's `Stored`.
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_DTYPE = {dtype: index for index, dtype in enumerate(DTYPES)}

# Plain C++ is slower than a BLAS; the operators do not take it.
SLOW_INSTRUCTION_SETS = ("portable",)

# Multiply-adds that are worth waking a second thread.
PRODUCTS_PER_THREAD = 1 << 18


def is_supported(dtype: torch.dtype, fast: bool) -> bool:
    """Whether the kernels are built, faster here than a BLAS, and take this dtype."""
    if cpu_decode.why_not() is not None or cpu_decode._cpu.instruction_set() in SLOW_INSTRUCTION_SETS:
        return False
    return dtype in DTYPES and not (fast and dtype is torch.float64)


def gram_(C: Tensor, X: Tensor, weight: Tensor | None, fast: bool) -> None:
    """See `slicegpt.ops.gram_`; fast: float32 products and sums of at most 1024 tokens, added up in float64."""
    _run(C, X, X, weight, fast, triangle=True)


def cross_gram_(C: Tensor, A: Tensor, B: Tensor, weight: Tensor | None, fast: bool) -> None:
    """See `slicegpt.ops.cross_gram_`; fast: as in `gram_`."""
    _run(C, A, B, weight, fast, triangle=False)


def _run(C: Tensor, A: Tensor, B: Tensor, weight: Tensor | None, fast: bool, triangle: bool) -> None:
    tokens, rows = A.shape[0], None
    if weight is not None:
        rows, weight = _present(weight.to(torch.float64))
        tokens = tokens if rows is None else len(rows)
    left, right = (cpu_decode._cpu.Columns(X.data_ptr(), *X.stride(), X.shape[1]) for X in (A, B))
    products = tokens * C.numel()
    cpu_decode._cpu.gram(
        left,
        right,
        _DTYPE[A.dtype],
        address(rows),
        address(weight),
        tokens,
        C.data_ptr(),
        triangle,
        fast,
        max(1, min(torch.get_num_threads(), products // PRODUCTS_PER_THREAD)),
    )


def _present(weight: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """(the tokens of other weights than 0, their weights); None for all tokens, and for ones."""
    rows = weight.nonzero()[:, 0]
    present = weight[rows]
    return (None if len(rows) == len(weight) else rows), (None if present.eq(1).all() else present)
