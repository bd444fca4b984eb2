"""The CPU's epilogues after its library's GEMM, with every instruction set of this processor, against float64."""

import pytest
import torch
from support.gemm_bounds import (
    HALF_ULP,
    assert_sums,
    assert_within,
    norm_linear_bound,
    normal,
    rotate_add_bound,
)

from slicegpt.ops import norm_linear, rotate_add
from slicegpt.ops.contracts import GATED, NormLinearInputs
from slicegpt.ops.cpu import epilogue, extension, gemm
from slicegpt.ops.dispatch import GemmDispatcher

pytestmark = pytest.mark.skipif(extension.why_not() is not None, reason=str(extension.why_not()))

EPILOGUES = [
    "none",
    "relu",
    "gelu",
    "gelu_tanh",
    "silu",
    "relu2",
    "silu_gated",
    "gelu_gated",
    "gelu_tanh_gated",
]


def product_rounding(h, weight, bias, n_scaled, activation):
    """What rounding the product to bfloat16 moves the result by: half a unit of each, times the slopes after it.

    Scaled products of these inputs stay below 8 and their activations' slopes below 1.13, a square's below 16; a gate
    and its values move each other's error by less than 8.
    """
    product = h.double() @ weight.double().mT
    scale = (h.double().square().sum(1, keepdim=True) / 90.0 + 1e-5).rsqrt()
    error = HALF_ULP[torch.bfloat16] * product.abs()
    scaled, plain = error[:, :n_scaled] * scale, error[:, n_scaled:]
    if activation in GATED:
        gate, up = scaled.chunk(2, dim=1)
        scaled = 8 * (1.13 * gate + up)
    return torch.cat(((16 if activation == "relu2" else 1.13) * scaled, plain), dim=1)


@pytest.mark.parametrize("dtype", epilogue.DTYPES)
@pytest.mark.parametrize("rows", [1, 7, 70])
def test_norm_linear(instruction_set, rows, dtype):
    """Columns below, at and beyond a vector; some, all or none of them scaled; bias and sums given or not."""
    for d, N, n_scaled in ((67, 53, 30), (40, 150, 132), (33, 20, 0), (64, 64, 64)):
        h = normal(rows, d, dtype=dtype, seed=0)
        weight = (normal(N, d, dtype=torch.float32, seed=1) / d**0.5).to(dtype)
        bias, sums = normal(n_scaled, dtype=dtype, seed=2), h.float().square()
        for activation in EPILOGUES:
            for extra in ((None, None), (bias, sums)):
                actual = epilogue.norm_linear(
                    NormLinearInputs(h, weight, *extra, n_scaled, activation, 90.0, 1e-5)
                )
                expected, bound = norm_linear_bound(h, weight, extra[0], n_scaled, activation, 90.0, 1e-5)
                if dtype is torch.bfloat16:
                    bound = bound + product_rounding(h, weight, extra[0], n_scaled, activation)
                assert_within(actual, expected, bound)


@pytest.mark.parametrize("rows", [1, 3, 70])
def test_rotate_add(instruction_set, rows):
    """Dense shortcuts, and none to a boundary as wide or wider; with and without bias."""
    for K, N, d in ((50, 67, 67), (1, 90, 67), (64, 45, 67)):
        a, weight = normal(rows, K, dtype=torch.float32, seed=0), normal(N, K, dtype=torch.float32, seed=1)
        h, dense = normal(rows, d, dtype=torch.float32, seed=2), normal(N, d, dtype=torch.float32, seed=3)
        for shortcut in (dense, None) if d <= N else (dense,):
            for bias in (None, normal(N, dtype=torch.float32, seed=4)):
                h_next, sums = epilogue.rotate_add(a, weight, h, shortcut, bias)
                assert_within(h_next, *rotate_add_bound(a, weight, h, shortcut, bias))
                assert_sums(sums, h_next)


@pytest.mark.parametrize("dtype", epilogue.DTYPES)
def test_sums_are_of_what_is_stored(instruction_set, dtype):
    for rows in (1, 2, 40):
        a, weight = normal(rows, 50, dtype=dtype, seed=0), normal(700, 50, dtype=dtype, seed=1)
        h_next, sums = epilogue.rotate_add(a, weight, normal(rows, 700, dtype=dtype, seed=2))
        assert_sums(sums, h_next)


def test_not_a_number_stays(instruction_set):
    h = torch.ones(2, 40)
    h[1, 7] = torch.nan
    weight = normal(20, 40, dtype=torch.float32, seed=0)
    for activation in EPILOGUES:
        y = epilogue.norm_linear(NormLinearInputs(h, weight, None, None, 16, activation, 40.0, 1e-5))
        assert y[0].isfinite().all()
        assert y[1].isnan().all()


def test_the_operators_take_it_for_many_rows(monkeypatch):
    """Contiguous results of rows of a wider tensor, and no row."""
    rows = gemm.most_rows(torch.float32) + 1
    for op in ("norm_linear", "rotate_add"):
        assert GemmDispatcher(op).find("auto", None, torch.float32, rows) == "cpu-epilogue"
        assert GemmDispatcher(op).find("auto", None, torch.float64, rows) == "torch"
    wide, weight = normal(rows, 200, dtype=torch.float32, seed=0), normal(70, 67, dtype=torch.float32, seed=1)
    h, a = wide[:, 5:72], wide[:, 100:150]
    y = norm_linear(h, weight, None, None, 60, "silu_gated", 67.0, 1e-5)
    assert y.is_contiguous()
    assert_within(y, *norm_linear_bound(h, weight, None, 60, "silu_gated", 67.0, 1e-5))
    output = normal(67, 50, dtype=torch.float32, seed=2)
    h_next, sums = rotate_add(a, output, h)
    assert_within(h_next, *rotate_add_bound(a, output, h, None, None))
    assert_sums(sums, h_next)
    assert epilogue.norm_linear(
        NormLinearInputs(h[:0], weight, None, None, 70, "none", 67.0, 1e-5)
    ).shape == (0, 70)
    assert epilogue.rotate_add(a[:0], output, h[:0])[1].shape == (0, 3)


@pytest.mark.parametrize("rows", [2, 33])
def test_the_same_bits_with_any_number_of_threads(threads, rows):
    """Of the epilogue; the library's product is the same tensor."""
    h, weight = normal(rows, 300, dtype=torch.float32, seed=0), normal(500, 300, dtype=torch.float32, seed=1)
    product, results = h @ weight.mT, []
    for count in (1, 2, 3, 5):
        threads(count)
        y = torch.empty(rows, 300)
        gemm.finish(NormLinearInputs(h, weight, None, None, 400, "silu_gated", 300.0, 1e-5), y, product)
        results.append(y)
    assert all(torch.equal(results[0], other) for other in results[1:])
