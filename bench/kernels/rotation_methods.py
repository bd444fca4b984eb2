"""The fused GEMMs at real shapes: inputs, the methods to compare, correctness, bytes and operations."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from slicegpt import ops
from slicegpt.bench.models.devices import DevicePeaks
from slicegpt.bench.models.shapes import Launch, NormLinearShape, RotateAddShape
from slicegpt.ops import many_rows, reference, torch_gemm
from slicegpt.ops.contracts import NormLinearInputs, activate, block_sums_of_squares, sumsq_dtype
from slicegpt.ops.cuda import rotate_wgmma
from slicegpt.ops.dispatch import DECODE_ROWS, triton_is_available

EPS = 1e-5
Call = Callable[[], object]


@dataclass
class LaunchInputs:
    """Tensors of one launch; `x` and `w` are those of the plain product of the same sizes, for comparison."""

    tensors: dict[str, Tensor | None]
    x: Tensor
    w: Tensor


def make_inputs(
    launch: Launch, rows: int, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> LaunchInputs:
    """Normal values; weights have variance 1 / inner, so that outputs are as large as inputs."""
    generator = torch.Generator(device).manual_seed(seed)

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device).normal_(0, scale, generator=generator)

    if isinstance(launch, NormLinearShape):
        h = random(rows, launch.inner)
        weight = random(launch.columns, launch.inner, scale=launch.inner**-0.5)
        bias = random(launch.n_scaled) if launch.bias else None
        sumsq = block_sums_of_squares(h.to(sumsq_dtype(dtype)))
        return LaunchInputs({"h": h, "weight": weight, "bias": bias, "sumsq": sumsq}, h, weight)
    scale = launch.total_inner**-0.5
    weight = random(launch.columns, launch.inner, scale=scale)
    shortcut = random(launch.columns, launch.width, scale=scale) if launch.dense else None
    a, h = random(rows, launch.inner), random(rows, launch.width)
    bias = random(launch.columns) if launch.bias else None
    tensors = {"a": a, "weight": weight, "h": h, "shortcut": shortcut, "bias": bias}
    if not launch.dense:
        return LaunchInputs(tensors, a, weight)
    return LaunchInputs(tensors, torch.cat((a, h), dim=1), torch.cat((weight, shortcut), dim=1))


# --- methods ------------------------------------------------------------------------------------------------


def unfused_norm_linear(launch: NormLinearShape) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """Stock RMSNorm, one GEMM for the block's inputs, the activation, and one GEMM for z."""
    n_scaled, activation, inner = launch.n_scaled, launch.activation, launch.inner

    def run(h, weight, bias, sumsq):
        normed = F.rms_norm(h, (inner,), eps=EPS)
        y = activate(F.linear(normed, weight[:n_scaled], bias), activation)
        return y, F.linear(h, weight[n_scaled:]) if launch.z_columns else None

    return run


def unfused_rotate_add(a, weight, h, shortcut, bias):
    """Two GEMMs and an addition, as in the published code; with a compact shortcut one GEMM and an addition."""
    return F.linear(a, weight, bias) + (h if shortcut is None else F.linear(h, shortcut))


def accumulating_rotate_add(a, weight, h, shortcut, bias):
    """The second product accumulates onto the first (`addmm`): the best that plain torch code can do."""
    base = h if shortcut is None else F.linear(h, shortcut)
    if bias is not None:
        base = base + bias
    return torch.addmm(base, a, weight.mT)


def fused(launch: Launch, inputs: LaunchInputs, config=None, triton: bool = False) -> Call:
    """This package's operator; with `triton` its Triton kernel, even where the operator would choose another."""
    arguments = tuple(inputs.tensors.values())
    if isinstance(launch, NormLinearShape):
        arguments += (launch.n_scaled, launch.activation, float(launch.inner), EPS)
        if not triton:
            return lambda: ops.norm_linear(*arguments)
        from slicegpt.kernels.norm_linear import norm_linear

        return lambda: norm_linear(NormLinearInputs(*arguments), config)
    if not triton:
        return lambda: ops.rotate_add(*arguments)
    from slicegpt.kernels.rotate_add import rotate_add

    return lambda: rotate_add(*arguments, config)


def in_one_product(launch: RotateAddShape, inputs: LaunchInputs) -> Call:
    """What the runtime's prefill does where a block is one GEMM of the library (`slicegpt.ops.many_rows`).

    A dense shortcut's sources lie side by side already; else the GEMM accumulates onto a stream of its own, so that
    only the first call's result is `rotate_add`'s. The row scale that the next norm then takes from the stream, and
    not from sums of squares, is part of it.
    """
    t, x, w = inputs.tensors, inputs.x, inputs.w
    out = x.new_empty((len(x), len(w))) if launch.dense else t["h"].clone()

    def run() -> Tensor:
        if launch.dense:
            torch_gemm.one_product(out, x, w, t["bias"])
        else:
            torch_gemm.add_product_(out, x, w, t["bias"])
        row_scale_of(out)
        return out

    return run


def row_scale_of(h: Tensor) -> Tensor:
    """The norm's scale of every row, from the stream itself, as `norm_linear` computes it."""
    if h.is_cuda and triton_is_available():
        from slicegpt.kernels.norm_linear import row_scale

        return row_scale(h, None, float(h.shape[1]), EPS)
    return (h.to(sumsq_dtype(h.dtype)).square().mean(dim=1) + EPS).rsqrt()


def by_wgmma(inputs: LaunchInputs) -> dict[str, Call]:
    """csrc/rotate_wgmma.cu, both kernels, where it runs and can read these tensors.

    Left out where SLICEGPT_ROTATE_PREFILL is `fused`: a kernel that was found wrong may end the process.
    """
    t = inputs.tensors
    arguments = (t["a"], t["weight"], t["h"], t["shortcut"], t["bias"])
    wanted = inputs.x.is_cuda and many_rows.requested() != "fused"
    if not wanted or not rotate_wgmma.takes(*arguments) or not rotate_wgmma.has_wgmma():
        return {}
    return {
        f"fused, {kernel}": lambda kernel=kernel: rotate_wgmma.rotate_add(*arguments, kernel)
        for kernel in rotate_wgmma.KERNELS
    }


def plain_product(inputs: LaunchInputs, triton: bool) -> Call:
    """The GEMM alone, of the same rows, columns and total inner columns, by this package's kernel or the library's."""
    x, w = inputs.x, inputs.w
    if not triton:
        return lambda: F.linear(x, w)
    from slicegpt.kernels.norm_linear import norm_linear

    plain = NormLinearInputs(x, w, None, None, 0, "none", 1.0, EPS)
    return lambda: norm_linear(plain)


def methods(launch: Launch, inputs: LaunchInputs, compiled: bool) -> dict[str, Call]:
    """Name -> call; `compiled` adds torch.compile of the unfused form."""
    norm = isinstance(launch, NormLinearShape)
    unfused = unfused_norm_linear(launch) if norm else unfused_rotate_add
    tensors = inputs.tensors
    runs = {"fused": fused(launch, inputs), "unfused torch": lambda: unfused(**tensors)}
    if not norm:
        runs["unfused, addmm"] = lambda: accumulating_rotate_add(**tensors)
    if compiled:
        optimised = torch.compile(unfused, dynamic=False)
        runs["unfused, torch.compile"] = lambda: optimised(**tensors)
    runs["plain GEMM, library"] = plain_product(inputs, triton=False)
    if not norm and len(inputs.x) > DECODE_ROWS:
        runs["one product, library"] = in_one_product(launch, inputs)
        runs |= by_wgmma(inputs)
    if inputs.x.is_cuda and triton_is_available():
        from slicegpt.kernels.norm_linear import is_supported

        if is_supported(torch.cuda.get_device_capability(inputs.x.device), inputs.x.dtype):
            runs["fused, Triton"] = fused(launch, inputs, triton=True)
            runs["plain GEMM, Triton"] = plain_product(inputs, triton=True)
    return runs


# --- correctness --------------------------------------------------------------------------------------------


def relative_errors(
    launch: Launch, inputs: LaunchInputs, names: list[str], rows: int = 64
) -> dict[str, float]:
    """|result - exact| / |exact| of the named methods against float64, on the first and last rows."""
    runs = methods(launch, inputs, compiled=False)
    ends = torch.cat(
        (torch.arange(min(rows, len(inputs.x))), torch.arange(max(0, len(inputs.x) - rows), len(inputs.x)))
    )
    ends = ends.unique().to(inputs.x.device)
    per_row = ("h", "a", "sumsq")
    exact = {
        name: None if t is None else (t[ends] if name in per_row else t).double()
        for name, t in inputs.tensors.items()
    }
    if isinstance(launch, NormLinearShape):
        settings = (launch.n_scaled, launch.activation, float(launch.inner), EPS)
        expected = reference.norm_linear(NormLinearInputs(*exact.values(), *settings))
    else:
        expected = reference.rotate_add(*exact.values())[0]
    errors = {}
    for name in names:
        result = runs[name]()
        if isinstance(launch, NormLinearShape):
            result = (
                result
                if isinstance(result, Tensor)
                else torch.cat([t for t in result if t is not None], dim=1)
            )
        elif not isinstance(result, Tensor):
            result = result[0]
        errors[name] = ((result[ends].double() - expected).norm() / expected.norm()).item()
    return errors


def is_correct(name: str, errors: dict[str, float], dtype: torch.dtype) -> bool:
    """Whether the error is at most twice the unfused form's, or two units in the last place; false for NaN."""
    return errors[name] <= max(2 * errors["unfused torch"], 2 * torch.finfo(dtype).eps)


# --- the roofline -------------------------------------------------------------------------------------------


def least_bytes(launch: Launch, rows: int, itemsize: int) -> int:
    """Each input is read once and each output written once; sums of squares are float32, one for 32 columns."""
    if isinstance(launch, NormLinearShape):
        elements = launch.columns * launch.inner + rows * (launch.inner + launch.output_columns)
        elements += launch.n_scaled if launch.bias else 0
        return elements * itemsize + 4 * rows * -(-launch.inner // 32)
    elements = launch.columns * launch.total_inner + rows * (launch.inner + launch.width + launch.columns)
    elements += launch.columns if launch.bias else 0
    return elements * itemsize + 4 * rows * -(-launch.columns // 32)


def operations(launch: Launch, rows: int) -> int:
    """Multiplications and additions of the products."""
    inner = launch.total_inner if isinstance(launch, RotateAddShape) else launch.inner
    return 2 * rows * launch.columns * inner


def bound_seconds(launch: Launch, rows: int, dtype: torch.dtype, device: DevicePeaks) -> float:
    """The roofline: no kernel can be faster. float32 products count at the float32 rate."""
    rate = device.fp32 if dtype == torch.float32 else device.half
    moved = least_bytes(launch, rows, dtype.itemsize) / (device.bandwidth * 1e9)
    return max(moved, operations(launch, rows) / (rate * 1e12))
