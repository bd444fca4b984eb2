"""`decode_attention_`: attention of one token a row, from the rows of its projection to what the next GEMM reads."""

import torch
from torch import Tensor

from slicegpt.ops import reference
from slicegpt.ops.contracts import DTYPES, DecodeAttentionInputs
from slicegpt.ops.cuda.decode import decode_device
from slicegpt.ops.dispatch import (
    Dispatcher,
    Implementation,
    capability_of,
    requested_backend,
    triton_is_available,
)
from slicegpt.ops.registration import register


def decode_attention_(
    rows: Tensor,
    keys: Tensor,
    values: Tensor,
    valid: Tensor,
    slot: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    norm: Tensor | None = None,
    heads: int = 1,
    window: int | None = None,
    norm_eps: float = 0.0,
    rotate_first: bool = False,
) -> None:
    """Norm and rotate keys and queries, put keys and values into the cache, and write the attended values over q.

    The number of tokens that the cache holds is on the device, so that a captured call serves every token.

    Args:
        rows: [batch, v | k | q | anything] float16, bfloat16, float32 or float64, `key_heads`, `key_heads` and `heads`
            times head_dim columns and any more; unit column stride. q is overwritten, the columns after it are not.
        keys, values: [batch, key_heads, capacity, head_dim], rows' dtype, of the same strides, that of head_dim 1.
            Position `slot` is written, those after it are not read.
        valid: [batch, capacity] bool, False where the cache holds padding. The new token sees itself in any case.
        slot: [1] int64, below capacity (not checked: it is on the device).
        cos, sin: [batch, 1, rotary_dim], rows' dtype, contiguous, the first half of the sines negative; None without
            rotary positions. The first rotary_dim entries of a head are turned.
        norm: [key_heads + heads, head_dim], rows' dtype, contiguous: scales of an RMSNorm over each head of k and q;
            None without one.
        heads: query heads, a multiple of key_heads.
        window: tokens that a token sees, itself included; None: all.
        norm_eps: epsilon of that norm.
        rotate_first: the norm comes behind the rotation, and not before it.

    Raises:
        SliceGPTError: an argument has the wrong shape, dtype, device or layout. There is no CUDA C++ form of this
            operator: Triton serves CUDA devices from compute capability 7.5 on (bfloat16: from 8.0 on, heads of at most
            256), PyTorch's attention the others.
    """
    _operator(rows, keys, values, valid, slot, cos, sin, norm, heads, window, norm_eps, rotate_first)


def is_supported(
    capability: tuple[int, int] | None, dtype: torch.dtype, head_dim: int, backend: str = "auto"
) -> bool:
    """Whether heads of this size run on a device (None: a CPU) with a backend that is present here."""
    return DISPATCHER.is_supported(backend, capability, dtype, head_dim)


def _triton_takes(capability: tuple[int, int], dtype: torch.dtype, head_dim: int) -> bool:
    if not triton_is_available():
        return False
    from slicegpt.kernels import decode_attention

    return decode_attention.is_supported(capability, dtype, head_dim)


DISPATCHER = Dispatcher(
    "decode_attention_",
    (
        Implementation("triton", _triton_takes, "cuda"),
        Implementation("reference", lambda _, dtype, head_dim: dtype in DTYPES),
    ),
    describe=lambda capability, dtype, head_dim: f"heads of {head_dim}",
)


def _fake(*arguments) -> None:
    DecodeAttentionInputs(*arguments).check()


def _run(*arguments) -> None:
    inputs = DecodeAttentionInputs(*arguments)
    inputs.check()
    rows = inputs.rows
    if rows.shape[0] == 0:
        return
    head_dim = inputs.keys.shape[3]
    if DISPATCHER.choose(requested_backend(), capability_of(rows), rows.dtype, head_dim) == "reference":
        reference.decode_attention_(inputs)
        return
    from slicegpt.kernels import decode_attention

    with torch.cuda.device(rows.device):
        # One more kernel in the chain of those of csrc/decode_*.cu, which overlap.
        decode_attention.decode_attention_(inputs.contiguous(), overlap=decode_device(rows.device).overlap)


_operator = register(
    "decode_attention_(Tensor(a!) rows, Tensor(b!) keys, Tensor(c!) values, Tensor valid, Tensor slot, Tensor? cos, "
    "Tensor? sin, Tensor? norm, int heads, int? window, float norm_eps, bool rotate_first=False) -> ()",
    implementation=_run,
    fake=_fake,
)
