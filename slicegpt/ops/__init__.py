"""The operators: one schema each, and behind it CUDA, Triton, CPU and plain-PyTorch implementations.

To add one, in this order (each file imports only those before it):

1. `contracts.py`: output shapes, and a frozen dataclass of the arguments where a list of them would stand many times.
2. `reference.py`: the operator in plain PyTorch and float64, what tests compare with.
3. Kernels, each with `is_supported(capability, dtype, ...)` and launch configurations from pure functions:
   `kernels/<op>.py` (Triton); `csrc/<op>.cu`, a header and a `bind_...` in `csrc/bindings.cpp`, with a launcher in
   `cuda/<op>.py`; `csrc/cpu/`, with a launcher in `cpu/<op>.py`.
4. `<op>.py`: the documented function, its checks, its `Dispatcher` (`dispatch.py`) and its schema (`registration.py`).
5. This file: export the function.

Tests go beside: tests/ops/test_<op>.py (arithmetic, refused arguments, choice, `opcheck`, `torch.compile`),
tests/kernels and tests/csrc (each kernel against float64, in Triton's interpreter and in the host emulation; what it
compiles to), and a benchmark to bench/kernels/bench_<op>.py.
"""

from slicegpt.ops.cross_gram import cross_gram_
from slicegpt.ops.decode_attention import decode_attention_
from slicegpt.ops.gram import gram_
from slicegpt.ops.norm_linear import norm_linear
from slicegpt.ops.rotate_add import rotate_add

__all__ = ["cross_gram_", "decode_attention_", "gram_", "norm_linear", "rotate_add"]
