"""The decode kernels at real sizes and in conditions that only a GPU can show."""

from dataclasses import replace

import pytest
import torch

from slicegpt import ops
from slicegpt.ops import reference
from slicegpt.ops.contracts import NormLinearInputs
from slicegpt.ops.cuda import decode as cuda_decode
from slicegpt.ops.cuda import epilogue as cuda_epilogue
from slicegpt.ops.cuda import extension

pytestmark = pytest.mark.gpu

HALF = [torch.float16, torch.bfloat16]
# Relative Frobenius error of one rounding to the format, 2^-11 and 2^-8 at most; float32 sums are far below it.
TOLERANCE = {torch.float16: 5e-4, torch.bfloat16: 4e-3, torch.float32: 2e-6}


@pytest.fixture(autouse=True)
def available():
    if not extension.is_available():
        pytest.skip(extension.why_not())


def gaussian(*shape, dtype, seed=0, scale=1.0):
    generator = torch.Generator("cuda").manual_seed(seed)
    return (torch.randn(*shape, device="cuda", generator=generator) * scale).to(dtype)


def inputs(tokens, d, N, n_scaled, dtype):
    """norm_linear's and rotate_add's arguments for a stream of d columns."""
    h = gaussian(tokens, d, dtype=dtype)
    weight = gaussian(N, d, dtype=dtype, seed=1, scale=d**-0.5)
    return (h, weight, gaussian(n_scaled, dtype=dtype, seed=2), None, n_scaled, "silu_gated", float(d), 1e-5)


def block(tokens, K, d, dtype, dense=False):
    a, h = gaussian(tokens, K, dtype=dtype, seed=3), gaussian(tokens, d, dtype=dtype, seed=5)
    weight = gaussian(d, K, dtype=dtype, seed=4, scale=K**-0.5)
    shortcut = gaussian(d, d, dtype=dtype, seed=6, scale=d**-0.5) if dense else None
    return a, weight, h, shortcut, None


def assert_close(actual, expected):
    error = (actual.double() - expected.double()).norm() / expected.double().norm()
    assert error < TOLERANCE[actual.dtype], f"relative error {error:.1e}"


def skip_unless_supported(dtype, tokens=1):
    if not cuda_decode.is_supported(torch.cuda.get_device_capability(), dtype, tokens):
        pytest.skip("not on this device")


@pytest.mark.parametrize("module", [cuda_decode, cuda_epilogue], ids=["decode", "epilogue"])
@pytest.mark.parametrize("dtype", [*HALF, torch.float32], ids=["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("tokens", [1, 4, 8, 16])
def test_large(module, tokens, dtype):
    """Llama-2-7B's MLP at 25 %, with a compact shortcut and a dense one; the same bits on the second run."""
    skip_unless_supported(dtype, tokens)
    arguments = inputs(tokens, 3072, 2 * 11008 + 1024, 2 * 11008, dtype)
    first = module.norm_linear(NormLinearInputs(*arguments))
    assert_close(first, reference.norm_linear(NormLinearInputs(*arguments)))
    assert torch.equal(module.norm_linear(NormLinearInputs(*arguments)), first), "not deterministic"
    for dense in (False, True):
        arguments = block(tokens, 12032, 3072, dtype, dense)
        h_next, sumsq = module.rotate_add(*arguments)
        expected, squares = reference.rotate_add(*arguments)
        assert_close(h_next, expected)
        torch.testing.assert_close(sumsq.sum(1), squares.sum(1), rtol=1e-2, atol=0)
        again = module.rotate_add(*arguments)
        assert all(map(torch.equal, again, (h_next, sumsq))), "not deterministic"


@pytest.mark.parametrize("dtype", HALF, ids=["float16", "bfloat16"])
def test_narrow(dtype):
    """SmolLM2's widths: split columns on any GPU."""
    skip_unless_supported(dtype)
    arguments = block(1, 1536, 576, dtype)
    assert_close(cuda_decode.rotate_add(*arguments)[0], reference.rotate_add(*arguments)[0])


def test_factor():
    """The compact factor read from norm_linear's weight: NaN in rotate_add's; the same bits on the second run."""
    _, weight, h, _, _ = block(3, 4096, 3072, torch.float16)
    both = gaussian(4096 + 1024, 3072, dtype=torch.float16, seed=8, scale=3072**-0.5)
    factor = both[4096:]
    a = cuda_decode.norm_linear(NormLinearInputs(h, both, None, None, 4096, "none", 4096.0, 1e-5))
    if not cuda_decode.takes_factor(torch.cat((weight, factor.T), 1), factor):
        pytest.skip("the factor is too large for half of this device's L2")
    unread = torch.cat((weight, torch.full_like(factor.T, torch.nan)), 1)
    h_next, sumsq = cuda_decode.rotate_add(a, unread, h, None, None, factor)
    expected, squares = reference.rotate_add(a, torch.cat((weight, -factor.T), 1), h, None, None)
    assert_close(h_next, expected)
    torch.testing.assert_close(sumsq.sum(1), squares.sum(1), rtol=1e-2, atol=0)
    again = cuda_decode.rotate_add(a, unread, h, None, None, factor)
    assert all(map(torch.equal, again, (h_next, sumsq))), "not deterministic"


@pytest.mark.parametrize("d", [3072, 576])
def test_cuda_graph(d):
    """A chain of both ops captures; replays see new data, find the counters at zero, and equal eager calls."""

    def chain(h):
        sumsq = None
        for _ in range(4):
            y = cuda_decode.norm_linear(
                NormLinearInputs(h, up, None, sumsq, 4 * d, "silu_gated", float(d), 1e-5)
            )
            h, sumsq = cuda_decode.rotate_add(y, down, h, None, None)
        return h, sumsq

    up = gaussian(4 * d, d, dtype=torch.float16, scale=d**-0.5)
    down = gaussian(d, 2 * d, dtype=torch.float16, seed=1, scale=(2 * d) ** -0.5)
    h = gaussian(1, d, dtype=torch.float16, seed=2)
    chain(h)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = chain(h)
    for seed in range(3, 8):
        h.copy_(gaussian(1, d, dtype=torch.float16, seed=seed))
        graph.replay()
        assert all(torch.equal(x, y) for x, y in zip(result, chain(h), strict=True))


def test_graph_trees():
    """`torch.compile`'s own CUDA graphs take over the allocator from their warm-up on, and check their pool."""

    @torch.compile(mode="reduce-overhead", fullgraph=True)
    def compiled(a, h):
        return ops.rotate_add(a, weight, h, None, None)[0] * 2

    a, weight, h, _, _ = block(1, 1536, 576, torch.float16)  # so narrow that K is split
    cuda_decode.arrivals_of.cache_clear()
    for seed in range(6):
        h = gaussian(1, 576, dtype=torch.float16, seed=seed)
        actual = compiled(a, h).clone()
        assert torch.equal(actual, cuda_decode.rotate_add(a, weight, h, None, None)[0] * 2)


def test_overlapping_launches(monkeypatch):
    """With and without programmatic dependent launch: the same bits, also behind a kernel that is still writing."""
    results, here = [], cuda_decode.decode_device(torch.device("cuda", torch.cuda.current_device()))
    for overlap in (False, torch.cuda.get_device_capability() >= (9, 0)):
        device = replace(here, overlap=overlap)
        monkeypatch.setattr(cuda_decode, "decode_device", lambda _, device=device: device)
        arguments = list(inputs(1, 3072, 4096, 4096, torch.float16))
        arguments[0] = torch.zeros_like(arguments[0])
        torch.cuda._sleep(20_000_000)
        arguments[0].copy_(gaussian(1, 3072, dtype=torch.float16))
        y = cuda_decode.norm_linear(NormLinearInputs(*arguments))
        results.append(cuda_decode.rotate_add(y, gaussian(3072, 2048, dtype=torch.float16), arguments[0])[0])
    assert torch.equal(*results)


def test_two_streams():
    """Split launches on two streams at once do not count each other's blocks."""
    arguments = block(1, 1536, 576, torch.float16)
    expected = cuda_decode.rotate_add(*arguments)[0]
    torch.cuda.synchronize()
    streams, results = [torch.cuda.Stream(), torch.cuda.Stream()], []
    for _ in range(50):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(cuda_decode.rotate_add(*arguments)[0])
    torch.cuda.synchronize()
    assert all(torch.equal(result, expected) for result in results)
