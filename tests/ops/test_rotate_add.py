"""The `rotate_add` operator: arithmetic on the CPU, argument checks, compilation."""

import contextlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slicegpt.errors import SliceGPTError
from slicegpt.ops import norm_linear, reference, rotate_add
from slicegpt.ops.contracts import sumsq_dtype
from slicegpt.ops.cuda import decode as cuda_decode
from slicegpt.ops.rotate_add import DISPATCHER, is_supported, reads_factor

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def normal(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def expected(a, weight, h, shortcut, bias) -> torch.Tensor:
    """The definition in float64, an absent shortcut written out as [I, 0]."""
    if shortcut is None:
        shortcut = torch.eye(len(weight), h.shape[1])
    total = torch.einsum("tk,nk->tn", a.double(), weight.double())
    total = total + torch.einsum("td,nd->tn", h.double(), shortcut.double())
    return total if bias is None else total + bias.double()


def assert_close(actual, a, weight, h, shortcut, bias) -> None:
    """One rounding to the storage dtype; the CPU's 16-bit form rounds the base before (and h + bias before that).

    Every rounding is at most eps / 2 of a sum no larger than the magnitudes below; the accumulation adds a rounding
    of float32 (float64) for each of the K + d products.
    """
    h_next, sums = actual
    wanted = expected(a, weight, h, shortcut, bias)
    magnitude = expected(
        a.abs(),
        weight.abs(),
        h.abs(),
        None if shortcut is None else shortcut.abs(),
        None if bias is None else bias.abs(),
    )
    wide = sumsq_dtype(h.dtype)
    accumulated = (a.shape[1] + h.shape[1]) * torch.finfo(wide).eps
    assert h_next.dtype == h.dtype
    assert (
        (h_next.double() - wanted).abs() <= (1.5 * torch.finfo(h.dtype).eps + accumulated) * magnitude
    ).all()

    # The sums are those of what is stored: 32 squares and 32 additions, each one rounding.
    assert sums.dtype == wide
    assert sums.shape == (len(h), -(-len(weight) // 32))
    for block in range(sums.shape[1]):
        exact = h_next[:, 32 * block : 32 * block + 32].double().square().sum(dim=1)
        assert ((sums[:, block].double() - exact).abs() <= 64 * torch.finfo(wide).eps * exact).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize(("columns", "width"), [(45, 67), (67, 67), (90, 67)])
def test_against_the_definition(monkeypatch, backend, rows, columns, width, dtype):
    monkeypatch.setenv("SLICEGPT_BACKEND", backend)
    a, weight = normal(rows, 50, dtype=dtype), normal(columns, 50, dtype=dtype, seed=1)
    h, dense = normal(rows, width, dtype=dtype, seed=2), normal(columns, width, dtype=dtype, seed=3)
    for bias in (None, normal(columns, dtype=dtype, seed=4)):
        for shortcut in (dense, None) if columns >= width else (dense,):
            actual = rotate_add(a, weight, h, shortcut, bias)
            assert_close(actual, a, weight, h, shortcut, bias)
            assert all(tensor.is_contiguous() for tensor in actual)


@pytest.mark.parametrize("rows", [1, 5])
def test_a_compact_shortcut_is_the_dense_one(rows):
    """`[a | h F] [W | -F]ᵀ + h`, the two operators together, is `a Wᵀ + h (I - F Fᵀ)`."""
    width, rank = 48, 10
    h, factor = normal(rows, width, dtype=torch.float64), normal(width, rank, dtype=torch.float64, seed=1)
    inner, outer = (
        normal(30, width, dtype=torch.float64, seed=2),
        normal(width, 30, dtype=torch.float64, seed=3),
    )
    a = norm_linear(h, torch.cat((inner, factor.T)), None, None, 30, "silu", width, 1e-5)
    compact, _ = rotate_add(a, torch.cat((outer, -factor), dim=1), h)
    shortcut = torch.eye(width, dtype=torch.float64) - factor @ factor.T
    dense, _ = rotate_add(a[:, :30], outer, h, shortcut)
    assert torch.allclose(compact, dense, rtol=1e-12, atol=1e-12)


def compact(rows, columns, dtype, seed=0):
    """Arguments of width 48, rank 10, and the factor as the last rows of `norm_linear`'s weight."""
    rows_of_both = normal(37, 48, dtype=dtype, seed=seed)
    factor, outer = rows_of_both[27:], normal(columns, 24, dtype=dtype, seed=seed + 1)
    back = torch.nn.functional.pad(-factor.T, (0, 0, 0, columns - 48))
    a, h = normal(rows, 34, dtype=dtype, seed=seed + 2), normal(rows, 48, dtype=dtype, seed=seed + 3)
    return (a, torch.cat((outer, back), dim=1), h, None, normal(columns, dtype=dtype, seed=seed + 4)), factor


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("rows", [0, 1, 5, 20])
def test_a_cpu_ignores_the_factor(monkeypatch, backend, rows, dtype):
    monkeypatch.setenv("SLICEGPT_BACKEND", backend)
    arguments, factor = compact(rows, 60, dtype)
    assert all(map(torch.equal, rotate_add(*arguments, factor * torch.nan), rotate_add(*arguments)))
    assert not reads_factor(arguments[1], factor, rows)


@pytest.mark.parametrize("backend", ["cuda", "triton", "epilogue", "cpu"])
def test_only_the_decode_kernels_get_the_factor(monkeypatch, backend):
    seen = []

    def record(*arguments):
        seen.append(arguments)
        return reference.rotate_add(*arguments[:5])

    monkeypatch.setattr(cuda_decode, "takes_factor", lambda weight, factor: len(factor) < 10)
    monkeypatch.setattr(DISPATCHER, "choose", lambda *_: backend)
    monkeypatch.setattr(DISPATCHER, "launcher", lambda *_: record)
    monkeypatch.setattr(torch.cuda, "device", lambda *_: contextlib.nullcontext())
    arguments, factor = compact(2, 48, torch.float32)
    rotate_add(*arguments, factor)
    rotate_add(*arguments)
    assert [len(call) for call in seen] == [6 if backend == "cuda" else 5] * 2
    if backend == "cuda":
        assert seen[0][5].data_ptr() == factor.data_ptr()  # no copy: L2 knows it by its address
        assert seen[1][5] is None
    assert not reads_factor(arguments[1], factor)
    assert reads_factor(arguments[1], factor[1:]) == (backend == "cuda")


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    rows=st.integers(0, 20),
    inner=st.integers(1, 40),
    columns=st.integers(1, 70),
    width=st.integers(1, 70),
    dense=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape(rows, inner, columns, width, dense, dtype):
    columns = columns if dense else max(columns, width)
    a, weight = normal(rows, inner, dtype=dtype), normal(columns, inner, dtype=dtype, seed=1)
    h = normal(rows, width, dtype=dtype, seed=2)
    shortcut = normal(columns, width, dtype=dtype, seed=3) if dense else None
    assert_close(rotate_add(a, weight, h, shortcut), a, weight, h, shortcut, None)


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_strided_arguments_and_nothing_is_changed(rows, dtype):
    source = normal(rows, 200, dtype=dtype)
    a, h = source[:, 3:33], source[:, 40:80]
    weight, shortcut = normal(30, 50, dtype=dtype, seed=1).T, normal(100, 40, dtype=dtype, seed=2)[::2]
    bias = normal(100, dtype=dtype, seed=3)[::2]
    before = source.clone()
    first, second = (rotate_add(a, weight, h, shortcut, bias) for _ in range(2))
    assert_close(first, a, weight, h, shortcut, bias)
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))
    assert torch.equal(source, before)


# --- errors -------------------------------------------------------------------------------------------------

A, W, H, S = torch.ones(3, 4), torch.ones(6, 4), torch.ones(3, 5), torch.ones(6, 5)
F = torch.ones(2, 5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"a": A[0]}, r"rotate_add: a must be \[T, K\], got \[4\]"),
        ({"a": A.int()}, "rotate_add: a must be float16, .*, got torch.int32"),
        ({"weight": W[:, :3]}, r"rotate_add: weight must be \[d', K\] for a's 4 columns, got \[6, 3\]"),
        ({"h": H[:2]}, r"rotate_add: h must be \[T, d\] for a's 3 rows, got \[2, 5\]"),
        ({"h": H.half()}, "rotate_add: h must have a's dtype torch.float32, got torch.float16"),
        ({"shortcut": S.T}, r"rotate_add: shortcut must be \[d', d\] = \[6, 5\], got \[5, 6\]"),
        ({"shortcut": S.to("meta")}, "rotate_add: shortcut must be on a's device cpu, got meta"),
        ({"shortcut": None, "weight": W[:4]}, "weight must have at least h's 5 columns as rows .*, got 4"),
        ({"bias": torch.ones(5)}, r"rotate_add: bias must be \[d'\] = \[6\], got \[5\]"),
        ({"factor": F}, r"rotate_add: factor must be None beside a dense shortcut, got \[2, 5\]"),
        (
            {"shortcut": None, "factor": F[:, :4]},
            r"factor must be \[r, d\] for at most a's 4 and exactly h's 5 columns, got \[2, 4\]",
        ),
        (
            {"shortcut": None, "factor": torch.ones(5, 5)},
            r"factor must be \[r, d\] for at most a's 4 and .*\[5, 5\]",
        ),
        ({"shortcut": None, "factor": F[0]}, r"factor must be \[r, d\] .*, got \[5\]"),
        (
            {"shortcut": None, "factor": F.half()},
            "factor must have a's dtype torch.float32, got torch.float16",
        ),
        ({"shortcut": None, "factor": F.to("meta")}, "factor must be on a's device cpu, got meta"),
    ],
)
def test_errors_name_the_argument(changes, message):
    arguments = {"a": A, "weight": W, "h": H, "shortcut": S, "bias": None}
    with pytest.raises(SliceGPTError, match=message):
        rotate_add(**(arguments | changes))


# --- torch.compile, and the GPU -----------------------------------------------------------------------------


@pytest.mark.parametrize("shortcut", [None, S])
@pytest.mark.parametrize("bias", [None, torch.ones(6)])
def test_opcheck(shortcut, bias):
    torch.library.opcheck(torch.ops.slicegpt.rotate_add.default, (A, W, H, shortcut, bias))


@pytest.mark.parametrize("rows", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_opcheck_with_a_factor(rows, dtype):
    arguments, factor = compact(rows, 60, dtype)
    torch.library.opcheck(torch.ops.slicegpt.rotate_add.default, (*arguments, factor))


def test_compiles_without_graph_breaks():
    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def run(a, h):
        h_next, sums = rotate_add(a + 1, W, h, S)
        return norm_linear(h_next, W[:, :1].expand(-1, 6), None, sums, 6, "none", 6.0, 0.0)

    for rows in (3, 7):
        a, h = torch.rand(rows, 4), torch.rand(rows, 5)
        h_next, sums = rotate_add(a + 1, W, h, S)
        assert torch.equal(
            run(a, h), norm_linear(h_next, W[:, :1].expand(-1, 6), None, sums, 6, "none", 6.0, 0.0)
        )


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["auto", "cuda", "triton", "reference"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("rows", [1, 16, 17, 300])
def test_on_the_gpu(monkeypatch, backend, dtype, dense, rows):
    if not is_supported(torch.cuda.get_device_capability(), dtype, rows, backend):
        pytest.skip("not supported")
    monkeypatch.setenv("SLICEGPT_BACKEND", backend)
    a, weight = normal(rows, 301, dtype=dtype), normal(577, 301, dtype=dtype, seed=1)
    h, bias = normal(rows, 450, dtype=dtype, seed=2), normal(577, dtype=dtype, seed=4)
    shortcut = normal(577, 450, dtype=dtype, seed=3) if dense else None
    on_gpu = [None if tensor is None else tensor.cuda() for tensor in (a, weight, h, shortcut, bias)]
    h_next, sums = rotate_add(*on_gpu)
    assert_close((h_next.cpu(), sums.cpu()), a, weight, h, shortcut, bias)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["auto", "cuda", "triton", "reference"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [48, 60])
@pytest.mark.parametrize("rows", [1, 16, 17])
def test_a_factor_on_the_gpu(monkeypatch, backend, dtype, columns, rows):
    """Whoever reads it, and whoever does not: the same function."""
    if not is_supported(torch.cuda.get_device_capability(), dtype, rows, backend):
        pytest.skip("not supported")
    monkeypatch.setenv("SLICEGPT_BACKEND", backend)
    arguments, factor = compact(rows, columns, dtype)
    on_gpu = [None if tensor is None else tensor.cuda() for tensor in (*arguments, factor)]
    if reads_factor(on_gpu[1], on_gpu[5], rows):
        on_gpu[1][:, 24:] = torch.nan
    h_next, sums = rotate_add(*on_gpu)
    assert_close((h_next.cpu(), sums.cpu()), *arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 64])
def test_a_cuda_graph_replays_on_new_data(rows):
    a, weight = normal(rows, 300, dtype=torch.float16).cuda(), normal(576, 300, dtype=torch.float16).cuda()
    h = normal(rows, 576, dtype=torch.float16, seed=2).cuda()
    rotate_add(a, weight, h)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = rotate_add(a, weight, h)
    a.copy_(normal(rows, 300, dtype=torch.float16, seed=5))
    graph.replay()
    assert all(torch.equal(*pair) for pair in zip(captured, rotate_add(a, weight, h), strict=True))
