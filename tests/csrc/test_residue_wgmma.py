"""The wgmma kernels of `gram_exact` against the mma.sync kernel, bit for bit, and against exact integers.

In the emulation, and with a GPU of compute capability 9.0 on hardware.
"""

import pytest
import torch

from slicegpt.errors import SliceGPTError
from slicegpt.ops.cuda import extension
from slicegpt.ops.cuda import gram as cuda_gram

# Rows and columns beside a group of 128 and a tile of 256, an even and an odd number of groups, several tiles; up to 64
# tokens, an odd number of blocks of 64, and (in the emulation) several passes of 128.
SHAPES = [(1, 1), (64, 63), (191, 130), (257, 257), (65, 577)]
BOTH = ["sm_90", pytest.param("cuda", marks=pytest.mark.gpu)]

KERNELS = ["wgmma", "wgmma-pairs"]

on_hopper = pytest.mark.parametrize("target", BOTH, indirect=True, scope="session")


def values(tokens, columns, dtype=torch.float16, seed=0):
    """Integers of 12 bits: int64 holds every sum of their products, so that the result must be exact."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-2047, 2048, (tokens, columns), generator=generator).to(dtype)


def run(backend, monkeypatch, kernel, X, weight=None):
    monkeypatch.setenv("SLICEGPT_GRAM_EXACT", kernel)
    C = torch.zeros(X.shape[1], X.shape[1], dtype=torch.float64)
    return backend.gram("exact", C, X, weight)


def integers(X):
    whole = X.long()
    return (whole.T @ whole).double()


@pytest.fixture
def hopper(backend):
    if not backend.has_wgmma():
        pytest.skip("needs compute capability 9.0 and code for sm_90a")
    return backend


@on_hopper
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("order", ["0", "1"], ids=["forwards", "reversed"])
@pytest.mark.parametrize(("tokens", "columns"), SHAPES)
def test_equals_integers_and_mma(hopper, monkeypatch, tokens, columns, order, kernel):
    monkeypatch.setenv("SLICEGPT_EMULATION_REVERSED", order)
    X = values(tokens, columns)
    result = run(hopper, monkeypatch, kernel, X)
    assert torch.equal(result, integers(X))
    assert torch.equal(result, run(hopper, monkeypatch, "mma", X))


@on_hopper
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_any_values(hopper, monkeypatch, dtype):
    """Groups that need different counts of moduli, tokens that are absent or handed over."""
    X = torch.randn(150, 300, generator=torch.Generator().manual_seed(3)).to(dtype)
    X[0, :5] = 1e-6
    X[3, 7] = torch.inf
    weight = torch.ones(150)
    weight[5], weight[9] = 0, 0.5
    expected = run(hopper, monkeypatch, "mma", X, weight)
    for kernel in KERNELS:
        result = run(hopper, monkeypatch, kernel, X, weight)
        assert torch.equal(result.isnan(), expected.isnan())
        assert torch.equal(result.nan_to_num(), expected.nan_to_num())


@on_hopper
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("order", ["0", "1"], ids=["forwards", "reversed"])
@pytest.mark.parametrize(("tokens", "columns"), [(512, 3), (1300, 3), (1300, 300)])
def test_stages_are_used_again(request, hopper, monkeypatch, tokens, columns, order, kernel):
    """8 and 21 blocks of 64 tokens in one pass, over 8 stages; one group of columns, and three."""
    monkeypatch.setenv("SLICEGPT_EMULATION_REVERSED", order)
    if hopper.device == "cpu":
        monkeypatch.setattr(extension, "module", request.getfixturevalue("emulated_build")(90, 1 << 22))
    X = values(tokens, columns)
    assert torch.equal(run(hopper, monkeypatch, kernel, X), integers(X))


@on_hopper
def test_automatic_is_mma(hopper, monkeypatch):
    """And unset is automatic; what nothing but the choice of kernel shows is that each is accepted."""
    X = values(70, 70)
    expected = run(hopper, monkeypatch, "mma", X)
    assert torch.equal(run(hopper, monkeypatch, "auto", X), expected)
    monkeypatch.delenv("SLICEGPT_GRAM_EXACT")
    assert torch.equal(hopper.gram("exact", torch.zeros(70, 70, dtype=torch.float64), X), expected)


class WrongPairs:
    """The module, with a kernel for pairs that adds everything twice, or none."""

    def __init__(self, module, wrong=(3,)):
        self.module, self.wrong = module, wrong

    def __getattr__(self, name):
        return getattr(self.module, name)

    def gram_exact(self, device, arguments, kernel):
        status = self.module.gram_exact(device, arguments, kernel)
        return self.module.gram_exact(device, arguments, kernel) if kernel in self.wrong else status


@on_hopper
def test_checked_takes_the_fastest_that_is_right(hopper, monkeypatch, caplog):
    """A kernel with other bits is passed over with a warning; what is found is kept."""
    monkeypatch.setattr(cuda_gram, "CHECK_SHAPE", (70, 130))
    device, X, real = torch.empty(0, device=hopper.device).device, values(70, 70), extension.module
    for wrong, chosen in (((), "wgmma-pairs"), ((3,), "wgmma"), ((2, 3), "mma")):
        monkeypatch.setattr(extension, "module", WrongPairs(real, wrong))
        cuda_gram.checked_exact_kernel.cache_clear()
        assert cuda_gram.checked_exact_kernel(device) == chosen
        assert len(caplog.records) == len(wrong)
        caplog.clear()
        assert torch.equal(run(hopper, monkeypatch, "checked", X), integers(X))
        assert cuda_gram.checked_exact_kernel.cache_info().misses == 1
    cuda_gram.checked_exact_kernel.cache_clear()


@pytest.mark.parametrize("target", ["sm_75"], indirect=True, scope="session")
def test_checked_elsewhere_is_mma(backend):
    cuda_gram.checked_exact_kernel.cache_clear()
    assert cuda_gram.checked_exact_kernel(torch.device(backend.device)) == "mma"
    cuda_gram.checked_exact_kernel.cache_clear()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("target", ["sm_75"], indirect=True, scope="session")
def test_refused_elsewhere(backend, monkeypatch, kernel):
    assert not backend.has_wgmma()
    with pytest.raises(
        SliceGPTError, match=r"wgmma kernel needs compute capability 9\.0 and code built for 9\.0a"
    ):
        run(backend, monkeypatch, kernel, values(3, 4))


def test_unknown_kernel(backend, monkeypatch):
    with pytest.raises(
        SliceGPTError,
        match="SLICEGPT_GRAM_EXACT must be one of auto, mma, wgmma, wgmma-pairs, checked, got 'imma'",
    ):
        run(backend, monkeypatch, "imma", values(3, 4))
