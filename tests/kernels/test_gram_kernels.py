"""The Triton gram kernels in the interpreter, against integer arithmetic without rounding."""

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")
from slicegpt.kernels import gram_exact, gram_fp64

EPS = 2.0**-53

# Large tiles and steps: the interpreter's cost is one numpy call an operation, whatever the size.
WIDE = gram_fp64.GramConfig(block=128, block_k=128, num_warps=4, splits=1)
SPLIT = gram_fp64.GramConfig(block=32, block_k=16, num_warps=4, splits=3)
EXACT = gram_exact.GramExactConfig(
    128, 128, num_warps=8, num_stages=3, chunk_tokens=512, planes=16, strip=128
)


def exact_gram(X: torch.Tensor, weight: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """`Xᵀ diag(weight) X` rounded once from exact integers, and the same of |X| in float64; weights 0 and 1."""
    absent = torch.zeros(len(X), dtype=torch.bool) if weight is None else weight == 0
    rows = X[~absent].double().numpy()
    # Every finite float32 is a multiple of 2^-149.
    unit = {torch.float16: 24, torch.bfloat16: 133, torch.float32: 149}[X.dtype]
    integers = np.array(
        [[int(Fraction(value) * 2**unit) for value in row] for row in rows.tolist()], dtype=object
    )
    size = X.shape[1]
    integers = integers.reshape(-1, size)
    sums = integers.T @ integers if len(integers) else np.zeros((size, size), dtype=object)
    values = [[float(Fraction(int(value), 2 ** (2 * unit))) for value in row] for row in sums]
    return torch.tensor(values, dtype=torch.float64), torch.from_numpy(np.abs(rows).T @ np.abs(rows))


def wide_range(tokens: int, columns: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Values whose exponents fill fp16's whole range (2^-24 to 65504) in every column."""
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.randint(-24, 16, (tokens, columns), generator=generator)
    signs = torch.randn(tokens, columns, generator=generator).sign()
    fractions = 1 + torch.rand(tokens, columns, generator=generator) * (1 - 2.0**-10)
    return (signs * torch.ldexp(fractions, exponents)).clamp(-65504, 65504).to(dtype)


def normal(tokens: int, columns: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)


def mask(tokens: int) -> torch.Tensor:
    return (torch.arange(tokens) % 3 != 1).double()


@pytest.fixture(scope="module")
def fp64(interpreter):
    def run(C, X, weight=None, **options):
        return interpreter("slicegpt.kernels.gram_fp64", "gram_fp64", C, X, weight, **options)[0]

    return run


@pytest.fixture(scope="module")
def exact(interpreter):
    def run(C, X, weight=None, config=EXACT):
        return interpreter("slicegpt.kernels.gram_exact", "gram_exact", C, X, weight, config)[0]

    return run


def zeros(columns: int) -> torch.Tensor:
    return torch.zeros(columns, columns, dtype=torch.float64)


# --- float64 ------------------------------------------------------------------------------------------------

# Triton's interpreter does not load bfloat16 correctly, so the float64 kernel meets it on a GPU only.
SHAPES = [(1, 1, SPLIT), (127, 63, SPLIT), (1000, 1, SPLIT), (1, 577, WIDE), (1000, 63, WIDE)]


@pytest.mark.parametrize(("tokens", "columns", "config"), SHAPES)
def test_fp64_shapes(fp64, tokens, columns, config):
    X = normal(tokens, columns, torch.float16)
    start = torch.eye(columns, dtype=torch.float64)
    C = fp64(start.clone(), X, config=config)
    expected, magnitude = exact_gram(X)
    # Any order of N additions: at most N·eps relative to the sum of magnitudes; one more for C's own.
    assert ((C - start - expected).abs() <= (tokens + 2) * EPS * (magnitude + start)).all()
    assert torch.equal(C, C.T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fp64_strides_weights_and_wider_types(fp64, dtype):
    X = normal(100, 130, dtype)[:, ::2]
    weight = torch.rand(100, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    C = fp64(zeros(65), X, weight, config=SPLIT)
    # np.longdouble has 64 bits of precision: rounding errors 2048 times smaller than float64's.
    x, w = X.double().numpy().astype(np.longdouble), weight.numpy().astype(np.longdouble)
    expected = (x * w[:, None]).T @ x
    magnitude = torch.from_numpy((np.abs(x) * w[:, None]).T.dot(np.abs(x)).astype(np.float64))
    assert (torch.from_numpy((C.numpy() - expected).astype(np.float64)).abs() <= 103 * EPS * magnitude).all()


def test_fp64_empty(fp64):
    assert torch.equal(fp64(torch.eye(5).double(), torch.zeros(0, 5)), torch.eye(5).double())


def test_fp64_infinities_and_nans_arrive_as_nan(fp64):
    X = normal(40, 6, torch.float32)
    X[3, 1], X[7, 4] = torch.inf, torch.nan
    C = fp64(zeros(6), X, config=SPLIT)
    assert torch.equal(C.isnan(), touching(6, [1, 4]))
    weight = torch.ones(40, dtype=torch.float64)
    weight[[3, 7]] = 0  # absent tokens may hold anything
    assert fp64(zeros(6), X, weight, config=SPLIT).isfinite().all()


def touching(size: int, columns: list[int]) -> torch.Tensor:
    hit = torch.zeros(size, dtype=torch.bool)
    hit[columns] = True
    return hit[:, None] | hit[None, :]


def test_fast_stays_close(fp64):
    X = normal(700, 63, torch.float16)
    expected, magnitude = exact_gram(X)
    C = fp64(zeros(63), X, fast=True, config=gram_fp64.GramConfig(64, 32, num_warps=4, splits=2))
    # 32 products summed in float32: 32·2^-24 relative to the magnitudes.
    assert ((C - expected).abs() <= 32 * 2.0**-24 * magnitude).all()
    assert (C - expected).norm() <= 2e-7 * expected.norm()


# --- exact --------------------------------------------------------------------------------------------------


def assert_exact(C: torch.Tensor, X: torch.Tensor, weight=None, chunks: int = 1) -> None:
    """Each chunk is rounded at most three times, relative to its own sum; then one addition for each."""
    expected, magnitude = exact_gram(X, weight)
    assert torch.equal(C, C.T)
    if chunks == 1:
        assert ((C - expected).abs() <= 4 * EPS * expected.abs()).all()
    else:
        assert ((C - expected).abs() <= (4 + chunks) * EPS * magnitude).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("tokens", "columns"), [(1, 1), (127, 63), (100, 150)])
def test_exact_is_exact(exact, tokens, columns, dtype):
    X = normal(tokens, columns, dtype)
    assert_exact(exact(zeros(columns), X), X)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_exact_keeps_every_bit_of_a_huge_range(exact, dtype):
    X = wide_range(127, 20, dtype)
    if dtype == torch.float16:
        assert X.abs().min() < 1e-7
        assert X.abs().max() > 60000
    # 40 bits of exponents and up to 24 of the mantissa: more than 16 planes carry for float32.
    C = exact(zeros(20), X)
    if dtype == torch.float32:
        expected, magnitude = exact_gram(X)
        assert ((C - expected).abs() <= 127 * EPS * magnitude).all()
    else:
        assert_exact(C, X)


def test_exact_cancellation(exact):
    """Sums that cancel to a bit 80 bits below their terms: float64 loses them, integers do not."""
    X = torch.tensor([[60000.0, 60000.0], [60000.0, -60000.0], [2.0**-24, 2.0**-24]], dtype=torch.float16)
    C = exact(zeros(2), X)
    assert C[0, 1] == 2.0**-48


def test_exact_many_chunks_masks_and_strides(exact):
    X = normal(1000, 100, torch.float16)[:, ::3]
    weight = mask(1000)
    C = exact(zeros(34), X, weight)
    assert_exact(C, X, weight, chunks=2)


def test_exact_577_columns(exact):
    X = normal(127, 577, torch.bfloat16)
    assert_exact(exact(zeros(577), X, config=replace(EXACT, chunk_tokens=128)), X)


def test_exact_adds_to_what_is_there(exact):
    X = normal(50, 10, torch.float16)
    once = exact(zeros(10), X)
    assert torch.equal(exact(once.clone(), X), 2 * once)


def test_exact_columns_of_zeros_and_empty(exact):
    X = normal(64, 12, torch.float16)
    X[:, [0, 5]] = 0
    C = exact(zeros(12), X)
    assert_exact(C, X)
    assert C[5].eq(0).all()
    assert torch.equal(exact(torch.eye(3).double(), torch.zeros(0, 3).half()), torch.eye(3).double())
    assert exact(zeros(3), torch.zeros(9, 3).half()).eq(0).all()


def test_exact_hands_real_weights_to_float64(exact):
    X = normal(90, 30, torch.float16)
    weight = torch.rand(90, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    expected = X.double().T @ (X.double() * weight[:, None])
    # Two float64 sums of 90 terms in different orders, each product rounded once.
    magnitude = X.double().abs().T @ (X.double().abs() * weight[:, None])
    assert ((exact(zeros(30), X, weight) - expected).abs() <= 2 * 92 * EPS * magnitude).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_exact_infinities_and_nans_arrive_as_nan(exact, dtype):
    X = normal(40, 150, dtype)
    X[3, 1], X[7, 140], X[8, 140] = torch.inf, torch.nan, -torch.inf
    C = exact(zeros(150), X)
    assert torch.equal(C.isnan(), touching(150, [1, 140]))
    weight = torch.ones(40, dtype=torch.float64)
    weight[[3, 7, 8]] = 0
    assert_exact(exact(zeros(150), X, weight), X, weight)


def test_exact_falls_back_where_the_planes_run_out(exact):
    """A column whose span exceeds the planes is computed in float64, its neighbours' block still exactly."""
    few = replace(EXACT, chunk_tokens=128, planes=7)
    X = normal(60, 200, torch.float16).round()
    X[:, 150] = wide_range(60, 1, torch.float16)[:, 0]
    expected, magnitude = exact_gram(X)
    C = exact(zeros(200), X, config=few)
    assert ((C - expected).abs() <= 62 * EPS * magnitude).all()
    assert torch.equal(C[:128, :128], expected[:128, :128])


@st.composite
def halves(draw) -> torch.Tensor:
    """Up to 12 x 6 of any finite fp16: a sign, and magnitude bits below those of infinity."""
    tokens, columns = draw(st.integers(1, 12)), draw(st.integers(1, 6))
    count = tokens * columns
    bits = draw(st.lists(st.integers(-0x7BFF, 0x7BFF), min_size=count, max_size=count))
    signed = [abs(b) - (0x8000 if b < 0 else 0) for b in bits]
    return torch.tensor(signed, dtype=torch.int16).view(torch.float16).view(tokens, columns)


@settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(X=halves())
def test_exact_on_arbitrary_halves(exact, X):
    assert X.isfinite().all()
    assert_exact(exact(zeros(X.shape[1]), X), X)


# --- arithmetic and configurations --------------------------------------------------------------------------


def test_moduli_are_coprime_and_their_capacity_is_right():
    moduli = gram_exact.MODULI
    assert all(np.gcd(a, b) == 1 for i, a in enumerate(moduli) for b in moduli[:i])
    product = 1
    for m, bits in zip(moduli, gram_exact.capacities(), strict=True):
        product *= m
        assert 2**bits <= 0.49 * product < 2 ** (bits + 1)
    assert gram_exact.planes_for(gram_exact.capacities()[4]) == 5
    assert gram_exact.planes_for(gram_exact.capacities()[4] + 1) == 6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("columns", [1, 576, 4096, 8192, 28672])
def test_exact_configuration_fits(dtype, columns):
    config = gram_exact.gram_exact_config((9, 0), dtype, 1 << 18, columns)
    assert config.chunk_tokens % 128 == 0
    # int32 sums of products of residues up to 128 in magnitude
    assert config.chunk_tokens * 128 * 128 < 2**31
    if columns <= 8192:
        assert config.planes * config.chunk_tokens * columns <= gram_exact.WORKSPACE_BYTES
    if dtype == torch.float16:
        # fp16 never needs the float64 kernel: 40 bits, whatever it holds
        assert gram_exact.planes_for(2 * 40 + 14) <= config.planes


def test_float64_configuration_fills_the_device():
    assert gram_fp64.gram_config((9, 0), 1 << 18, 4096, 132).splits == 1
    small = gram_fp64.gram_config((9, 0), 1 << 18, 576, 132)
    assert small.splits * 45 >= 3 * 132
    assert gram_fp64.gram_config((9, 0), 100, 576, 132).splits == 1
    assert gram_fp64.gram_config((8, 9), 1 << 18, 4096, 128).num_warps == 8


def test_supported():
    assert gram_exact.is_supported((8, 0), torch.bfloat16)
    assert not gram_exact.is_supported((7, 5), torch.float16)
    assert not gram_exact.is_supported((9, 0), torch.float64)
    assert gram_fp64.is_supported((7, 5), torch.float16)
    assert not gram_fp64.is_supported((7, 5), torch.bfloat16)
    assert not gram_fp64.is_supported((9, 0), torch.float32, fast=True)
