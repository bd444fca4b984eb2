"""What the fused GEMMs may differ by from float64: bounds derived from their arithmetic, for the tests of both."""

import torch
from torch import Tensor

from slicegpt.ops import reference
from slicegpt.ops.contracts import GATED, NormLinearInputs, block_sums_of_squares

U = 2.0**-24  # unit roundoff of float32, in which everything is summed
HALF_ULP = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}
SMALLEST = {
    torch.float16: 2.0**-25,
    torch.bfloat16: 0.0,
    torch.float32: 0.0,
}  # half of the smallest subnormal
# Products cut into three tf32 ones lose 2^-22 of each: 4 U. Tensor cores may truncate where they align: 2 U a sum.
PRODUCT_U = 4


def rounding(value: Tensor, dtype: torch.dtype) -> Tensor:
    return HALF_ULP[dtype] * value.abs() + SMALLEST[dtype]


def sum_error(magnitude: Tensor, terms: int) -> Tensor:
    """Of a float32 sum of `terms` products in any order; `magnitude` is the sum of their absolute values."""
    return (2 * terms + PRODUCT_U) * U * magnitude


def norm_linear_bound(
    h, weight, bias, n_scaled, activation, divisor, eps, product_error: Tensor | float = 0.0
) -> tuple[Tensor, Tensor]:
    """The result in float64, and how far a kernel's may be from it.

    product_error: what the products of the scaled columns may be off by besides, [T, n_scaled].
    """
    exact = [None if t is None else t.double() for t in (h, weight, bias)]
    expected = reference.norm_linear(NormLinearInputs(*exact, None, n_scaled, activation, divisor, eps))
    h64, w64, b64 = exact
    inner = h.shape[1]
    magnitude = h64.abs() @ w64.abs().mT
    scale = (h64.square().sum(1, keepdim=True) / divisor + eps).rsqrt()
    pre_size = magnitude[:, :n_scaled] * scale + (0 if b64 is None else b64.abs())
    # The sum of squares is off by inner · U relative, its root by half of that; the approximate reciprocal root, the
    # product and the bias by a few U more.
    pre_error = (sum_error(magnitude[:, :n_scaled], inner) + product_error) * scale + (
        inner / 2 + 8
    ) * U * pre_size
    # relu, gelu and silu have slopes of at most 1.13, and their own arithmetic is off by a few U of |x| + 1; a square
    # has slopes of 2 |x|, and is off by a few U of itself.
    if activation == "relu2":
        act_error = 2 * (pre_size + pre_error) * pre_error + 16 * U * pre_size.square()
    else:
        act_error = 1.13 * pre_error + 16 * U * (pre_size + 1) * (activation != "none")
    if activation in GATED:
        gate_error, up_error = act_error.chunk(2, dim=1)[0], pre_error.chunk(2, dim=1)[1]
        gate_size, up_size = pre_size.chunk(2, dim=1)
        act_error = gate_error * up_size + up_error * (gate_size + gate_error) + 2 * U * gate_size * up_size
    error = torch.cat((act_error, sum_error(magnitude[:, n_scaled:], inner)), dim=1)
    return expected, error + rounding(expected.abs() + error, h.dtype)


def rotate_add_bound(
    a, weight, h, shortcut, bias, product_error: Tensor | float = 0.0
) -> tuple[Tensor, Tensor]:
    """The next stream in float64, and how far a kernel's may be from it; product_error: as above, [T, d']."""
    exact = [None if t is None else t.double() for t in (a, weight, h, shortcut, bias)]
    expected, _ = reference.rotate_add(*exact)
    sizes = [None if t is None else t.abs() for t in exact]
    magnitude, _ = reference.rotate_add(*sizes)
    error = sum_error(magnitude, a.shape[1] + h.shape[1] + 2) + product_error
    return expected, error + rounding(expected.abs() + error, a.dtype)


def assert_within(actual: Tensor, expected: Tensor, bound: Tensor) -> None:
    assert actual.shape == expected.shape
    assert actual.isfinite().all()
    excess = (actual.double() - expected).abs() - bound
    assert (excess <= 0).all(), f"off by up to {excess.max():.3g} more than the bound"


def assert_sums(sumsq: Tensor, h_next: Tensor) -> None:
    """Sums of 32 squares of the stored values: each square and each addition rounds once."""
    expected = block_sums_of_squares(h_next.double())
    assert sumsq.shape == expected.shape
    assert ((sumsq.double() - expected).abs() <= 33 * U * expected).all()


def normal(*shape: int, dtype: torch.dtype, seed: int, device: str = "cpu") -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(*shape, generator=generator, device=device).to(dtype)
