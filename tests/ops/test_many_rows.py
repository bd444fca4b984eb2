"""`rotate_add` of many rows: which kernel SLICEGPT_ROTATE_PREFILL takes, and the library's one GEMM."""

import pytest
import torch

from slicegpt.errors import SliceGPTError
from slicegpt.ops import many_rows, norm_linear, rotate_add
from slicegpt.ops.contracts import block_sums_of_squares, sumsq_dtype
from slicegpt.ops.cuda import rotate_wgmma
from slicegpt.ops.norm_linear import DISPATCHER, norm_linear_into
from slicegpt.ops.torch_gemm import one_product

HOPPER, AMPERE = (9, 0), (8, 0)
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def tensors(dtype, dense, rows=20, columns=24, inner=40, width=16):
    generator = torch.Generator().manual_seed(0)
    shapes = [(rows, inner), (columns, inner), (rows, width)]
    a, weight, h = (torch.randn(*shape, generator=generator).to(dtype) for shape in shapes)
    shortcut = torch.randn(columns, width, generator=generator).to(dtype) if dense else None
    return a, weight, h, shortcut, torch.randn(columns, generator=generator).to(dtype)


@pytest.fixture
def few(monkeypatch):
    """Four rows are few, on a CPU too."""
    monkeypatch.setattr(many_rows, "few_rows", lambda capability, dtype: 4)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dense", [True, False], ids=["dense", "added"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_library(monkeypatch, few, dtype, dense, bias):
    """Against float64: the residual or the bias is rounded before the product is added, that is two roundings."""
    monkeypatch.setenv("SLICEGPT_ROTATE_PREFILL", "library")
    a, weight, h, shortcut, shift = tensors(dtype, dense)
    shift = shift if bias else None
    before = h.clone()
    assert many_rows.kernel_for(a, weight, h, shortcut, shift) == "library"
    h_next, sumsq = rotate_add(a, weight, h, shortcut, shift)
    second = torch.eye(len(weight), h.shape[1]) if shortcut is None else shortcut
    terms = [(a, weight), (h, second)]
    exact = sum(x.double() @ y.double().mT for x, y in terms)
    size = sum(x.double().abs() @ y.double().abs().mT for x, y in terms)
    if bias:
        exact, size = exact + shift.double(), size + shift.double().abs()
    # Two roundings to the dtype, and 57 of the sums.
    accumulated = 57 * torch.finfo(sumsq_dtype(dtype)).eps
    assert ((h_next.double() - exact).abs() <= (torch.finfo(dtype).eps + accumulated) * size).all()
    assert torch.equal(sumsq, block_sums_of_squares(h_next.to(sumsq_dtype(dtype))))
    assert torch.equal(h, before)


def test_one_product_writes_into_columns_of_a_wider_matrix():
    """Nothing beside them is touched, and rows that are columns of a wider matrix are read as they lie."""
    whole = torch.full((5, 40), torch.nan, dtype=torch.float64)
    whole[:, 8:24] = torch.randn(5, 16, dtype=torch.float64)
    joint, bias = torch.randn(16, 16, dtype=torch.float64), torch.randn(16, dtype=torch.float64)
    for shift in (None, bias):
        one_product(whole[:, 24:], whole[:, 8:24], joint, shift)
        expected = whole[:, 8:24] @ joint.T + (0 if shift is None else shift)
        torch.testing.assert_close(whole[:, 24:], expected, rtol=1e-12, atol=1e-12)
    assert whole[:, :8].isnan().all()


# (SLICEGPT_ROTATE_PREFILL, SLICEGPT_BACKEND, capability) -> what the operator takes.
TAKEN = [
    ("auto", "auto", HOPPER, None),
    ("fused", "auto", HOPPER, None),
    ("library", "auto", HOPPER, "library"),
    ("library", "cuda", AMPERE, "library"),
    ("library", "triton", HOPPER, None),
    ("wgmma", "auto", HOPPER, "wgmma"),
    ("wgmma-pairs", "cuda", HOPPER, "wgmma-pairs"),
    ("wgmma-pairs", "reference", HOPPER, None),
    ("wgmma", "auto", None, None),
    ("checked", "auto", HOPPER, "of the check"),
]


@pytest.mark.parametrize(("wish", "backend", "capability", "kernel"), TAKEN)
def test_what_is_taken(monkeypatch, few, wish, backend, capability, kernel):
    monkeypatch.setenv("SLICEGPT_ROTATE_PREFILL", wish)
    monkeypatch.setenv("SLICEGPT_BACKEND", backend)
    monkeypatch.setattr(many_rows, "capability_of", lambda tensor: capability)
    monkeypatch.setattr(many_rows.rotate_wgmma, "checked_kernel", lambda device, dtype: "of the check")
    monkeypatch.setattr(many_rows.extension, "capturing", lambda tensor: False)
    arguments = tensors(torch.bfloat16, dense=True)
    assert many_rows.kernel_for(*arguments) == kernel
    assert many_rows.kernel_for(*tensors(torch.bfloat16, dense=True, rows=4)) is None


@pytest.mark.parametrize("fault", ["dtype", "layout", "capture"])
def test_what_wgmma_does_not_take_is_fused(monkeypatch, few, fault):
    monkeypatch.setenv("SLICEGPT_ROTATE_PREFILL", "checked")
    monkeypatch.setattr(many_rows, "capability_of", lambda tensor: HOPPER)
    monkeypatch.setattr(many_rows.rotate_wgmma, "checked_kernel", lambda device, dtype: "wgmma")
    monkeypatch.setattr(many_rows.extension, "capturing", lambda tensor: fault == "capture")
    dtype, columns = (
        (torch.float32, 24) if fault == "dtype" else (torch.float16, 23 if fault == "layout" else 24)
    )
    assert many_rows.kernel_for(*tensors(dtype, dense=True, columns=columns)) is None


def test_the_operator_calls_the_kernel(monkeypatch, few):
    monkeypatch.setenv("SLICEGPT_ROTATE_PREFILL", "wgmma-pairs")
    monkeypatch.setattr(many_rows, "capability_of", lambda tensor: HOPPER)
    calls = []

    def launch(*arguments):
        calls.append(arguments)
        return arguments[0].new_empty(20, 24), arguments[0].new_empty(20, 1, dtype=torch.float32)

    monkeypatch.setattr(rotate_wgmma, "rotate_add", launch)
    arguments = tensors(torch.bfloat16, dense=True)
    rotate_add(*arguments)
    assert len(calls) == 1
    assert calls[0][-1] == "wgmma-pairs"
    assert all(one.data_ptr() == other.data_ptr() for one, other in zip(calls[0], arguments, strict=False))


@pytest.mark.parametrize(
    ("wish", "backend", "capability", "dtype", "rows", "dense", "expected"),
    [
        ("auto", "auto", HOPPER, torch.bfloat16, 8192, True, True),
        ("auto", "cuda", (7, 5), torch.float16, 257, True, True),
        (
            "auto",
            "auto",
            HOPPER,
            torch.bfloat16,
            256,
            True,
            False,
        ),  # sums are read without a launch of their own
        (
            "auto",
            "auto",
            HOPPER,
            torch.bfloat16,
            8192,
            False,
            False,
        ),  # one pass over h more than the fused kernel
        ("auto", "auto", HOPPER, torch.float32, 8192, True, False),
        ("auto", "auto", None, torch.bfloat16, 8192, True, False),
        ("auto", "triton", HOPPER, torch.bfloat16, 8192, True, False),
        ("fused", "auto", HOPPER, torch.bfloat16, 8192, True, False),
        ("library", "auto", None, torch.float64, 5, False, True),
        ("library", "auto", None, torch.float64, 4, True, False),
    ],
)
def test_the_runtime_in_one_product(
    monkeypatch, few, wish, backend, capability, dtype, rows, dense, expected
):
    monkeypatch.setenv("SLICEGPT_ROTATE_PREFILL", wish)
    monkeypatch.setenv("SLICEGPT_BACKEND", backend)
    assert many_rows.in_one_product(capability, dtype, rows, dense) == expected


def test_unknown_value(monkeypatch):
    monkeypatch.setenv("SLICEGPT_ROTATE_PREFILL", "cublas")
    message = "SLICEGPT_ROTATE_PREFILL must be one of auto, fused, library, wgmma, wgmma-pairs, checked, got 'cublas'"
    with pytest.raises(SliceGPTError, match=message):
        rotate_add(*tensors(torch.float32, dense=True))


@pytest.mark.parametrize("name", ["triton", "torch"])
def test_norm_linear_into(monkeypatch, name):
    """Kernels for many rows write into the given columns; what another computes is copied."""
    whole, h, weight = torch.zeros(6, 12), torch.randn(6, 8), torch.randn(5, 8)
    arguments = (h, weight, None, None, 5, "none", 8.0, 1e-5)
    expected = norm_linear(*arguments)
    if name == "triton":
        monkeypatch.setattr(DISPATCHER, "choose", lambda *_: "triton")
        given = []

        def launch(inputs, out):
            given.append((inputs.h.data_ptr(), out.data_ptr()))
            out.copy_(expected)

        monkeypatch.setattr(DISPATCHER, "launcher", lambda name: launch)
    norm_linear_into(whole[:, 3:8], *arguments)
    torch.testing.assert_close(whole[:, 3:8], expected)
    assert (whole[:, :3] == 0).all()
    assert (whole[:, 8:] == 0).all()
    if name == "triton":
        assert given == [(h.data_ptr(), whole[:, 3:8].data_ptr())]
