"""The `gram_` operator: arithmetic on the CPU, argument checks, choice of implementation, compilation."""

import logging

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from slicegpt.errors import SliceGPTError
from slicegpt.hardware.devices import RATES
from slicegpt.ops import gram_, reference
from slicegpt.ops.cpu import gram as cpu_gram
from slicegpt.ops.cuda import extension as cuda_extension
from slicegpt.ops.gram import DISPATCHER, EXPECTED_PLANES, choose, choose_precision, is_supported

EPS = 2.0**-53
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def normal(tokens: int, columns: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, columns, generator=generator, dtype=torch.float64).to(dtype)


def identity(columns: int) -> torch.Tensor:
    return torch.eye(columns, dtype=torch.float64)


def assert_close_to_longdouble(C, start, X, weight=None) -> None:
    """np.longdouble rounds 2048 times finer than float64; N + 2 roundings in any order are at most (N + 2)·eps."""
    x = X.double().numpy().astype(np.longdouble)
    w = np.ones(len(x)) if weight is None else weight.double().numpy()
    x[w == 0] = 0
    expected = start.numpy() + (x * w[:, None]).T @ x
    magnitude = np.abs(start.numpy()) + np.abs(x * w[:, None]).T @ np.abs(x)
    assert (np.abs(C.numpy() - expected) <= (len(x) + 3) * EPS * magnitude).all()
    assert torch.equal(C, C.T)


@pytest.fixture(params=["auto", "reference"])
def cpu_backend(request, monkeypatch):
    """What a CPU takes by itself, its kernels where they are built; and plain PyTorch."""
    monkeypatch.setenv("SLICEGPT_BACKEND", request.param)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "columns"), [(1, 1), (127, 63), (1000, 1), (300, 577)])
def test_against_longdouble(cpu_backend, tokens, columns, dtype):
    X = normal(tokens, columns, dtype)
    C = identity(columns)
    gram_(C, X)
    assert_close_to_longdouble(C, identity(columns), X)


def test_more_than_one_chunk(monkeypatch):
    monkeypatch.setenv("SLICEGPT_BACKEND", "reference")
    monkeypatch.setattr(reference, "MIN_CHUNK_TOKENS", 7)
    monkeypatch.setattr(reference, "CHUNK_ELEMENTS", 1)
    X, weight = normal(50, 20, torch.float32), torch.arange(50) % 2 == 0
    C = identity(20)
    gram_(C, X, weight)
    assert_close_to_longdouble(C, identity(20), X, weight)


@pytest.mark.parametrize("weight_dtype", [torch.bool, torch.int64, torch.float16, torch.float64])
@pytest.mark.parametrize("strided", ["columns", "rows", "transposed", "expanded"])
def test_strides_and_weights(cpu_backend, strided, weight_dtype):
    base = normal(100, 100, torch.float16)
    X = {
        "columns": base[:, ::3],
        "rows": base[::2],
        "transposed": base.T,
        "expanded": base[:1].expand(30, 100),
    }[strided]
    weight = (torch.arange(2 * len(X)) % 3).to(weight_dtype)[::2]
    C = identity(X.shape[1])
    gram_(C, X, weight)
    assert_close_to_longdouble(C, identity(X.shape[1]), X, weight)


@pytest.mark.parametrize("precision", ["auto", "fp64", "exact"])
def test_every_precision_but_fast_is_float64_on_the_cpu(cpu_backend, precision):
    X = normal(60, 9, torch.float16)
    C = torch.zeros(9, 9, dtype=torch.float64)
    gram_(C, X, precision=precision)
    assert_close_to_longdouble(C, torch.zeros_like(C), X)


def test_huge_range_is_kept(cpu_backend):
    X = torch.tensor([[6e-8, 65504.0], [65504.0, 0.0]], dtype=torch.float16)
    C = torch.zeros(2, 2, dtype=torch.float64)
    gram_(C, X)
    assert C[0, 1] == float(X[0, 0]) * 65504


def test_infinities_and_nans_arrive_as_nan(cpu_backend):
    X = normal(40, 300, torch.float32)
    X[3, 1], X[7, 250] = torch.inf, torch.nan
    C = torch.zeros(300, 300, dtype=torch.float64)
    gram_(C, X)
    hit = torch.zeros(300, dtype=torch.bool)
    hit[[1, 250]] = True
    assert torch.equal(C.isnan(), hit[:, None] | hit[None, :])
    keep = torch.ones(40, dtype=torch.bool)
    keep[[3, 7]] = False
    C = torch.zeros(300, 300, dtype=torch.float64)
    gram_(C, X, keep)
    assert_close_to_longdouble(C, torch.zeros_like(C), X.nan_to_num(0, 0, 0), keep)


def test_empty_changes_nothing(cpu_backend):
    for tokens, columns in ((0, 4), (3, 0), (0, 0)):
        C = torch.full((columns, columns), 2.5, dtype=torch.float64)
        gram_(C, torch.zeros(tokens, columns))
        assert C.eq(2.5).all()


def test_same_bits_every_time(cpu_backend):
    X, weight = normal(3000, 300, torch.float32), torch.rand(3000)
    results = []
    for _ in range(3):
        C = torch.zeros(300, 300, dtype=torch.float64)
        gram_(C, X, weight)
        results.append(C)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    tokens=st.integers(0, 40),
    columns=st.integers(1, 30),
    split=st.integers(0, 40),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
def test_streaming_in_two_calls_is_one_sum(tokens, columns, split, dtype, seed):
    X = normal(tokens, columns, dtype, seed)
    C = torch.zeros(columns, columns, dtype=torch.float64)
    gram_(C, X[:split])
    gram_(C, X[split:])
    if tokens:
        assert_close_to_longdouble(C, torch.zeros_like(C), X)
    else:
        assert C.eq(0).all()


# --- errors -------------------------------------------------------------------------------------------------

C = torch.zeros(4, 4, dtype=torch.float64)
X = torch.zeros(7, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((C[:3], X), r"gram_: C must be square \[D, D\], got \[3, 4\]"),
        ((C.float(), X), "gram_: C must be float64, got torch.float32"),
        ((torch.zeros(8, 8).double()[::2, ::2], X), r"gram_: C must be contiguous, got strides \(16, 2\)"),
        ((C, X[0]), r"gram_: X must be \[N, D\], got \[4\]"),
        ((C, X[:, :3]), "gram_: X must have C's 4 columns, got 3"),
        ((C, X.long()), "gram_: X must be one of float16, .* for precision 'auto', got torch.int64"),
        ((C, X.to("meta")), "gram_: X must be on C's device cpu, got meta"),
        ((C, C), "gram_: X must not share memory with C"),
        ((C, X, torch.ones(6)), r"gram_: weight must be \[N\] for X's 7 tokens, got \[6\]"),
        ((C, X, torch.ones(7, 1)), r"gram_: weight must be \[N\] for X's 7 tokens, got \[7, 1\]"),
        ((C, X, torch.ones(7, dtype=torch.complex64)), "gram_: weight must be real, got torch.complex64"),
        ((C, X[:4], C[0]), "gram_: weight must not share memory with C"),
        ((C, X, None, "double"), "gram_: precision must be one of auto, fp64, exact, fast, got 'double'"),
        ((C, X.double(), None, "exact"), "gram_: X must be one of .* for precision 'exact', got torch.float64"),
        ((C, X.double(), None, "fast"), "gram_: X must be one of float16, .*, float32 for precision 'fast'"),
    ],
)  # fmt: skip
def test_errors_name_the_argument(arguments, message):
    with pytest.raises(SliceGPTError, match=message):
        gram_(*arguments)


def test_the_backend_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("SLICEGPT_BACKEND", "reference")
    gram_(C.clone(), X)
    monkeypatch.setenv("SLICEGPT_BACKEND", "triton")
    with pytest.raises(
        SliceGPTError, match=r"backend 'triton' does not take torch.float32, precision 'fp64' on a CPU"
    ):
        gram_(C.clone(), X)
    monkeypatch.setenv("SLICEGPT_BACKEND", "tritn")
    with pytest.raises(SliceGPTError, match=r"SLICEGPT_BACKEND must be one of auto, .*, got 'tritn'"):
        gram_(C.clone(), X)


# --- choosing an implementation -----------------------------------------------------------------------------


def test_auto_precision_follows_the_device_and_the_shape():
    half = torch.bfloat16
    for capability in RATES:
        assert choose_precision(capability, torch.float64, 4096) == "fp64"
    # float64 tensor cores: cutting a narrow X into planes costs more than multiplying it
    assert choose_precision((9, 0), half, 256) == "fp64"
    assert choose_precision((9, 0), half, 8192) == "exact"
    assert choose_precision((9, 0), half, 8192, float_weight=True) == "fp64"
    # next to no float64
    for capability in ((7, 5), (8, 6), (8, 9), (12, 0), (99, 0)):
        assert choose_precision(capability, half, 576) == "exact"
        assert choose_precision(capability, half, 576, float_weight=True) == "exact"


@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_expected_planes_are_those_of_gaussian_activations(dtype):
    """The rules of both kernels for two groups of 128 columns: bits of a sum, and 8-bit moduli that carry them.

    float16's smallest numbers bound the bits. Those of the other dtypes are decided by the smallest of two million
    numbers a group: one plane more or less.
    """
    x = normal(1 << 14, 256, dtype).double()
    mantissa, exponent = torch.frexp(x)
    # |x| is an odd integer times 2^lowest: 53 bits of mantissa hold every 24-bit one.
    integers = (mantissa.abs() * 2.0**53).long()
    lowest = exponent - 53 + torch.frexp((integers & -integers).double())[1] - 1
    present = x != 0
    scale = lowest.where(present, 1 << 20).amin(0)
    bits = exponent.where(present, -(1 << 20)).amax(0) - scale  # of a column's integers
    norms = torch.ldexp(x.square().sum(0).sqrt(), -scale).log2()
    group = [bits.view(2, 128).amax(1), norms.view(2, 128).amax(1)]
    moduli = torch.tensor([256.0, 255, 253, 251, 247, 241, 239, 233, 229, 227, 223, 217, 211, 199, 197, 193])
    carried = moduli.double().log2().cumsum(0)  # bits of twice a sum's magnitude
    triton = [int((carried < i + j + 14 + 1).sum()) + 1 for i in group[0] for j in group[0]]
    cuda = [int((carried < i + j + 1).sum()) + 1 for i in group[1] for j in group[1]]
    spread = 0 if dtype == torch.float16 else 1
    assert abs(np.median(triton) - EXPECTED_PLANES["triton"][dtype]) <= spread
    assert abs(np.median(cuda) - EXPECTED_PLANES["cuda"][dtype]) <= spread


def test_each_backend_is_estimated_by_its_own_planes():
    """Where float16 on an H100 pays is not the same for 8 planes and for 9."""
    here = [columns for columns in range(512, 1025, 8)]
    taken = {
        name: [choose_precision((9, 0), torch.float16, columns, implementation=name) for columns in here]
        for name in ("cuda", "triton")
    }
    assert taken["cuda"].index("exact") < taken["triton"].index("exact")


def test_choice_falls_through_the_backends(monkeypatch):
    monkeypatch.setattr(cuda_extension, "is_available", lambda *_: False)
    monkeypatch.setattr(cpu_gram, "is_supported", lambda dtype, fast: False)
    DISPATCHER.forget()
    assert choose("auto", None, torch.float32, 64, "auto") == ("reference", "fp64")
    assert choose("auto", (8, 9), torch.bfloat16, 4096, "auto") == ("triton", "exact")
    assert choose("auto", (7, 5), torch.float16, 4096, "auto") == ("reference", "exact")
    assert choose("triton", (7, 5), torch.float16, 4096, "auto") == ("triton", "fp64")
    assert choose("auto", (9, 0), torch.bfloat16, 4096, "fast") == ("triton", "fast")
    with pytest.raises(
        SliceGPTError, match=r"backend 'cuda' does not take .*, precision 'fp64' on compute capability 9.0"
    ):
        choose("cuda", (9, 0), torch.float32, 64, "fp64")
    monkeypatch.setattr(cuda_extension, "is_available", lambda *_: True)
    DISPATCHER.forget()
    assert choose("auto", (7, 5), torch.float16, 4096, "auto") == ("cuda", "exact")
    DISPATCHER.forget()


def test_is_supported():
    assert is_supported(None, torch.bfloat16)
    assert is_supported(None, torch.float64)
    assert not is_supported(None, torch.float64, "exact")
    assert not is_supported(None, torch.float32, backend="triton")
    assert not is_supported((9, 0), torch.float64, "fast")
    assert not is_supported((9, 0), torch.float32, "fast", "triton")
    assert not is_supported(None, torch.int8)


def test_the_choice_is_logged_once(monkeypatch, caplog):
    monkeypatch.setenv("SLICEGPT_BACKEND", "reference")
    DISPATCHER.forget()
    with caplog.at_level(logging.INFO, logger="slicegpt"):
        for _ in range(3):
            gram_(C.clone(), X)
    assert caplog.messages == ["gram_: torch.float32, precision 'fp64' on a CPU: reference"]


# --- torch.compile, and the GPU -----------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [None, torch.rand(7)])
def test_opcheck(weight):
    torch.library.opcheck(torch.ops.slicegpt.gram_.default, (C.clone(), torch.rand(7, 4), weight, "auto"))


def test_compiles_without_graph_breaks():
    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def update(total, stream, keep):
        gram_(total, stream + 1, keep)
        return total.trace()

    for tokens in (7, 11):
        total, stream = C.clone(), torch.rand(tokens, 4)
        keep = torch.arange(tokens) > 2
        trace = update(total, stream, keep)
        assert_close_to_longdouble(total, C, stream + 1, keep)
        assert trace == total.trace()


def test_wrong_shapes_are_told_while_tracing():
    @torch.compile(fullgraph=True, backend="aot_eager")
    def update(total, stream):
        gram_(total, stream)

    with pytest.raises(Exception, match="X must have C's 4 columns, got 3"):
        update(C.clone(), X[:, :3])


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("precision", ["fp64", "exact", "fast"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "columns"), [(1, 1), (127, 63), (3000, 577)])
def test_on_the_gpu(monkeypatch, backend, precision, dtype, tokens, columns):
    if not is_supported(torch.cuda.get_device_capability(), dtype, precision, backend):
        pytest.skip("not supported")
    monkeypatch.setenv("SLICEGPT_BACKEND", backend)
    x, keep = normal(tokens, columns, dtype), torch.arange(tokens) % 5 != 1
    total = identity(columns).cuda()
    gram_(total, x.cuda(), keep.cuda(), precision)
    kept = x[keep].double()
    expected = identity(columns) + kept.T @ kept
    magnitude = identity(columns) + kept.abs().T @ kept.abs()
    # fast: float32 sums of at most 64 products between promotions. Else N sums and a product in any order, and as much
    # again for what is expected: a longdouble product of this size takes half a minute.
    tolerance = 64 * 2.0**-24 if precision == "fast" else 2 * (tokens + 3) * EPS
    assert ((total.cpu() - expected).abs() <= tolerance * magnitude).all()
    assert torch.equal(total, total.T)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("precision", ["fp64", "exact", "fast"])
def test_a_cuda_graph_replays_on_new_data(monkeypatch, backend, precision):
    if not is_supported(torch.cuda.get_device_capability(), torch.float16, precision, backend):
        pytest.skip("not supported")
    monkeypatch.setenv("SLICEGPT_BACKEND", backend)
    x = normal(500, 130, torch.float16).cuda()
    total = torch.zeros(130, 130, dtype=torch.float64, device="cuda")
    gram_(total, x, precision=precision)  # compiles, and fills caches of constants
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gram_(total, x, precision=precision)
    # New data with a wider span than what was captured: decisions belong to the device.
    x.copy_(normal(500, 130, torch.float16, seed=1) * torch.logspace(-3, 3, 500)[:, None])
    total.zero_()
    graph.replay()
    expected = torch.zeros_like(total)
    gram_(expected, x, precision=precision)
    assert torch.equal(total, expected)
