"""`norm_linear` and `rotate_add` with weights of 8 and 4 bits, with every instruction set, against float64."""

from dataclasses import replace

import pytest
import torch
from support.gemm_bounds import assert_sums, assert_within, norm_linear_bound, normal, rotate_add_bound
from support.quantized_weights import dense, panels, random_codes, row_error

from slicegpt.errors import SliceGPTError
from slicegpt.ops import norm_linear, rotate_add
from slicegpt.ops.contracts import NormLinearInputs
from slicegpt.ops.cpu import extension, gemm
from slicegpt.ops.panels import PanelWeight

needs_kernels = pytest.mark.skipif(extension.why_not() is not None, reason=str(extension.why_not()))

# Rows below, at and beyond a panel of 16 and a block of 64; columns below, at and beyond a block of 32, and so many
# that tokens are taken in several parts; a scale a row, groups, zero points.
WEIGHTS = {
    "int8": (54, 67, 8, 1, False),
    "int8, one block": (16, 32, 8, 1, False),
    "int8, groups": (150, 128, 8, 2, False),
    "int8, long": (18, 9000, 8, 1, False),
    "int4": (30, 33, 4, 1, False),
    "int4, groups": (150, 192, 4, 6, False),
    "int4, zero points": (70, 256, 4, 2, True),
}


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("name", WEIGHTS)
def test_the_layout_holds_the_codes(name, gated):
    codes = random_codes(*WEIGHTS[name])
    weight = panels(codes, gated)
    assert weight.bits == codes.bits
    assert torch.equal(weight.double(), dense(codes))
    below = weight.with_rest(torch.ones(3, weight.columns), 0)
    assert below.shape == below.double().shape == (weight.rows + 3, weight.columns)
    beside = weight.with_rest(torch.ones(weight.rows, 5), 1)
    assert beside.shape == beside.double().shape == (weight.rows, weight.columns + 5)
    if codes.bits == 8 and codes.scales.shape[1] == 1 and not gated:
        ids = torch.tensor([0, 15, weight.rows - 1, 3])
        assert torch.equal(weight.take(ids).double(), dense(codes)[ids].bfloat16().double())


@needs_kernels
@pytest.mark.parametrize("dtype", gemm.DTYPES)
@pytest.mark.parametrize("name", WEIGHTS)
def test_norm_linear(instruction_set, name, dtype):
    rows, columns = WEIGHTS[name][:2]
    for count, activation, factor in ((1, "none", 0), (3, "silu_gated", 7), (6, "gelu", 90), (21, "none", 1)):
        weight = panels(random_codes(*WEIGHTS[name]), activation.endswith("gated"))
        error = row_error(h := normal(count, columns, dtype=dtype, seed=1), weight)
        if factor:
            weight = weight.with_rest(normal(factor, columns, dtype=dtype, seed=2), 0)
        for bias in (None, normal(rows, dtype=dtype, seed=3)):
            arguments = (h, weight, bias, rows, activation, float(columns), 1e-5)
            actual = gemm.norm_linear(NormLinearInputs(*arguments[:3], None, *arguments[3:]))
            assert_within(actual, *norm_linear_bound(*arguments, product_error=error))


@needs_kernels
@pytest.mark.parametrize("dtype", gemm.DTYPES)
@pytest.mark.parametrize("name", WEIGHTS)
def test_rotate_add(instruction_set, name, dtype):
    rows, columns = WEIGHTS[name][:2]
    for count, rest, d in ((1, 0, rows), (3, 9, rows - 4), (6, 40, rows + 2), (21, 1, rows)):
        weight = panels(random_codes(*WEIGHTS[name]))
        a, h = normal(count, columns + rest, dtype=dtype, seed=1), normal(count, d, dtype=dtype, seed=2)
        error = row_error(a[:, :columns], weight)
        if rest:
            weight = weight.with_rest(normal(rows, rest, dtype=dtype, seed=3), 1)
        for shortcut in (
            (None, normal(rows, d, dtype=dtype, seed=4))
            if d <= rows
            else (normal(rows, d, dtype=dtype, seed=4),)
        ):
            bias = normal(rows, dtype=dtype, seed=5)
            h_next, sums = gemm.rotate_add(a, weight, h, shortcut, bias)
            assert_within(h_next, *rotate_add_bound(a, weight, h, shortcut, bias, product_error=error))
            assert_sums(sums, h_next)


@needs_kernels
@pytest.mark.parametrize("bits", [4, 8])
def test_every_code_is_read_right(instruction_set, bits):
    """One row that has a 1 at each place in turn: the weight itself comes out, to the last bit of its 16."""
    codes = random_codes(48, 64, bits, 2)
    weight, ones = panels(codes), torch.eye(64, dtype=torch.bfloat16)
    sums = torch.ones(64, 1)
    actual = gemm.norm_linear(NormLinearInputs(ones, weight, None, sums, 48, "none", 1.0, 0.0))
    # 32767 codes in float32, times 1 / 32767: off by 2^-23, and the product of a code and a scale has 15 bits.
    assert torch.equal(actual, dense(codes).bfloat16().mT)


@needs_kernels
@pytest.mark.parametrize("bits", [4, 8])
def test_what_is_not_a_number_stays(instruction_set, bits):
    weight = panels(random_codes(20, 40, bits))
    h = torch.ones(3, 40)
    h[1, 7], h[2, 39] = torch.nan, torch.inf
    y = gemm.norm_linear(NormLinearInputs(h, weight, None, torch.ones(3, 1), 20, "none", 1.0, 0.0))
    assert y[0].isfinite().all()
    assert y[1:].isnan().all()
    # Numbers that would overflow on the way count as 0; zeros are zeros.
    h = torch.zeros(2, 40)
    h[1] = 1e-35
    y = gemm.norm_linear(NormLinearInputs(h, weight, None, torch.ones(2, 1), 20, "none", 1.0, 0.0))
    assert torch.equal(y, torch.zeros_like(y))


@needs_kernels
@pytest.mark.parametrize("bits", [4, 8])
def test_the_same_bits_with_any_number_of_threads_and_rows(threads, bits):
    """A row's result depends neither on the threads nor on the rows beside it."""
    weight = panels(random_codes(502, 320, bits, 5), True).with_rest(
        normal(90, 320, dtype=torch.bfloat16, seed=1), 0
    )
    output = panels(random_codes(320, 480, bits, 1)).with_rest(
        normal(320, 21, dtype=torch.bfloat16, seed=2), 1
    )
    h, a = normal(11, 320, dtype=torch.bfloat16, seed=3), normal(11, 501, dtype=torch.bfloat16, seed=4)
    results = []
    for count, rows in ((1, 11), (2, 11), (3, 11), (2, 3), (2, 1)):
        threads(count)
        y = gemm.norm_linear(NormLinearInputs(h[:rows], weight, None, None, 502, "silu_gated", 320.0, 1e-5))
        results.append((y, *gemm.rotate_add(a[:rows], output, h[:rows])))
    for other in results[1:]:
        assert all(torch.equal(one[: len(two)], two) for one, two in zip(results[0], other, strict=True))


# --- the operators ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_operators(monkeypatch, dtype, backend):
    """Strided rows, empty ones, a dtype without kernels."""
    monkeypatch.setenv("SLICEGPT_BACKEND", backend)
    weight, output = panels(random_codes(40, 64, 4, 2), True), panels(random_codes(64, 64, 8))
    wide = normal(5, 200, dtype=dtype, seed=1)
    h, a = wide[:, 3:67], wide[:, 100:164]
    arguments = (h, weight, None, 40, "silu_gated", 64.0, 1e-5)
    y = norm_linear(h, weight, None, None, *arguments[3:])
    h_next, sums = rotate_add(a, output, h)
    assert (y.dtype, sums.shape) == (dtype, (5, 2))
    if dtype is torch.float64:
        dense_weight, dense_output = weight.double(), output.double()
        assert torch.allclose(
            y, norm_linear(h, dense_weight, None, None, *arguments[3:]), rtol=1e-12, atol=1e-12
        )
        assert torch.allclose(h_next, rotate_add(a, dense_output, h)[0], rtol=1e-12, atol=1e-12)
    elif extension.is_available() or backend == "reference":
        assert_within(y, *norm_linear_bound(*arguments, row_error(h, weight)))
        assert_within(h_next, *rotate_add_bound(a, output, h, None, None, row_error(a, output)))
    assert norm_linear(h[:0], weight, None, None, *arguments[3:]).shape == (0, 20)
    assert rotate_add(a[:0], output, h[:0])[0].shape == (0, 64)


def test_they_are_operators():
    """Schema, fake and tracing."""
    weight = panels(random_codes(32, 64, 4, 2, True)).with_rest(normal(3, 64, dtype=torch.float32, seed=1), 0)
    h = normal(2, 64, dtype=torch.float32, seed=2)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        torch.ops.slicegpt.norm_linear_quantized.default,
        (h, weight.codes, weight.scales, weight.zeros, 32, 64, weight.rest, None, None, "none", 64.0, 1e-5),
        test_utils=tests,
    )
    output = panels(random_codes(64, 64, 8))
    torch.library.opcheck(
        torch.ops.slicegpt.rotate_add_quantized.default,
        (h, output.codes, output.scales, None, 64, 64, None, h, None, None),
        test_utils=tests,
    )
    compiled = torch.compile(
        lambda h: norm_linear(h, weight, None, None, 32, "none", 64.0, 1e-5), backend="eager", fullgraph=True
    )
    assert torch.equal(compiled(h), norm_linear(h, weight, None, None, 32, "none", 64.0, 1e-5))


def test_refused():
    weight, h = panels(random_codes(32, 64, 4, 2)), torch.ones(2, 64)

    def linear(weight: PanelWeight, n_scaled: int = 32, activation: str = "none", h: torch.Tensor = h):
        return norm_linear(h, weight, None, None, n_scaled, activation, 64.0, 1e-5)

    for call, message in (
        (lambda: linear(weight, 20), "n_scaled must be weight's 32 quantized rows, got 20"),
        (
            lambda: linear(weight, activation="silu_gated"),
            r"activation must be gated as its weight is \(False\)",
        ),
        (lambda: linear(weight, h=torch.ones(2, 60)), r"weight must be \[N, d\] for h's 60 columns"),
        (lambda: linear(replace(weight, codes=weight.codes[:1])), r"codes must be \[2, 2\] blocks"),
        (lambda: linear(replace(weight, codes=weight.codes.view(torch.int8))), "codes must be uint8"),
        (
            lambda: linear(replace(weight, scales=weight.scales.double())),
            "scales must be float16, bfloat16 or",
        ),
        (lambda: linear(replace(weight, zeros=weight.scales)), "zeros must be uint8"),
        (lambda: linear(weight.with_rest(torch.ones(3, 64).half(), 0)), "rest must have h's dtype"),
        (lambda: rotate_add(torch.ones(2, 65), weight, h), r"a must be \[T, K\] for weight's 64 columns"),
        (lambda: rotate_add(h, weight, h), "h must have at most 32 columns without a shortcut"),
        (lambda: rotate_add(h, weight, h[:, :20], None, h[0]), r"bias must be \[32\]"),
    ):
        with pytest.raises(SliceGPTError, match=message):
            call()
    codes = random_codes(32, 96, 4, 2)
    with pytest.raises(ValueError, match="groups must be of multiples of 32 columns, got 96 in 2 groups"):
        panels(codes)
    with pytest.raises(ValueError, match="bits must be 4, or 8 without zero points, got 8"):
        PanelWeight.pack(codes.codes, codes.scales, codes.codes, 8)
