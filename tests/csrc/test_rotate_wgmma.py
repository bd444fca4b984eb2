"""The wgmma kernel of `rotate_add` against exact products, bit for bit: in the emulation, and with a GPU of compute
capability 9.0 on hardware.

Operands are small integers: every partial sum is one that float32 holds, so whatever the order of summation the result
is the exact product, rounded once.
"""

import pytest
import torch

from slicegpt.errors import SliceGPTError
from slicegpt.ops import reference
from slicegpt.ops.contracts import SUMSQ_COLUMNS
from slicegpt.ops.cuda import extension, rotate_wgmma

BOTH = ["sm_90", pytest.param("cuda", marks=pytest.mark.gpu)]
on_hopper = pytest.mark.parametrize("target", BOTH, indirect=True, scope="session")
on_the_emulation = pytest.mark.parametrize("target", ["sm_90"], indirect=True, scope="session")

# (rows, columns, columns of a, of h): within one tile and step; rows beside 128 and 256 (a pair of tiles), columns
# beside 256, 32 (a sum of squares) and 8; K beside 64, and more than the four stages, in either source; and more tiles
# than the emulation's three multiprocessors work on at once.
DENSE = [(1, 8, 8, 8), (129, 264, 72, 40), (130, 40, 8, 330), (300, 520, 330, 72), (520, 520, 64, 8)]
# h is as wide as the result, or narrower.
ADDED = [(1, 8, 8, 8), (129, 264, 72, 264), (257, 288, 330, 40), (300, 520, 8, 520)]


@pytest.fixture
def hopper(backend):
    if not extension.module.has_rotate_wgmma(0):
        pytest.skip("needs compute capability 9.0 and code for sm_90a")
    return backend


def integers(*shape, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-3, 4, shape, generator=generator).to(dtype)


def inputs(rows, columns, inner, width, dense, bias, dtype):
    def make(*shape):
        # Rows farther apart than they are long, of pieces of 16 bytes all the same; what lies between is never read.
        stride = -(-shape[1] // 8) * 8 + 8
        whole = torch.full((shape[0], stride), torch.nan, dtype=dtype)
        whole[:, : shape[1]] = integers(*shape, dtype=dtype, seed=sum(shape))
        return whole[:, : shape[1]]

    shortcut = make(columns, width) if dense else None
    shift = integers(columns, dtype=dtype, seed=7) if bias else None
    return make(rows, inner), make(columns, inner), make(rows, width), shortcut, shift


def run(backend, kernel, *tensors):
    def move(tensor):
        if tensor is None or tensor.dim() == 1:
            return None if tensor is None else tensor.to(backend.device)
        return backend._move(tensor)

    moved = [move(tensor) for tensor in tensors]
    assert rotate_wgmma.takes(*moved)
    return [result.cpu() for result in rotate_wgmma.rotate_add(*moved, kernel)]


def check(backend, kernel, tensors):
    exact, _ = reference.rotate_add(*(None if one is None else one.double() for one in tensors))
    expected = exact.to(tensors[0].dtype)
    h_next, sumsq = run(backend, kernel, *tensors)
    assert torch.equal(h_next, expected)
    squares = torch.nn.functional.pad(expected.double(), (0, -expected.shape[1] % SUMSQ_COLUMNS)).square()
    squares = squares.unflatten(1, (-1, SUMSQ_COLUMNS)).sum(2)
    # 32 squares in float32: at most 31 roundings of 2^-24.
    torch.testing.assert_close(sumsq.double(), squares, rtol=32 * 2**-24, atol=0)


@on_hopper
@pytest.mark.parametrize("kernel", rotate_wgmma.KERNELS)
@pytest.mark.parametrize("shape", DENSE, ids=str)
def test_dense_shortcut(hopper, shape, kernel):
    check(hopper, kernel, inputs(*shape, dense=True, bias=shape[0] % 2 == 0, dtype=torch.bfloat16))


@on_hopper
@pytest.mark.parametrize("kernel", rotate_wgmma.KERNELS)
@pytest.mark.parametrize("shape", ADDED, ids=str)
def test_residual_is_added(hopper, shape, kernel):
    check(hopper, kernel, inputs(*shape, dense=False, bias=shape[0] % 2 == 0, dtype=torch.float16))


@on_the_emulation
@pytest.mark.parametrize("kernel", rotate_wgmma.KERNELS)
@pytest.mark.parametrize("dense", [True, False], ids=["dense", "added"])
def test_any_order_of_blocks(hopper, monkeypatch, kernel, dense):
    monkeypatch.setenv("SLICEGPT_EMULATION_REVERSED", "1")
    width = 72 if dense else 520
    check(hopper, kernel, inputs(300, 520, 330, width, dense, True, torch.float16))


@on_hopper
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_any_values(hopper, dtype):
    """Normal values: float32 sums of 401 products, then one rounding to the dtype; both kernels give the same bits."""
    generator = torch.Generator().manual_seed(1)
    a, weight, h, shortcut = (
        torch.randn(*shape, generator=generator).to(dtype)
        for shape in ((40, 328), (64, 328), (40, 72), (64, 72))
    )
    tensors = a, weight, h, shortcut, None
    h_next, _ = run(hopper, "wgmma", *tensors)
    assert torch.equal(h_next, run(hopper, "wgmma-pairs", *tensors)[0])
    exact, _ = reference.rotate_add(*(None if one is None else one.double() for one in tensors))
    size = a.double().abs() @ weight.double().abs().mT + h.double().abs() @ shortcut.double().abs().mT
    # Half a unit in the last place, and at most 2^-22 of the products for each of their sums (tensor cores truncate).
    bound = torch.finfo(dtype).eps / 2 * exact.abs() + 400 * 2.0**-22 * size
    assert ((h_next.double() - exact).abs() <= bound).all()


@on_the_emulation
def test_checked_takes_the_fastest_that_is_right(hopper, monkeypatch, caplog):
    """A kernel with another product is passed over with a warning; what is found is kept."""
    monkeypatch.setattr(rotate_wgmma, "CHECK_SHAPE", (130, 264, 72, 40))
    monkeypatch.setattr(extension, "is_available", lambda: True)
    device, real = torch.device("cpu"), rotate_wgmma.rotate_add

    for wrong, chosen in (((), "wgmma-pairs"), (("wgmma-pairs",), "wgmma"), (rotate_wgmma.KERNELS, None)):

        def spoiled(*arguments, wrong=wrong):
            h_next, sumsq = real(*arguments)
            h_next[-1, -1] += arguments[-1] in wrong
            return h_next, sumsq

        monkeypatch.setattr(rotate_wgmma, "rotate_add", spoiled)
        rotate_wgmma.checked_kernel.cache_clear()
        assert rotate_wgmma.checked_kernel(device, torch.bfloat16) == chosen
        assert len(caplog.records) == len(wrong)
        caplog.clear()
        assert rotate_wgmma.checked_kernel(device, torch.bfloat16) == chosen
        assert rotate_wgmma.checked_kernel.cache_info().misses == 1
    rotate_wgmma.checked_kernel.cache_clear()


@pytest.mark.parametrize("target", ["sm_75"], indirect=True, scope="session")
def test_refused_elsewhere(backend):
    assert not extension.module.has_rotate_wgmma(0)
    message = r"wgmma kernel needs compute capability 9\.0 and code built for 9\.0a"
    with pytest.raises(SliceGPTError, match=message):
        run(backend, "wgmma", *inputs(3, 8, 8, 8, True, False, torch.float16))


@on_the_emulation
@pytest.mark.parametrize("fault", ["columns", "stride", "address", "width"])
def test_layouts_that_tma_cannot_read(hopper, fault):
    """`takes` says no, and the launcher refuses them as well."""
    a, weight, h, _, _ = inputs(5, 16, 24, 16, False, False, torch.float16)
    if fault == "columns":
        weight, h = weight[:12], h[:, :8]
    elif fault == "stride":
        a = torch.zeros(5, 25, dtype=torch.float16)[:, :24]
    elif fault == "address":
        a = a[:, 1:]
        weight = weight[:, 1:]
    else:
        h = h[:, :12]
    assert not rotate_wgmma.takes(a, weight, h, None, None)
    with pytest.raises(SliceGPTError, match="rows without the alignment"):
        rotate_wgmma.rotate_add(a, weight, h, None, None, "wgmma")
