"""gram_'s CUDA kernels against float64 and against exact integers.

Bounds, with u = 2^-53 and A = |X|ᵀ diag|w| |X| (items of the matrix, so they hold item by item):
- float64 products and sums in any order: N products each rounded twice (weights) and N sums: (N + 2) u A;
  the reference is a float64 product as well: twice that.
- exact: one rounding of a block's integer to float64 (two for more than 64 bits), one of the sum with C for each block.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from slicegpt.errors import SliceGPTError
from slicegpt.ops.cuda import gram as cuda_gram

U = 2.0**-53
# fast: sums of 128 products in float32, and as much again from adding them up in pairs of float32.
FAST = 2 * 128 * 2.0**-24
HALF = (torch.float16, torch.bfloat16)
EXACT = (*HALF, torch.float32)
ALL = (*EXACT, torch.float64)
SHAPES = [(1, 1), (127, 63), (70, 130), (3, 257)]


def names(dtypes):
    return [str(dtype).removeprefix("torch.") for dtype in dtypes]


def surrounded(values, left=0, right=0):
    """`values` as a view into a wider matrix of NaNs: what lies beside a row must not be read into the result."""
    rows, columns = values.shape
    wide = torch.full((rows, left + columns + right), torch.nan, dtype=values.dtype)
    wide[:, left : left + columns] = values
    return wide[:, left : left + columns]


def gaussian(tokens, columns, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, columns, generator=generator, dtype=torch.float64).to(dtype)


def symmetric(columns):
    start = gaussian(columns, columns, torch.float64, seed=1)
    return start + start.T


def exact_gram(X):
    """XᵀX from exact integers (in units of 2^-149, float32's smallest number), rounded once to float64."""
    integers = np.vectorize(lambda x: int(math.ldexp(x, 149)), otypes=[object])(X.double().numpy())
    return torch.from_numpy(
        np.vectorize(lambda v: math.ldexp(v, -298), otypes=[float])(integers.T.dot(integers))
    )


def magnitudes(X, weight=None):
    absolute = X.double().abs()
    return absolute.T @ (absolute if weight is None else absolute * weight.double().abs()[:, None])


def assert_within(actual, expected, bound):
    assert torch.equal(actual, actual.T)
    error = (actual - expected).abs()
    assert (error <= bound).all(), f"error {(error / bound).max():.2f} times the bound"


@pytest.mark.parametrize(
    "target",
    ["sm_75", "sm_80", "sm_90", pytest.param("cuda", marks=pytest.mark.gpu)],
    indirect=True,
    scope="session",
)
@pytest.mark.parametrize("dtype", ALL, ids=names(ALL))
@pytest.mark.parametrize(("tokens", "columns"), SHAPES)
def test_fp64(backend, dtype, tokens, columns):
    X, C = gaussian(tokens, columns, dtype), symmetric(columns)
    result = backend.gram("fp64", C, X)
    expected = C + X.double().T @ X.double()
    assert_within(result, expected, 2 * (tokens + 2) * U * magnitudes(X) + 2 * U * (expected.abs() + C.abs()))


@pytest.mark.parametrize("dtype", EXACT, ids=names(EXACT))
@pytest.mark.parametrize(("tokens", "columns"), SHAPES)
def test_exact(backend, dtype, tokens, columns):
    X = gaussian(tokens, columns, dtype)
    result = backend.gram("exact", torch.zeros(columns, columns, dtype=torch.float64), X)
    # 200 x 130 is two blocks of tokens in the emulation, 500 x 5 two. A float32 column may hand single tokens over.
    assert_within(result, exact_gram(X), 8 * U * magnitudes(X))


@pytest.mark.parametrize("precision", ["fp64", "fast"])
def test_splits(backend, precision):
    """Enough tokens that several ranges of them are summed apart (the last one shorter) and then added."""
    X = gaussian(1100, 5, torch.float16)
    result = backend.gram(precision, torch.zeros(5, 5, dtype=torch.float64), X)
    rounding = FAST if precision == "fast" else 2 * 1102 * U
    assert_within(result, X.double().T @ X.double(), rounding * magnitudes(X))


@pytest.mark.parametrize("dtype", HALF, ids=names(HALF))
def test_exact_is_the_rounded_integer(backend, dtype):
    """One block, nothing handed over, at most 64 bits: the correctly rounded result, bit for bit."""
    X = (gaussian(60, 70, torch.float64) * 64).round().to(dtype)
    result = backend.gram("exact", torch.zeros(70, 70, dtype=torch.float64), X)
    assert torch.equal(result, exact_gram(X))


@pytest.mark.parametrize("precision", ["fp64", "exact", "fast"])
@pytest.mark.parametrize(
    ("left", "right"), [(0, 8), (8, 3), (1, 0)], ids=["aligned", "aligned-view", "unaligned"]
)
def test_strides(backend, precision, left, right):
    """A view gives the bits that the contiguous matrix gives, C a view too; nothing beside it is read or written."""
    X = gaussian(70, 133, torch.float16)
    wide = torch.full((140, 150), torch.nan, dtype=torch.float64)
    C = wide[3:136, 5:138]
    C.copy_(symmetric(133))
    contiguous = backend.gram(precision, C.contiguous(), X)
    assert torch.equal(backend.gram(precision, C, surrounded(X, left, right)), contiguous)


@pytest.mark.parametrize("precision", ["fp64", "exact", "fast"])
def test_weights(backend, precision):
    """0: absent, NaNs included; 1: as without weights; others: float64 products."""
    X, C = gaussian(150, 66, torch.float16), symmetric(66)
    weight = torch.rand(150, generator=torch.Generator().manual_seed(2))
    weight[::3] = 0
    weight[1::3] = 1
    X[0], X[3, 5], X[6, 7] = torch.nan, torch.inf, -torch.inf
    result = backend.gram(precision, C, X, weight)
    present = torch.where(weight[:, None] > 0, X.double(), 0)
    expected = C + present.T @ (present * weight.double()[:, None])
    rounding = FAST if precision == "fast" else 2 * 152 * U
    assert_within(
        result, expected, rounding * magnitudes(present, weight) + 4 * U * (expected.abs() + C.abs())
    )


@pytest.mark.parametrize("dtype", EXACT, ids=names(EXACT))
def test_mask_equals_selection(backend, dtype):
    """exact with a mask is exact on the rows that it leaves, bit for bit (one block each)."""
    X = gaussian(60, 20, dtype)
    mask = torch.arange(60) % 5 != 0
    C = torch.zeros(20, 20, dtype=torch.float64)
    assert torch.equal(backend.gram("exact", C, X, mask.float()), backend.gram("exact", C, X[mask]))


def test_float16_whole_range(backend):
    """From the smallest subnormal to the largest number in one column: 40 bits, nothing handed over, no loss."""
    X = torch.zeros(90, 3, dtype=torch.float16)
    X[:, 0] = torch.logspace(-24, 15.9, 90, base=2.0)
    X[0, 0], X[1, 0] = 6e-8, 65504
    X[:, 1] = X[:, 0].flip(0) * torch.tensor([1.0, -1.0], dtype=torch.float16).repeat(45)
    X[0, 2], X[5, 2] = 1, 6e-8
    result = backend.gram("exact", torch.zeros(3, 3, dtype=torch.float64), X)
    expected = exact_gram(X)
    assert_within(result, expected, 2 * U * expected.abs())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def test_span_beyond_the_window(backend, dtype):
    """Columns that no integer of 53 bits holds: the small products are not lost beside the large ones."""
    X = torch.zeros(40, 4, dtype=dtype)
    X[:, 0] = torch.logspace(-30, 30, 40)
    X[0, 1] = 1  # meets only the 1e-30 of column 0
    X[7:, 2] = gaussian(33, 1, dtype)[:, 0]
    X[:, 3] = torch.finfo(dtype).max / 2
    result = backend.gram("exact", torch.zeros(4, 4, dtype=torch.float64), X)
    assert_within(result, exact_gram(X), 44 * U * magnitudes(X))
    assert result[0, 1] == X[0, 0].double()


def test_widest_window(backend):
    """Every value just below 2^53 units, all signs equal: the largest integers that the moduli must hold."""
    X = torch.full((64, 2), 1 - 2.0**-24, dtype=torch.float32)
    X[0] = 2.0**-53
    X[:, 1] *= -1
    result = backend.gram("exact", torch.zeros(2, 2, dtype=torch.float64), X)
    expected = exact_gram(X)
    assert_within(result, expected, 4 * U * expected.abs())


@pytest.mark.parametrize("precision", ["fp64", "exact", "fast"])
def test_infinities_and_nans_arrive(backend, precision):
    X = gaussian(130, 40, torch.float16)
    X[3, 1], X[50, 20], X[129, 39] = torch.inf, torch.nan, -torch.inf
    result = backend.gram(precision, torch.zeros(40, 40, dtype=torch.float64), X)
    touched = torch.zeros(40, dtype=torch.bool)
    touched[[1, 20, 39]] = True
    outside = ~(touched[:, None] | touched)
    assert result[~outside].isnan().all()
    clean = X.double()[:, ~touched]
    rounding = FAST if precision == "fast" else 2 * 132 * U
    assert_within(result[outside].view(37, 37), clean.T @ clean, rounding * magnitudes(clean))


@pytest.mark.parametrize("precision", ["fp64", "exact", "fast"])
def test_nothing_to_add(backend, precision):
    """No tokens, no columns, only absent tokens, only zeros: C keeps its bits."""
    C = symmetric(6)
    for X in (torch.zeros(0, 6), torch.zeros(70, 6), torch.full((5, 6), -0.0)):
        assert torch.equal(backend.gram(precision, C, X.half()), C)
    assert torch.equal(backend.gram(precision, C, torch.full((9, 6), torch.nan).half(), torch.zeros(9)), C)
    assert backend.gram(precision, C[:0, :0], torch.zeros(7, 0).half()).shape == (0, 0)


def test_zero_columns(backend):
    X = gaussian(60, 140, torch.bfloat16)
    X[:, [0, 64, 139]] = 0
    result = backend.gram("exact", torch.zeros(140, 140, dtype=torch.float64), X)
    assert torch.equal(result, exact_gram(X))


@pytest.mark.parametrize("dtype", HALF, ids=names(HALF))
@pytest.mark.parametrize(("tokens", "columns"), SHAPES)
def test_fast(backend, dtype, tokens, columns):
    """Sums of 128 products in float32, the rest beyond float32: the error does not grow with the number of tokens."""
    X, C = gaussian(tokens, columns, dtype), symmetric(columns)
    if not cuda_gram.is_supported(backend.capability, dtype, "fast"):
        with pytest.raises(SliceGPTError, match="dtype not supported"):
            backend.gram("fast", C, X)
        return
    result = backend.gram("fast", C, X)
    expected = C + X.double().T @ X.double()
    assert_within(result, expected, FAST * magnitudes(X) + 2 * U * (expected.abs() + C.abs()))


def test_refusals(backend):
    C = torch.zeros(4, 4, dtype=torch.float64)
    with pytest.raises(
        SliceGPTError, match=r"precision 'exact' takes X of float16, bfloat16, float32, got torch\.float64"
    ):
        backend.gram("exact", C, torch.zeros(3, 4, dtype=torch.float64))
    with pytest.raises(
        SliceGPTError, match=r"precision 'fast' takes X of float16, bfloat16, got torch\.float32"
    ):
        backend.gram("fast", C, torch.zeros(3, 4))


PATTERNS = st.integers(0, 0xFFFF)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(1, 3).flatmap(
        lambda columns: st.lists(
            st.lists(PATTERNS, min_size=columns, max_size=columns), min_size=1, max_size=9
        )
    ),
    dtype=st.sampled_from(HALF),
)
def test_exact_on_any_bits(backend, rows, dtype):
    """Any 16-bit patterns: subnormals, both zeros, spans up to the format's; not finite ones arrive as NaN."""
    X = torch.tensor(np.array(rows, dtype=np.uint16).view(np.int16)).view(dtype)
    columns = X.shape[1]
    result = backend.gram("exact", torch.zeros(columns, columns, dtype=torch.float64), X)
    touched = ~X.isfinite().all(0)
    assert torch.equal(result.isnan(), touched[:, None] | touched)
    clean = X[:, ~touched]
    kept = result[~touched][:, ~touched]
    assert_within(kept, exact_gram(clean), 2 * (len(rows) + 2) * U * magnitudes(clean))
