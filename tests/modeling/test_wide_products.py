"""Products of 16-bit tensors on a CPU without instructions for them."""

import pytest
import torch
from torch.nn import functional

from slicegpt.modeling import wide_products
from slicegpt.modeling.wide_products import products_in_float32

CPU = torch.device("cpu")
HALVES = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def without_instructions(monkeypatch):
    monkeypatch.setattr(wide_products, "lacks_halves", lambda dtype: True)


def drawn(*shape, dtype, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check(out, exact, magnitude, terms):
    """One rounding to the dtype, half of eps of the result, and K roundings of float32 of the sum of magnitudes."""
    eps = torch.finfo(out.dtype).eps
    bound = eps / 2 * exact.abs() + terms * 2**-24 * (1 + eps) * magnitude
    assert out.dtype in HALVES
    assert (out.double() - exact).abs().le(bound + 1e-7).all()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("bias", [False, True])
def test_linear_is_rounded_once(dtype, bias, monkeypatch):
    monkeypatch.setattr(
        wide_products, "PANEL", 7 * 48
    )  # panels of 7 rows of the weight, the last one shorter
    monkeypatch.setattr(wide_products, "ROWS", 32)
    x, w = drawn(3, 37, 48, dtype=dtype), drawn(45, 48, dtype=dtype, seed=1)
    b = drawn(45, dtype=dtype, seed=2) if bias else None
    with torch.no_grad(), products_in_float32(CPU):
        out = functional.linear(x, w, b)
    exact = functional.linear(x.double(), w.double(), None if b is None else b.double())
    magnitude = functional.linear(x.double().abs(), w.double().abs(), None if b is None else b.double().abs())
    assert out.shape == (3, 37, 45)
    check(out, exact, magnitude, 49)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    "product",
    [torch.matmul, torch.mm, lambda a, b: a @ b, torch.Tensor.mm, torch.Tensor.matmul],
)
def test_products_of_two_matrices(dtype, product):
    a, b = drawn(40, 64, dtype=dtype), drawn(33, 64, dtype=dtype, seed=1).mT
    with torch.no_grad(), products_in_float32(CPU):
        out = product(a, b)
    check(out, a.double() @ b.double(), a.double().abs() @ b.double().abs(), 64)


@pytest.mark.parametrize("product", [torch.matmul, torch.bmm, torch.Tensor.bmm, lambda a, b: a @ b])
def test_products_of_stacks(product):
    a, b = drawn(3, 40, 64, dtype=torch.bfloat16), drawn(3, 64, 35, dtype=torch.bfloat16, seed=1)
    with torch.no_grad(), products_in_float32(CPU):
        out = product(a, b)
    check(out, a.double() @ b.double(), a.double().abs() @ b.double().abs(), 64)


def counted(monkeypatch):
    widened = []
    plain = torch.Tensor.float
    monkeypatch.setattr(torch.Tensor, "float", lambda self: widened.append(self.shape) or plain(self))
    return widened


def test_what_is_left_to_pytorch(monkeypatch):
    widened, x = counted(monkeypatch), drawn(64, 48, dtype=torch.bfloat16)
    w = drawn(16, 48, dtype=torch.bfloat16, seed=1)
    with products_in_float32(CPU):
        weight = w.clone().requires_grad_()
        functional.linear(x, weight).sum().backward()  # gradients
        with torch.no_grad():
            functional.linear(x[:4], w)  # reading the weight decides
            functional.linear(x.double(), w.double())
            functional.linear(x, w[0])
            x @ w[0]
            x[0] @ w.mT
    assert not widened
    assert weight.grad is not None
    with torch.no_grad(), products_in_float32(CPU):
        functional.linear(x, w)
    assert widened
    widened.clear()
    with torch.no_grad():
        functional.linear(x, w)
        with products_in_float32(torch.device("meta")):
            functional.linear(x, w)
    assert not widened


def test_a_cpu_with_instructions_uses_them(monkeypatch):
    monkeypatch.undo()
    has = {"architecture": "x86_64", "avx512_bf16": True, "amx_fp16": True}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has, raising=False)
    wide_products.lacks_halves.cache_clear()
    assert not any(map(wide_products.lacks_halves, HALVES))
    wide_products.lacks_halves.cache_clear()
    has.update(avx512_bf16=False)
    assert wide_products.lacks_halves(torch.bfloat16)
    assert not wide_products.lacks_halves(torch.float16)
    wide_products.lacks_halves.cache_clear()
    has.update(architecture="aarch64", amx_fp16=False)
    assert not any(map(wide_products.lacks_halves, HALVES))
    wide_products.lacks_halves.cache_clear()
