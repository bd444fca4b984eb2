"""`norm_linear` and `rotate_add` with a `PanelWeight`, whose numbers have 8 or 4 bits.

The rows that are multiplied stay what they are outside, 16-bit or float32. The CPU's kernels make int16 of them, with a
scale for every 32 neighbours: they lose at most 0.51 / 32767 of the largest of those, less than a bfloat16 number has
lost before. Where there are no kernels the weight is made dense for every call: right, and slow.
"""

from dataclasses import replace

import torch
from torch import Tensor

from slicegpt.ops import reference, torch_gemm
from slicegpt.ops.contracts import (
    DTYPES,
    NormLinearInputs,
    bad,
    block_sums_of_squares,
    check_alike,
    check_any_dtype,
    rotate_add_outputs,
    sumsq_dtype,
)
from slicegpt.ops.cpu import gemm as cpu_gemm
from slicegpt.ops.dispatch import Dispatcher, Implementation, capability_of, requested_backend
from slicegpt.ops.panels import COLUMNS, ROWS, PanelWeight
from slicegpt.ops.registration import register

SCALE_DTYPES = DTYPES[:3]


def _dispatcher(op: str) -> Dispatcher:
    return Dispatcher(
        op,
        (
            Implementation("cpu", lambda capability, dtype, detail: cpu_gemm.takes_panels(dtype), "cpu"),
            Implementation("torch", lambda capability, dtype, detail: dtype in DTYPES),
            Implementation("reference", lambda capability, dtype, detail: dtype in DTYPES),
        ),
        describe=lambda capability, dtype, bits: f"{bits}-bit weights",
    )


NORM_LINEAR, ROTATE_ADD = _dispatcher("norm_linear_quantized"), _dispatcher("rotate_add_quantized")


def is_supported(capability: tuple[int, int] | None, dtype: torch.dtype) -> bool:
    """Whether kernels read the weights as they are stored on such a device (None: a CPU), for rows of this dtype."""
    return NORM_LINEAR.find("auto", capability, dtype, 8) == "cpu"


def norm_linear(inputs: NormLinearInputs) -> Tensor:
    """`slicegpt.ops.norm_linear` with a `PanelWeight`; `n_scaled` is its quantized rows, `rest` has the z columns."""
    weight = inputs.weight
    if inputs.n_scaled != weight.rows or weight.rest_axis != 0:
        raise bad(NORM_LINEAR.op, "n_scaled", f"be weight's {weight.rows} quantized rows", inputs.n_scaled)
    if inputs.gated != weight.gated:
        expected = f"be gated as its weight is ({weight.gated})"
        raise bad(NORM_LINEAR.op, "activation", expected, repr(inputs.activation))
    return _norm_linear(
        inputs.h, weight.codes, weight.scales, weight.zeros, weight.rows, weight.columns, weight.rest, inputs.bias,
        inputs.sumsq, inputs.activation, inputs.divisor, inputs.eps,
    )  # fmt: skip


def rotate_add(
    a: Tensor, weight: PanelWeight, h: Tensor, shortcut: Tensor | None = None, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`slicegpt.ops.rotate_add` with a `PanelWeight`; `rest` has the columns that z is multiplied with."""
    if weight.gated or (weight.rest is not None and weight.rest_axis != 1):
        raise bad(ROTATE_ADD.op, "weight", "have its rest beside it and no gates", f"gated {weight.gated}")
    return _rotate_add(
        a,
        weight.codes,
        weight.scales,
        weight.zeros,
        weight.rows,
        weight.columns,
        weight.rest,
        h,
        shortcut,
        bias,
    )


def check(op: str, weight: PanelWeight) -> None:
    """Raises SliceGPTError for tensors of a `PanelWeight` that do not belong together."""
    halves = 2 if weight.gated else 1
    panels = halves * -(-weight.rows // halves // ROWS)
    blocks = -(-weight.columns // COLUMNS)
    codes, scales, zeros = weight.codes, weight.scales, weight.zeros
    bytes_of = (ROWS * COLUMNS, ROWS * COLUMNS // 2)
    if codes.dtype != torch.uint8 or codes.dim() != 3 or codes.shape[2] not in bytes_of:
        expected = f"be uint8 [panels, blocks, {' or '.join(map(str, bytes_of))}]"
        raise bad(op, "codes", expected, f"{codes.dtype} {list(codes.shape)}")
    if codes.shape[:2] != (panels, blocks):
        expected = f"be [{panels}, {blocks}] blocks for a weight of {weight.rows} by {weight.columns}"
        raise bad(op, "codes", expected, list(codes.shape))
    if scales.dtype not in SCALE_DTYPES or scales.dim() != 3 or scales.shape[::2] != (panels, ROWS):
        expected = f"be float16, bfloat16 or float32 [{panels}, groups, {ROWS}]"
        raise bad(op, "scales", expected, f"{scales.dtype} {list(scales.shape)}")
    if not 1 <= scales.shape[1] <= blocks or blocks % scales.shape[1]:
        raise bad(
            op, "scales", f"be of groups that divide {blocks} blocks of {COLUMNS} columns", scales.shape[1]
        )
    if zeros is not None and (zeros.dtype != torch.uint8 or zeros.shape != scales.shape or weight.bits != 4):
        raise bad(
            op, "zeros", f"be uint8 {list(scales.shape)}, with 4 bits", f"{zeros.dtype} {list(zeros.shape)}"
        )
    if not all(tensor.is_contiguous() for tensor in weight.tensors()):
        raise bad(op, "weight", "be contiguous", "a strided view")
    check_alike(op, "codes", codes, {"scales": scales, "zeros": zeros, "rest": weight.rest}, dtype=False)


def _norm_linear_inputs(
    h, codes, scales, zeros, rows, columns, rest, bias, sumsq, activation, divisor, eps
) -> NormLinearInputs:
    inputs = NormLinearInputs(h, None, bias, sumsq, rows, activation, divisor, eps)
    weight = PanelWeight(codes, scales, zeros, rows, columns, inputs.gated, rest, 0)
    check(NORM_LINEAR.op, weight)
    # What else there is to check is the same with a weight of this shape.
    replace(inputs, weight=h.new_empty(()).expand(weight.shape)).check()
    check_alike(NORM_LINEAR.op, "h", h, {"rest": rest})
    check_alike(NORM_LINEAR.op, "h", h, {"codes": codes}, dtype=False)
    return replace(inputs, weight=weight)


def _run_norm_linear(*arguments) -> Tensor:
    inputs = _norm_linear_inputs(*arguments)
    h, weight = inputs.h, inputs.weight
    if h.shape[0] == 0 or weight.shape[0] == 0:
        return inputs.output()
    name = NORM_LINEAR.choose(requested_backend(), capability_of(h), h.dtype, weight.bits)
    return norm_linear_by(name, inputs)


def norm_linear_by(name: str, inputs: NormLinearInputs) -> Tensor:
    """Run an implementation of `NORM_LINEAR`."""
    if name == "reference":
        return reference.norm_linear(inputs)
    if name == "torch":
        y = torch_gemm.norm_linear(replace(inputs, weight=inputs.weight.dense(inputs.h.dtype)))
        return y.clone(memory_format=torch.contiguous_format) if inputs.gated else y
    if inputs.h.stride(1) != 1:
        inputs = replace(inputs, h=inputs.h.contiguous())
    bias, sumsq = (None if one is None else one.contiguous() for one in (inputs.bias, inputs.sumsq))
    return cpu_gemm.norm_linear(replace(inputs, bias=bias, sumsq=sumsq))


def _fake_norm_linear(*arguments) -> Tensor:
    return _norm_linear_inputs(*arguments).output()


def _checked_rotate_add(a, codes, scales, zeros, rows, columns, rest, h, shortcut, bias) -> PanelWeight:
    op = ROTATE_ADD.op
    weight = PanelWeight(codes, scales, zeros, rows, columns, False, rest, 1)
    check(op, weight)
    check_any_dtype(op, "a", a)
    if a.dim() != 2 or a.shape[1] != weight.shape[1]:
        raise bad(op, "a", f"be [T, K] for weight's {weight.shape[1]} columns", list(a.shape))
    if rest is not None and rest.shape[0] != rows:
        raise bad(op, "rest", f"be [{rows}, r]", list(rest.shape))
    if h.dim() != 2 or h.shape[0] != a.shape[0]:
        raise bad(op, "h", f"be [T, d] for a's {a.shape[0]} rows", list(h.shape))
    if shortcut is None and h.shape[1] > rows:
        raise bad(op, "h", f"have at most {rows} columns without a shortcut", list(h.shape))
    if shortcut is not None and shortcut.shape != (rows, h.shape[1]):
        raise bad(op, "shortcut", f"be [{rows}, {h.shape[1]}]", list(shortcut.shape))
    if bias is not None and bias.shape != (rows,):
        raise bad(op, "bias", f"be [{rows}]", list(bias.shape))
    check_alike(op, "a", a, {"h": h, "shortcut": shortcut, "bias": bias, "rest": rest})
    check_alike(op, "a", a, {"codes": codes}, dtype=False)
    return weight


def _run_rotate_add(*arguments) -> tuple[Tensor, Tensor]:
    weight = _checked_rotate_add(*arguments)
    a, (h, shortcut, bias) = arguments[0], arguments[-3:]
    if a.shape[0] == 0 or weight.rows == 0:
        return rotate_add_outputs(a, weight)
    name = ROTATE_ADD.choose(requested_backend(), capability_of(a), a.dtype, weight.bits)
    return rotate_add_by(name, a, weight, h, shortcut, bias)


def rotate_add_by(
    name: str, a: Tensor, weight: PanelWeight, h: Tensor, shortcut, bias
) -> tuple[Tensor, Tensor]:
    """Run an implementation of `ROTATE_ADD`."""
    if name == "reference":
        return reference.rotate_add(a, weight, h, shortcut, bias)
    if name == "torch":
        h_next = torch_gemm.rotate(a, weight.dense(a.dtype), h, shortcut, bias)
        return h_next, block_sums_of_squares(h_next.to(sumsq_dtype(a.dtype)))
    a, h = (one if one.stride(1) == 1 else one.contiguous() for one in (a, h))
    shortcut, bias = (None if one is None else one.contiguous() for one in (shortcut, bias))
    return cpu_gemm.rotate_add(a, weight, h, shortcut, bias)


def _fake_rotate_add(*arguments) -> tuple[Tensor, Tensor]:
    return rotate_add_outputs(arguments[0], _checked_rotate_add(*arguments))


_WEIGHT = "Tensor codes, Tensor scales, Tensor? zeros, int rows, int columns, Tensor? rest"
_norm_linear = register(
    f"norm_linear_quantized(Tensor h, {_WEIGHT}, Tensor? bias, Tensor? sumsq, str activation, float divisor, "
    "float eps) -> Tensor",
    implementation=_run_norm_linear,
    fake=_fake_norm_linear,
)
_rotate_add = register(
    f"rotate_add_quantized(Tensor a, {_WEIGHT}, Tensor h, Tensor? shortcut, Tensor? bias) -> (Tensor, Tensor)",
    implementation=_run_rotate_add,
    fake=_fake_rotate_add,
)
