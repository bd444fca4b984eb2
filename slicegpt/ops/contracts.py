"""What all implementations of an operator agree on: dtypes and activations, output shapes, checks of arguments.

Imports no kernel and of the operators only `panels`, so that each of them can import it: the operators, the
reference, the launchers and the Triton kernels. Checks look at metadata alone, and so also run while tracing.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from slicegpt.errors import SliceGPTError
from slicegpt.ops.panels import PanelWeight

# The order is csrc/types.h's `Dtype`.
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
HALF = DTYPES[:2]

# The order is csrc/types.h's `Activation`.
ACTIVATIONS = {
    "none": lambda x: x,
    "relu": torch.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "relu2": lambda x: torch.relu(x).square(),
}
GATED = {f"{name}_gated": ACTIVATIONS[name] for name in ("silu", "gelu", "gelu_tanh")}

_ACTIVATION_CODES = {name: code for code, name in enumerate(ACTIVATIONS)}
_ACTIVATION_CODES |= {name: _ACTIVATION_CODES[name.removesuffix("_gated")] for name in GATED}

# Columns of the stream that one sum of squares covers; csrc/types.h's `kSumColumns`.
SUMSQ_COLUMNS = 32


def dtype_code(dtype: torch.dtype) -> int:
    """csrc/types.h's `Dtype`."""
    return DTYPES.index(dtype)


def activation_code(activation: str) -> int:
    """csrc/types.h's `Activation`; of a gated one, what its gate goes through."""
    return _ACTIVATION_CODES[activation]


def dtype_names(dtypes: Iterable[torch.dtype]) -> str:
    """For messages: "float16, bfloat16"."""
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def activate(pre: Tensor, activation: str) -> Tensor:
    """The activation of [..., n], of n / 2 columns where it is gated: `act(first half) * second half`."""
    if activation in GATED:
        gate, up = pre.chunk(2, dim=-1)
        return GATED[activation](gate) * up
    return ACTIVATIONS[activation](pre)


# --- checks -------------------------------------------------------------------------------------------------


def bad(op: str, argument: str, expected: str, actual: object) -> SliceGPTError:
    """The error to raise for an argument, in one line: `gram_: C must be float64, got torch.float32`."""
    return SliceGPTError(f"{op}: {argument} must {expected}, got {actual}")


def check_any_dtype(op: str, name: str, tensor: Tensor) -> None:
    if tensor.dtype not in DTYPES:
        raise bad(op, name, "be float16, bfloat16, float32 or float64", tensor.dtype)


def check_alike(
    op: str, first: str, like: Tensor, others: Mapping[str, Tensor | None], dtype: bool = True
) -> None:
    """The other tensors are on the first one's device and, with `dtype`, of its dtype."""
    for name, tensor in others.items():
        if dtype and tensor is not None and tensor.dtype != like.dtype:
            raise bad(op, name, f"have {_of(first)} dtype {like.dtype}", tensor.dtype)
        if tensor is not None and tensor.device != like.device:
            raise bad(op, name, f"be on {_of(first)} device {like.device}", tensor.device)


def _of(name: str) -> str:
    return f"{name}'" if name.endswith("s") else f"{name}'s"


def check_sum(op: str, C: Tensor) -> None:
    """The matrix that `gram_` and `cross_gram_` add to; its shape is checked before."""
    if C.dtype != torch.float64:
        raise bad(op, "C", "be float64", C.dtype)
    if not C.is_contiguous():
        raise bad(op, "C", "be contiguous", f"strides {C.stride()}")


def check_precision(
    op: str, precision: str, dtypes_of: Mapping[str, tuple[torch.dtype, ...]], name: str, tensor: Tensor
) -> None:
    """A known precision that takes the tensor's dtype."""
    if precision not in dtypes_of:
        raise bad(op, "precision", f"be one of {', '.join(dtypes_of)}", repr(precision))
    if tensor.dtype not in dtypes_of[precision]:
        names = dtype_names(dtypes_of[precision])
        raise bad(op, name, f"be one of {names} for precision {precision!r}", tensor.dtype)


def check_token_weight(op: str, weight: Tensor | None, name: str, X: Tensor) -> None:
    """One real number for each token of X."""
    if weight is None:
        return
    if weight.dim() != 1 or weight.shape[0] != X.shape[0]:
        raise bad(op, "weight", f"be [N] for {name}'s {X.shape[0]} tokens", list(weight.shape))
    if weight.is_complex():
        raise bad(op, "weight", "be real", weight.dtype)
    check_alike(op, "C", X, {"weight": weight}, dtype=False)


def check_no_overlap(op: str, C: Tensor, others: Mapping[str, Tensor | None]) -> None:
    """No other argument shares memory with what the operator writes."""
    for name, tensor in others.items():
        if tensor is not None and overlap(C, tensor):
            raise bad(op, name, "not share memory with C", "overlapping memory")


def overlap(a: Tensor, b: Tensor) -> bool:
    """Whether the memory ranges that two tensors span intersect (conservative for interleaved views)."""
    if a.numel() == 0 or b.numel() == 0 or a.device != b.device:
        return False
    (a_start, a_end), (b_start, b_end) = _byte_range(a), _byte_range(b)
    return a_start < b_end and b_start < a_end


def _byte_range(tensor: Tensor) -> tuple[int, int]:
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr()
    return start, start + (last + 1) * tensor.element_size()


def _copies_of(tensors: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    """Contiguous copies of those that are not; mostly none."""
    return {
        name: tensor.contiguous()
        for name, tensor in tensors.items()
        if tensor is not None and not tensor.is_contiguous()
    }


# --- norm_linear --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class NormLinearInputs:
    """The arguments of `slicegpt.ops.norm_linear`, in its order; its documentation has shapes and dtypes."""

    h: Tensor
    weight: Tensor | PanelWeight
    bias: Tensor | None
    sumsq: Tensor | None
    n_scaled: int
    activation: str
    divisor: float
    eps: float

    @property
    def gated(self) -> bool:
        return self.activation in GATED

    @property
    def columns(self) -> int:
        """Columns of the output."""
        return norm_linear_columns(self.weight, self.n_scaled, self.activation)

    def output(self) -> Tensor:
        """An empty output."""
        return self.h.new_empty((self.h.shape[0], self.columns))

    def contiguous(self) -> "NormLinearInputs":
        """What the kernels take: rows of consecutive items, and all but h contiguous."""
        others = {"weight": self.weight, "bias": self.bias, "sumsq": self.sumsq}
        copies = _copies_of(others)
        if self.h.stride(1) != 1:
            copies["h"] = self.h.contiguous()
        return replace(self, **copies) if copies else self

    def check(self) -> None:
        """Raises SliceGPTError for an argument of a wrong shape, dtype, device or value."""
        op, h, weight, bias, sumsq = "norm_linear", self.h, self.weight, self.bias, self.sumsq
        n_scaled, activation = self.n_scaled, self.activation
        if h.dim() != 2:
            raise bad(op, "h", "be [T, d]", list(h.shape))
        check_any_dtype(op, "h", h)
        if weight.dim() != 2 or weight.shape[1] != h.shape[1]:
            raise bad(op, "weight", f"be [N, d] for h's {h.shape[1]} columns", list(weight.shape))
        if not 0 <= n_scaled <= weight.shape[0]:
            raise bad(op, "n_scaled", f"be 0 to weight's {weight.shape[0]} rows", n_scaled)
        if activation not in ACTIVATIONS and activation not in GATED:
            raise bad(op, "activation", f"be one of {', '.join((*ACTIVATIONS, *GATED))}", repr(activation))
        if self.gated and n_scaled % 2:
            raise bad(op, "n_scaled", f"be even for {activation!r}", n_scaled)
        if bias is not None and (bias.dim() != 1 or bias.shape[0] != n_scaled):
            raise bad(op, "bias", f"be [n_scaled] = [{n_scaled}]", list(bias.shape))
        check_alike(op, "h", h, {"weight": weight, "bias": bias})
        if sumsq is not None and (sumsq.dim() != 2 or sumsq.shape[0] != h.shape[0]):
            raise bad(op, "sumsq", f"be [T, P] for h's {h.shape[0]} rows", list(sumsq.shape))
        if sumsq is not None and sumsq.dtype != sumsq_dtype(h.dtype):
            raise bad(op, "sumsq", f"be {sumsq_dtype(h.dtype)} for a stream of {h.dtype}", sumsq.dtype)
        if not self.divisor > 0:
            raise bad(op, "divisor", "be above 0", self.divisor)
        if not self.eps >= 0:
            raise bad(op, "eps", "be at least 0", self.eps)
        check_alike(op, "h", h, {"sumsq": sumsq}, dtype=False)


def norm_linear_columns(weight: Tensor | PanelWeight, n_scaled: int, activation: str) -> int:
    """Columns of `norm_linear`'s output: a gate and its values make one."""
    return weight.shape[0] - (n_scaled // 2 if activation in GATED else 0)


# --- rotate_add ---------------------------------------------------------------------------------------------


def rotate_add_outputs(a: Tensor, weight: Tensor | PanelWeight) -> tuple[Tensor, Tensor]:
    """Empty outputs of `rotate_add`: the next stream, and its sums of squares."""
    h_next = a.new_empty((a.shape[0], weight.shape[0]))
    return h_next, sumsq_output(h_next)


def sumsq_output(h: Tensor) -> Tensor:
    """An empty [T, ceil(d / 32)] for the sums of squares of a stream [T, d]."""
    blocks = (h.shape[1] + SUMSQ_COLUMNS - 1) // SUMSQ_COLUMNS
    return h.new_empty((h.shape[0], blocks), dtype=sumsq_dtype(h.dtype))


def block_sums_of_squares(h: Tensor) -> Tensor:
    """[T, d] -> [T, ceil(d / 32)]: the sum of squares over every 32 columns, in h's dtype."""
    padded = F.pad(h, (0, -h.shape[1] % SUMSQ_COLUMNS))
    return padded.square().unflatten(1, (-1, SUMSQ_COLUMNS)).sum(dim=2)


def sumsq_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of the sums of squares of a stream: float32, float64 for a float64 stream."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# --- decode_attention_ --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class DecodeAttentionInputs:
    """The arguments of `slicegpt.ops.decode_attention_`, in its order; its documentation has shapes and dtypes."""

    rows: Tensor
    keys: Tensor
    values: Tensor
    valid: Tensor
    slot: Tensor
    cos: Tensor | None
    sin: Tensor | None
    norm: Tensor | None
    heads: int
    window: int | None
    norm_eps: float
    rotate_first: bool = False

    def contiguous(self) -> "DecodeAttentionInputs":
        """What the kernel takes: contiguous angles and scales."""
        copies = _copies_of({"cos": self.cos, "sin": self.sin, "norm": self.norm})
        return replace(self, **copies) if copies else self

    def check(self) -> None:
        """Raises SliceGPTError for an argument of a wrong shape, dtype, device or value."""
        op, rows, keys, values, heads = "decode_attention_", self.rows, self.keys, self.values, self.heads
        if keys.dim() != 4 or keys.stride(3) != 1:
            expected = "be [batch, key_heads, capacity, head_dim] with unit stride"
            raise bad(op, "keys", expected, list(keys.shape))
        batch, key_heads, capacity, head_dim = keys.shape
        if values.shape != keys.shape or values.stride() != keys.stride():
            raise bad(op, "values", f"have keys' shape {list(keys.shape)} and strides", list(values.shape))
        if heads < 1 or heads % key_heads:
            raise bad(op, "heads", f"be a multiple of {key_heads} key heads", heads)
        columns = (2 * key_heads + heads) * head_dim
        if rows.dim() != 2 or rows.shape[0] != batch or rows.shape[1] < columns or rows.stride(1) != 1:
            expected = f"be [{batch}, at least {columns}] with unit column stride"
            raise bad(op, "rows", expected, list(rows.shape))
        check_any_dtype(op, "rows", rows)
        valid, slot = self.valid, self.slot
        if valid.shape != (batch, capacity) or valid.dtype != torch.bool or valid.stride(1) != 1:
            raise bad(op, "valid", f"be bool [{batch}, {capacity}]", f"{valid.dtype} {list(valid.shape)}")
        if slot.shape != (1,) or slot.dtype != torch.int64:
            raise bad(op, "slot", "be int64 [1]", f"{slot.dtype} {list(slot.shape)}")
        self._check_angles(batch, head_dim)
        if self.norm is not None and self.norm.shape != (key_heads + heads, head_dim):
            raise bad(op, "norm", f"be [{key_heads + heads}, {head_dim}]", list(self.norm.shape))
        if self.window is not None and self.window < 1:
            raise bad(op, "window", "be at least 1", self.window)
        same = {"keys": keys, "values": values, "cos": self.cos, "sin": self.sin, "norm": self.norm}
        check_alike(op, "rows", rows, same)
        check_alike(op, "rows", rows, {"valid": valid, "slot": slot}, dtype=False)

    def _check_angles(self, batch: int, head_dim: int) -> None:
        op, cos, sin = "decode_attention_", self.cos, self.sin
        if (cos is None) != (sin is None):
            raise bad(op, "sin", "be given where cos is", sin is not None)
        for name, angles in (("cos", cos), ("sin", sin)):
            if angles is None:
                continue
            rotary = angles.shape[-1]
            if (
                angles.shape != (batch, 1, rotary)
                or rotary % 2
                or rotary > head_dim
                or angles.shape != cos.shape
            ):
                expected = f"be [{batch}, 1, an even number up to {head_dim}], cos and sin alike"
                raise bad(op, name, expected, list(angles.shape))
