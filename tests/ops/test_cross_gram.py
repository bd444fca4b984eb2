"""The `cross_gram_` operator: arithmetic on the CPU, argument checks, the Triton kernel, tracing."""

import numpy as np
import pytest
import torch

from slicegpt.errors import SliceGPTError
from slicegpt.ops import cross_gram_, gram_, reference
from slicegpt.ops.cpu import gram as cpu_gram
from slicegpt.ops.cross_gram import DISPATCHER, is_supported

EPS = 2.0**-53
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def normal(tokens: int, columns: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, columns, generator=generator, dtype=torch.float64).to(dtype)


def expectation(start, A, B, weight=None) -> tuple[np.ndarray, np.ndarray]:
    """The result in np.longdouble, which rounds 2048 times finer than float64, and the sum of magnitudes."""
    a, b = (X.double().numpy().astype(np.longdouble) for X in (A, B))
    w = np.ones(len(a)) if weight is None else weight.double().numpy()
    a[w == 0], b[w == 0] = 0, 0
    a = a * w[:, None]
    return start.numpy() + a.T @ b, np.abs(start.numpy()) + np.abs(a).T @ np.abs(b)


def assert_close_to_longdouble(
    C, start, A, B, weight=None, unit: float = EPS, sums: int | None = None
) -> None:
    """N sums and two products, in any order, are at most (N + 3) roundings relative to the magnitudes."""
    expected, magnitude = expectation(start, A, B, weight)
    sums = len(A) if sums is None else sums
    assert (np.abs(C.numpy() - expected) <= (sums + 3) * unit * magnitude).all()


@pytest.fixture(params=["auto", "reference"])
def cpu_backend(request, monkeypatch):
    """What a CPU takes by itself, its kernels where they are built; and plain PyTorch."""
    monkeypatch.setenv("SLICEGPT_BACKEND", request.param)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "rows", "columns"), [(1, 1, 1), (127, 63, 5), (300, 7, 577)])
def test_against_longdouble(cpu_backend, tokens, rows, columns, dtype):
    A, B = normal(tokens, rows, dtype), normal(tokens, columns, dtype, seed=1)
    start = normal(rows, columns, torch.float64, seed=2)
    C = start.clone()
    cross_gram_(C, A, B)
    assert_close_to_longdouble(C, start, A, B)


@pytest.mark.parametrize("weight_dtype", [torch.bool, torch.int64, torch.float64])
def test_chunks_strides_and_weights(monkeypatch, cpu_backend, weight_dtype):
    monkeypatch.setattr(reference, "MIN_CHUNK_TOKENS", 7)
    monkeypatch.setattr(reference, "CHUNK_ELEMENTS", 1)
    A, B = normal(100, 24, torch.float32)[::2, ::3], normal(9, 50, torch.float32, seed=1).T
    weight = (torch.arange(100) % 3).to(weight_dtype)[::2]
    A[weight == 0] = torch.inf  # an absent token may hold anything
    start = torch.ones(8, 9, dtype=torch.float64)
    C = start.clone()
    cross_gram_(C, A, B, weight)
    assert_close_to_longdouble(C, start, A, B, weight)


def test_of_one_matrix_it_is_the_gram(cpu_backend):
    X = normal(400, 30, torch.float16)
    C, G = (torch.zeros(30, 30, dtype=torch.float64) for _ in range(2))
    cross_gram_(C, X, X)
    gram_(G, X)
    # Two correct results, each within 401 roundings of the truth.
    assert ((C - G).abs() <= 802 * EPS * (X.double().abs().T @ X.double().abs())).all()


@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_fast_is_float32_within_a_chunk(cpu_backend, dtype):
    """At most 4096 float32 additions are relative to the magnitudes; the chunks' sums are added in float64."""
    A, B = normal(5000, 40, dtype), normal(5000, 30, dtype, seed=1)
    start = torch.zeros(40, 30, dtype=torch.float64)
    C = start.clone()
    cross_gram_(C, A, B, precision="fast")
    assert_close_to_longdouble(C, start, A, B, unit=2.0**-24, sums=4096)
    expected, magnitude = expectation(start, A, B)
    assert np.abs(C.numpy() - expected).max() <= 1e-6 * magnitude.max()  # in practice


@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_fast_gram_is_float32_within_a_chunk(cpu_backend, dtype):
    X, weight = normal(5000, 130, dtype), torch.arange(5000) % 4 != 1
    C = torch.zeros(130, 130, dtype=torch.float64)
    gram_(C, X, weight, "fast")
    assert_close_to_longdouble(C, torch.zeros_like(C), X, X, weight, unit=2.0**-24, sums=4096)
    assert torch.equal(C, C.T)


def test_infinities_and_nans_arrive_as_nan(cpu_backend):
    A, B = normal(40, 6, torch.float32), normal(40, 5, torch.float32, seed=1)
    A[3, 1], B[7, 4] = torch.inf, torch.nan
    C = torch.zeros(6, 5, dtype=torch.float64)
    cross_gram_(C, A, B)
    expected = torch.zeros(6, 5, dtype=torch.bool)
    expected[1], expected[:, 4] = True, True
    assert torch.equal(C.isnan(), expected)


def test_empty_changes_nothing(cpu_backend):
    for tokens, rows, columns in ((0, 4, 3), (3, 0, 2), (3, 2, 0)):
        C = torch.full((rows, columns), 2.5, dtype=torch.float64)
        cross_gram_(C, torch.zeros(tokens, rows), torch.zeros(tokens, columns))
        assert C.eq(2.5).all()


C = torch.zeros(4, 3, dtype=torch.float64)
A, B = torch.zeros(7, 4), torch.zeros(7, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((C[0], A, B), r"cross_gram_: C must be \[K, D\], got \[3\]"),
        ((C.float(), A, B), "cross_gram_: C must be float64, got torch.float32"),
        ((torch.zeros(3, 4).double().T, A, B), "cross_gram_: C must be contiguous, got strides"),
        ((C, A[0], B), r"cross_gram_: A must be two-dimensional, got \[4\]"),
        ((C, A[:, :3], B), r"cross_gram_: A must have as many columns as C has rows \(4\), got 3"),
        ((C, A, A), r"cross_gram_: B must have as many columns as C has columns \(3\), got 4"),
        ((C, A, B[:6]), "cross_gram_: B must have A's 7 tokens, got 6"),
        ((C, A, B.double()), "cross_gram_: B must have A's dtype torch.float32, got torch.float64"),
        ((C, A.to("meta"), B), "cross_gram_: A must be on C's device cpu, got meta"),
        ((C, A.long(), B.long()), "cross_gram_: A must be one of float16, .* got torch.int64"),
        ((C, A, B, None, "exact"), "cross_gram_: precision must be one of fp64, fast, got 'exact'"),
        ((C, A.double(), B.double(), None, "fast"), "cross_gram_: A must be one of .* precision 'fast'"),
        ((C, A, B, torch.ones(6)), r"cross_gram_: weight must be \[N\] for A's 7 tokens, got \[6\]"),
        ((C, A, B, torch.ones(7, dtype=torch.complex64)), "cross_gram_: weight must be real"),
        ((C, C, B[:4].double()), "cross_gram_: A must have as many columns"),
        ((C.T.contiguous()[:, :3], *[C.T.contiguous()[:, :3]] * 2), "cross_gram_: C must be contiguous"),
    ],
)  # fmt: skip
def test_errors_name_the_argument(arguments, message):
    with pytest.raises(SliceGPTError, match=message):
        cross_gram_(*arguments)


def test_shared_memory_is_refused():
    square = torch.zeros(3, 3, dtype=torch.float64)
    with pytest.raises(SliceGPTError, match="cross_gram_: B must not share memory with C"):
        cross_gram_(square, torch.zeros(3, 3, dtype=torch.float64), square)


def test_choice_and_support(monkeypatch):
    monkeypatch.setattr(cpu_gram, "is_supported", lambda dtype, fast: False)
    find = DISPATCHER.find
    assert find("auto", None, torch.float32, "fast") == "reference"
    assert find("auto", (9, 0), torch.float32, "fast") == "reference"  # half precision only on tensor cores
    assert not is_supported(None, torch.float64, "fast")
    assert not is_supported(None, torch.float32, backend="triton")
    monkeypatch.setenv("SLICEGPT_BACKEND", "triton")
    with pytest.raises(SliceGPTError, match=r"backend 'triton' does not take .*, precision 'fp64' on a CPU"):
        cross_gram_(C.clone(), A, B)
    pytest.importorskip("triton")
    assert find("auto", (9, 0), torch.bfloat16, "fast") == "triton"
    assert find("auto", (8, 9), torch.float32, "fp64") == "triton"


@pytest.mark.parametrize("capability", [None, (9, 0)])
@pytest.mark.parametrize("precision", ["fp64", "fast"])
def test_without_a_cuda_form_that_backend_means_auto(capability, precision):
    """SLICEGPT_BACKEND=cuda slices: the covariance by CUDA, what has no such kernel as well as it can."""
    for dtype in DTYPES[: 4 if precision == "fp64" else 3]:
        assert is_supported(capability, dtype, precision, backend="cuda")
        assert DISPATCHER.find("cuda", capability, dtype, precision) == DISPATCHER.find(
            "auto", capability, dtype, precision
        )


def test_a_requested_backend_that_is_not_there_is_logged(monkeypatch, caplog):
    monkeypatch.setenv("SLICEGPT_BACKEND", "cuda")
    DISPATCHER.forget()
    total = C.clone()
    with caplog.at_level("INFO", logger="slicegpt"):
        for _ in range(2):
            cross_gram_(total, A + 1, B + 1)
    name = DISPATCHER.find("auto", None, torch.float32, "fp64")
    assert caplog.messages == [
        f"cross_gram_: torch.float32, precision 'fp64' on a CPU: {name} (it has no 'cuda' implementation)"
    ]
    assert total.eq(14).all()


@pytest.mark.parametrize("weight", [None, torch.rand(7)])
def test_opcheck(weight):
    torch.library.opcheck(torch.ops.slicegpt.cross_gram_.default, (C.clone(), A + 1, B + 1, weight, "fp64"))


def test_compiles_without_graph_breaks():
    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def update(total, left, right):
        cross_gram_(total, left + 1, right)
        return total.sum()

    for tokens in (7, 11):
        total, left, right = C.clone(), torch.rand(tokens, 4), torch.rand(tokens, 3)
        assert update(total, left, right) == total.sum()
        assert_close_to_longdouble(total, C, left + 1, right)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp64", "fast"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "rows", "columns"), [(1, 1, 1), (127, 63, 5), (3000, 577, 130)])
def test_on_the_gpu(monkeypatch, precision, dtype, tokens, rows, columns):
    if not is_supported(torch.cuda.get_device_capability(), dtype, precision, "triton"):
        pytest.skip("not supported")
    monkeypatch.setenv("SLICEGPT_BACKEND", "triton")
    left, right = normal(tokens, rows, dtype), normal(tokens, columns, dtype, seed=1)
    keep = torch.arange(tokens) % 5 != 1
    total = torch.zeros(rows, columns, dtype=torch.float64, device="cuda")
    cross_gram_(total, left.cuda(), right.cuda(), keep.cuda(), precision)
    left, right = left[keep].double(), right[keep].double()
    # As in tests/ops/test_gram.py: the float64 product that is expected errs as much.
    tolerance = 67 * 2.0**-24 if precision == "fast" else 2 * (tokens + 3) * EPS
    assert ((total.cpu() - left.T @ right).abs() <= tolerance * (left.abs().T @ right.abs())).all()
