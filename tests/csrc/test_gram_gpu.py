"""gram_'s CUDA kernels at sizes and in conditions that only a GPU can show."""

import pytest
import torch

from slicegpt.ops.cuda import extension
from slicegpt.ops.cuda import gram as cuda_gram

pytestmark = pytest.mark.gpu

PRECISIONS = ["fp64", "exact", "fast"]
# Relative Frobenius error. exact: a rounding of each block's result. fp64: sums of 8192 tokens, u sqrt(8192 / 3), and
# the reference has as much. fast: float32 sums of 128 tokens, truncated in each of 8 steps: 8 * 2^-24.
TOLERANCE = {"fp64": 1e-14, "exact": 1e-14, "fast": 5e-7}


@pytest.fixture(autouse=True)
def available():
    if not extension.is_available():
        pytest.skip(extension.why_not())


def run(precision, C, X, weight=None):
    getattr(cuda_gram, f"gram_{precision}")(C, X, weight)
    return C


def gaussian(tokens, columns, dtype, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(tokens, columns, device="cuda", generator=generator).to(dtype)


def reference(X):
    """XᵀX in float64, by chunks; summed pairwise over chunks by its own order of blocks."""
    C = torch.zeros(X.shape[1], X.shape[1], dtype=torch.float64, device="cuda")
    for rows in X.split(4096):
        rows = rows.double()
        C += rows.T @ rows
    return C


def zeros(columns):
    return torch.zeros(columns, columns, dtype=torch.float64, device="cuda")


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize(
    ("tokens", "columns"), [(70001, 576), (40000, 577), (20000, 4096), (300000, 64), (5000, 5001)]
)
def test_large(precision, dtype, tokens, columns):
    """Several blocks, splits and tiles; a poisoned workspace would show as a wrong sum on the second run."""
    if not cuda_gram.is_supported(torch.cuda.get_device_capability(), dtype, precision):
        pytest.skip("not on this device")
    X = gaussian(tokens, columns, dtype)
    expected = reference(X)
    first = run(precision, zeros(columns), X)
    assert ((first - expected).norm() / expected.norm()) < TOLERANCE[precision]
    assert torch.equal(first, first.T)
    # What the allocator hands out next is not zero any more.
    torch.full((1 << 28,), torch.nan, dtype=torch.float64, device="cuda")
    assert torch.equal(run(precision, zeros(columns), X), first), "not deterministic"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_exact_equals_integers(dtype):
    """Values of 12 bits and few tokens: int64 holds every sum, so exact and fp64 must give it bit for bit."""
    X = (gaussian(30000, 300, torch.float32) * 100).round().clamp(-255, 255).to(dtype)
    integers = X.cpu().long()
    expected = (integers.T @ integers).double()
    assert torch.equal(run("exact", zeros(300), X).cpu(), expected)
    assert torch.equal(run("fp64", zeros(300), X).cpu(), expected)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_cuda_graph(precision):
    """The launchers capture: no synchronisation, no allocation outside of torch's pool; replays see new data."""
    X = gaussian(3000, 700, torch.float16)
    weight = (torch.arange(3000, device="cuda") % 7 != 0).double()
    C = zeros(700)
    run(precision, C, X, weight)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(precision, C, X, weight)
    for seed in (1, 2):
        X.copy_(gaussian(3000, 700, torch.float16, seed))
        X[5] = torch.nan if seed == 2 else X[5]
        C.zero_()
        graph.replay()
        expected = run(precision, zeros(700), X, weight)
        assert torch.equal(C.isnan(), expected.isnan())
        assert torch.equal(C.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("precision", PRECISIONS)
def test_current_stream(precision):
    """Work is enqueued on the current stream: it waits for what that stream did to X."""
    X = torch.zeros(8192, 512, dtype=torch.float16, device="cuda")
    data = gaussian(8192, 512, torch.float16)
    C = zeros(512)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        X.copy_(data)
        run(precision, C, X)
    stream.synchronize()
    assert torch.equal(C, run(precision, zeros(512), data))


def test_workspace_is_bounded():
    """No float64 copy of X: 1.25 GiB of workspace for an X of 2 GiB whose copy would take 8."""
    X = gaussian(262144, 4096, torch.bfloat16)
    C = zeros(4096)
    for precision in PRECISIONS:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(precision, C, X)
        assert torch.cuda.max_memory_allocated() - before <= 1.25 * 2**30
