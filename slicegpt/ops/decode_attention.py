"""`decode_attention_`: attention of one token a row, from the rows of its projection to what the next GEMM reads."""

from functools import lru_cache

import torch
from torch import Tensor

from slicegpt.ops import reference
from slicegpt.ops.registration import (
    bad,
    device_capability,
    device_name,
    logger,
    register,
    requested_backend,
    triton_is_available,
)

OP = "decode_attention_"
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


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
) -> None:
    """Norm and rotate keys and queries, put keys and values into the cache, and write the attended values over q.

    The number of tokens that the cache holds is on the device, so that a captured call serves every token.

    Args:
        rows: [batch, v | k | q | anything] float16, bfloat16, float32 or float64, `key_heads`, `key_heads` and `heads`
            times head_dim columns and any more; unit column stride. q is overwritten, the columns behind it are left.
        keys, values: [batch, key_heads, capacity, head_dim], rows' dtype, of the same strides, that of head_dim 1.
            Position `slot` is written, those behind it are not read.
        valid: [batch, capacity] bool, False where the cache holds padding. The new token sees itself in any case.
        slot: [1] int64, below capacity (not checked: it is on the device).
        cos, sin: [batch, 1, rotary_dim], rows' dtype, contiguous, the first half of the sines negative; None without
            rotary positions. The first rotary_dim entries of a head are turned.
        norm: [key_heads + heads, head_dim], rows' dtype, contiguous: scales of an RMSNorm over each head of k and q;
            None without one.
        heads: query heads, a multiple of key_heads.
        window: tokens that a token sees, itself included; None: all.
        norm_eps: epsilon of that norm.

    Raises:
        SliceGPTError: an argument has the wrong shape, dtype, device or layout. There is no CUDA C++ form of this
            operator: Triton serves CUDA devices from compute capability 8.0 on, PyTorch's attention the others.
    """
    _operator(rows, keys, values, valid, slot, cos, sin, norm, heads, window, norm_eps)


def is_supported(
    capability: tuple[int, int] | None, dtype: torch.dtype, head_dim: int, backend: str = "auto"
) -> bool:
    """Whether heads of this size run on a device (None: a CPU), with the Triton kernel where `backend` is "triton"."""
    if backend != "triton":
        return dtype in DTYPES
    if capability is None or not triton_is_available():
        return False
    from slicegpt.kernels import decode_attention

    return decode_attention.is_supported(capability, dtype, head_dim)


@lru_cache
def choose(backend: str, capability: tuple[int, int] | None, dtype: torch.dtype, head_dim: int) -> str:
    """What will run, "triton" or "reference"; cached, so that each class of calls is logged once."""
    kernel = backend != "reference" and is_supported(capability, dtype, head_dim, "triton")
    name = "triton" if kernel else "reference"
    device = device_name(capability)
    logger.info("%s: %s, heads of %d on %s: %s", OP, dtype, head_dim, device, name)
    return name


def _check(
    rows: Tensor,
    keys: Tensor,
    values: Tensor,
    valid: Tensor,
    slot: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    norm: Tensor | None,
    heads: int,
    window: int | None,
    norm_eps: float,
) -> None:
    """What can be known from the arguments' metadata: also run while tracing."""
    if keys.dim() != 4 or keys.stride(3) != 1:
        raise bad(OP, "keys", "be [batch, key_heads, capacity, head_dim] with unit stride", list(keys.shape))
    batch, key_heads, capacity, head_dim = keys.shape
    if values.shape != keys.shape or values.stride() != keys.stride():
        raise bad(OP, "values", f"have keys' shape {list(keys.shape)} and strides", list(values.shape))
    if heads < 1 or heads % key_heads:
        raise bad(OP, "heads", f"be a multiple of {key_heads} key heads", heads)
    columns = (2 * key_heads + heads) * head_dim
    if rows.dim() != 2 or rows.shape[0] != batch or rows.shape[1] < columns or rows.stride(1) != 1:
        raise bad(OP, "rows", f"be [{batch}, at least {columns}] with unit column stride", list(rows.shape))
    if rows.dtype not in DTYPES:
        raise bad(OP, "rows", "be float16, bfloat16, float32 or float64", rows.dtype)
    if valid.shape != (batch, capacity) or valid.dtype != torch.bool or valid.stride(1) != 1:
        raise bad(OP, "valid", f"be bool [{batch}, {capacity}]", f"{valid.dtype} {list(valid.shape)}")
    if slot.shape != (1,) or slot.dtype != torch.int64:
        raise bad(OP, "slot", "be int64 [1]", f"{slot.dtype} {list(slot.shape)}")
    if (cos is None) != (sin is None):
        raise bad(OP, "sin", "be given where cos is", sin is not None)
    for name, angles in (("cos", cos), ("sin", sin)):
        if angles is None:
            continue
        rotary = angles.shape[-1]
        if angles.shape != (batch, 1, rotary) or rotary % 2 or rotary > head_dim or angles.shape != cos.shape:
            expected = f"be [{batch}, 1, an even number up to {head_dim}], cos and sin alike"
            raise bad(OP, name, expected, list(angles.shape))
    if norm is not None and norm.shape != (key_heads + heads, head_dim):
        raise bad(OP, "norm", f"be [{key_heads + heads}, {head_dim}]", list(norm.shape))
    if window is not None and window < 1:
        raise bad(OP, "window", "be at least 1", window)
    for name, tensor in (("keys", keys), ("values", values), ("cos", cos), ("sin", sin), ("norm", norm)):
        if tensor is not None and tensor.dtype != rows.dtype:
            raise bad(OP, name, f"have rows' dtype {rows.dtype}", tensor.dtype)
    others = {
        "keys": keys,
        "values": values,
        "valid": valid,
        "slot": slot,
        "cos": cos,
        "sin": sin,
        "norm": norm,
    }
    for name, tensor in others.items():
        if tensor is not None and tensor.device != rows.device:
            raise bad(OP, name, f"be on rows' device {rows.device}", tensor.device)


def _run(rows, keys, values, valid, slot, cos, sin, norm, heads, window, norm_eps) -> None:
    _check(rows, keys, values, valid, slot, cos, sin, norm, heads, window, norm_eps)
    if rows.shape[0] == 0:
        return
    capability = device_capability(rows.get_device()) if rows.is_cuda else None
    if choose(requested_backend(), capability, rows.dtype, keys.shape[3]) == "reference":
        reference.decode_attention_(rows, keys, values, valid, slot, cos, sin, norm, heads, window, norm_eps)
        return
    from slicegpt.kernels import decode_attention

    cos, sin, norm = (tensor if tensor is None else tensor.contiguous() for tensor in (cos, sin, norm))
    with torch.cuda.device(rows.device):
        decode_attention.decode_attention_(
            rows, keys, values, valid, slot, cos, sin, norm, heads, window, norm_eps
        )


_operator = register(
    "decode_attention_(Tensor(a!) rows, Tensor(b!) keys, Tensor(c!) values, Tensor valid, Tensor slot, Tensor? cos, "
    "Tensor? sin, Tensor? norm, int heads, int? window, float norm_eps) -> ()",
    implementation=_run,
    fake=_check,
)
