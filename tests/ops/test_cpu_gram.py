"""The CPU's kernels for `gram_` and `cross_gram_`, with every instruction set that this processor has."""

import numpy as np
import pytest
import torch

from slicegpt.ops import cross_gram_, gram_, reference
from slicegpt.ops.contracts import DTYPES
from slicegpt.ops.cpu import extension
from slicegpt.ops.cpu import gram as cpu_gram
from slicegpt.ops.cross_gram import DISPATCHER as CROSS_GRAM
from slicegpt.ops.gram import DISPATCHER as GRAM
from slicegpt.ops.gram import choose

pytestmark = pytest.mark.skipif(extension.why_not() is not None, reason=str(extension.why_not()))

SETS = extension.instruction_sets()
# Tokens that are summed before they are added to C: csrc/cpu/gram.cpp's kColumnBytes by the size of an item.
RUN = {False: 512, True: 1024}
LONGEST_RUN = {False: 512, True: 2048}  # of pairs of bfloat16
UNIT = {False: 2.0**-53, True: 2.0**-24}
CASES = [(dtype, fast) for fast in (False, True) for dtype in DTYPES if not (fast and dtype.itemsize == 8)]
WEIGHTS = ("none", "bool", "float", "strided")


@pytest.fixture
def forget_choices():
    GRAM.forget()
    CROSS_GRAM.forget()
    yield
    GRAM.forget()
    CROSS_GRAM.forget()


def normal(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def surrounded(X: torch.Tensor) -> torch.Tensor:
    """X inside a larger matrix of NaN: an item too many, wherever it were read, would show."""
    outside = X.new_full((X.shape[0] + 6, X.shape[1] + 70), torch.nan)
    outside[3 : 3 + X.shape[0], 5 : 5 + X.shape[1]] = X
    return outside[3 : 3 + X.shape[0], 5 : 5 + X.shape[1]]


def with_strides(X: torch.Tensor, kind: str) -> torch.Tensor:
    """The values of X, laid out otherwise."""
    if kind == "transposed":
        return X.T.contiguous().T
    if kind == "apart":
        wide = X.new_full((X.shape[0], 3 * X.shape[1]), torch.nan)
        wide[:, ::3] = X
        return wide[:, ::3]
    return surrounded(X) if kind == "surrounded" else X


def weights(kind: str, tokens: int) -> torch.Tensor | None:
    if kind == "none":
        return None
    if kind == "bool":
        return torch.arange(tokens) % 3 != 1
    weight = normal(2 * tokens, seed=9)  # negative ones too
    weight[::6] = 0
    return weight[::2] if kind == "strided" else weight[:tokens].float()


def each_instruction_set():
    """For tests whose time goes into what the results are compared with; the fixture below takes the last one back."""
    for name in SETS:
        extension.use_instruction_set(name)
        yield name


@pytest.fixture(autouse=True)
def best_instruction_set_afterwards():
    yield
    if SETS:
        extension.use_instruction_set()


def expectation(start, A, B, weight) -> tuple[np.ndarray, np.ndarray]:
    """The result in np.longdouble, which rounds 2048 times finer than float64, and the sum of magnitudes."""
    a, b = (X.double().numpy() for X in (A.clone(), B.clone()))
    w = np.ones(len(a)) if weight is None else weight.double().numpy()
    a[w == 0], b[w == 0] = 0, 0
    weighted = b.astype(np.longdouble) * w[:, None]
    magnitude = np.abs(a).T @ np.abs(weighted).astype(np.float64)
    return start.numpy() + a.astype(np.longdouble).T @ weighted, magnitude


def assert_close(C, start, expected, magnitude, tokens, fast) -> None:
    """On its way into C a term is rounded once where it is weighted (twice with "fast": the weight itself), at most
    once for every token of its run, and once for every run that is added to C, always in float64. `unit` times their
    number bounds the error relative to the sum of magnitudes to first order; one more covers the higher ones, and that
    the magnitudes themselves are float64 sums.
    """
    run, runs = min(tokens, LONGEST_RUN[fast]), -(-tokens // RUN[fast])
    bound = (run + 3) * UNIT[fast] * magnitude + (runs + 1) * UNIT[False] * (
        magnitude + np.abs(start.numpy())
    )
    assert (np.abs(C.numpy() - expected) <= bound).all()


@pytest.mark.parametrize(("dtype", "fast"), CASES)
@pytest.mark.parametrize(
    ("tokens", "columns"), [(1, 1), (1, 130), (127, 63), (20, 577), (1000, 63), (1100, 130)]
)
def test_gram(tokens, columns, dtype, fast):
    """Widths below, at and beyond panels and tiles; a part of a run, and more than one; every weight, every layout.
    Only the upper triangle of C is read, nothing around it is written."""
    for number, kind in enumerate(WEIGHTS):
        X, weight = normal(tokens, columns, dtype=dtype, seed=number), weights(kind, tokens)
        if weight is not None:
            X[weight == 0] = (torch.inf, torch.nan, -torch.inf)[number % 3]
        layout = with_strides(X, ("plain", "surrounded", "transposed", "apart")[number])
        start = normal(columns, columns, seed=2)
        start = start + start.T
        upper = start.masked_fill(torch.ones_like(start).tril(-1).bool(), torch.nan)
        expected, magnitude = expectation(start, X, X, weight)

        for _ in each_instruction_set():
            room = torch.full((columns + 2, columns), 7.0, dtype=torch.float64)
            C = room[1:-1].copy_(upper)
            cpu_gram.gram_(C, layout, weight, fast)
            assert_close(C, start, expected, magnitude, tokens, fast)
            assert torch.equal(C, C.T)
            assert room[[0, -1]].eq(7).all()


@pytest.mark.parametrize(("dtype", "fast"), CASES)
@pytest.mark.parametrize(
    ("tokens", "rows", "columns"), [(1, 1, 1), (127, 63, 5), (1100, 7, 577), (600, 130, 49)]
)
def test_cross_gram(tokens, rows, columns, dtype, fast):
    layouts = ("plain", "transposed", "surrounded", "apart")
    for number, kind in enumerate(WEIGHTS):
        A, B = normal(tokens, rows, dtype=dtype), normal(tokens, columns, dtype=dtype, seed=1)
        weight, start = weights(kind, tokens), normal(rows, columns, seed=2)
        if weight is not None:
            A[weight == 0], B[weight == 0] = torch.inf, torch.nan
        left, right = with_strides(A, layouts[number]), with_strides(B, layouts[number - 1])
        expected, magnitude = expectation(start, A, B, weight)

        for _ in each_instruction_set():
            room = torch.full((rows + 2, columns), 7.0, dtype=torch.float64)
            C = room[1:-1].copy_(start)
            cpu_gram.cross_gram_(C, left, right, weight, fast)
            assert_close(C, start, expected, magnitude, tokens, fast)
            assert room[[0, -1]].eq(7).all()


@pytest.mark.parametrize("fast", [False, True])
def test_no_tokens_and_only_absent_ones(instruction_set, fast):
    """C stays; where there are tokens, its upper triangle is mirrored all the same, as the contract says."""
    start = normal(40, 40)
    C = start.clone()
    cpu_gram.gram_(C, torch.full((9, 40), torch.nan), torch.zeros(9), fast)
    assert torch.equal(C, start.triu() + start.triu(1).T)
    for X, weight in ((torch.zeros(0, 40), None), (torch.zeros(0, 40), torch.zeros(0, dtype=torch.bool))):
        cpu_gram.cross_gram_(C, X, X, weight, fast)
        assert torch.equal(C, start.triu() + start.triu(1).T)
        gram_(C, X, weight, "fast" if fast else "fp64")
        assert torch.equal(C, start.triu() + start.triu(1).T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fast", [False, True])
def test_infinities_and_nans_arrive_as_nan(instruction_set, fast, dtype):
    """Also those that meet zeros, in the first token and the last, the first column and the last."""
    X = normal(1101, 130, dtype=dtype)
    X[700] = 0
    X[0, 0], X[700, 77], X[-1, 129] = torch.inf, -torch.inf, torch.nan
    hit = torch.zeros(130, dtype=torch.bool)
    hit[[0, 77, 129]] = True
    C = torch.zeros(130, 130, dtype=torch.float64)
    cpu_gram.gram_(C, X, None, fast)
    assert torch.equal(C.isnan(), hit[:, None] | hit[None, :])
    assert not C.isinf().any()
    wanted = torch.zeros_like(C)
    reference.gram_(wanted, X, None, fast)
    assert torch.equal(C.isnan(), wanted.isnan())
    C = torch.zeros(130, 5, dtype=torch.float64)
    cpu_gram.cross_gram_(C, X, X[:, 1:6], None, fast)
    assert torch.equal(C.isnan(), hit[:, None].expand(130, 5))
    C = torch.zeros(5, 130, dtype=torch.float64)
    cpu_gram.cross_gram_(C, X[:, 1:6], X, None, fast)
    assert torch.equal(C.isnan(), hit[None, :].expand(5, 130))
    assert not C.isinf().any()


def test_every_half_precision_value_is_read_right(instruction_set):
    """One token that holds each of them in a column of its own, times 1; and the extremes of float16 in one product."""
    for dtype in (torch.float16, torch.bfloat16):
        values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        values = values[values.isfinite()]
        for fast in (False, True):
            C = torch.zeros(len(values), 1, dtype=torch.float64)
            cpu_gram.cross_gram_(C, values[None], torch.ones(1, 1, dtype=dtype), None, fast)
            wanted = values.double()
            if fast and dtype == torch.bfloat16:  # products of bfloat16 take numbers below 2^-126 for 0
                tiny = wanted.abs() < 2.0**-126
                assert ((C[:, 0] == wanted) | (C[:, 0] == 0))[tiny].all()
                C[tiny, 0] = wanted[tiny] = 0
            assert torch.equal(C[:, 0], wanted)
    X = torch.tensor([[6e-8, 65504.0], [65504.0, 0.0]], dtype=torch.float16)
    C = torch.zeros(2, 2, dtype=torch.float64)
    cpu_gram.gram_(C, X, None, False)
    assert C.tolist() == [[65504.0**2 + 2.0**-48, 65504 * 2.0**-24], [65504 * 2.0**-24, 65504.0**2]]


@pytest.mark.parametrize(("dtype", "run"), [(torch.float32, RUN[True]), (torch.bfloat16, LONGEST_RUN[True])])
def test_fast_adds_its_runs_in_float64(instruction_set, dtype, run):
    """2^24 and then ones: sums in float32 stay where they are, so only a run may be lost; the contract allows 4097."""
    X = torch.ones(9000, 1, dtype=dtype)
    X[0] = 4096
    C = torch.zeros(1, 1, dtype=torch.float64)
    cpu_gram.gram_(C, X, None, True)
    assert 2**24 + 8999 - run <= C.item() <= 2**24 + 8999
    cpu_gram.gram_(C.zero_(), X, None, False)
    assert C.item() == 2**24 + 8999


@pytest.mark.parametrize("fast", [False, True])
def test_the_same_bits_with_any_number_of_threads(instruction_set, threads, fast):
    A, B = normal(2300, 301, dtype=torch.float32), normal(2300, 130, dtype=torch.float32, seed=1)
    results = []
    for count in (1, 1, 2, 3, 5):
        threads(count)
        square, cross = torch.zeros(301, 301, dtype=torch.float64), torch.zeros(301, 130, dtype=torch.float64)
        for weight in (None, weights("float", 2300)):
            cpu_gram.gram_(square, A, weight, fast)
            cpu_gram.cross_gram_(cross, A, B, weight, fast)
        results.append((square, cross))
    for other in results[1:]:
        assert all(torch.equal(*pair) for pair in zip(results[0], other, strict=True))


# --- choosing -----------------------------------------------------------------------------------------------


def test_the_kernels_are_taken_where_they_are_fast(forget_choices):
    for name in each_instruction_set():
        wanted = "reference" if name == "portable" else "cpu"
        GRAM.forget()
        for dtype, fast in CASES:
            precision = "fast" if fast else "fp64"
            assert choose("auto", None, dtype, 64, precision) == (wanted, precision)
            assert CROSS_GRAM.find("auto", None, dtype, precision) == wanted
        assert choose("auto", None, torch.float32, 64, "auto") == (wanted, "fp64")
    assert not cpu_gram.is_supported(torch.float64, fast=True)


@pytest.mark.parametrize("why", ["asked for", "not built"])
def test_the_reference_is_taken(monkeypatch, forget_choices, why):
    if why == "asked for":
        monkeypatch.setenv("SLICEGPT_BACKEND", "reference")
    else:
        monkeypatch.setattr(extension, "module", None)
    monkeypatch.delattr(cpu_gram, "gram_")
    monkeypatch.delattr(cpu_gram, "cross_gram_")
    X = normal(30, 4, dtype=torch.float32)
    zero = torch.zeros(4, 4, dtype=torch.float64)
    C, G = zero.clone(), zero.clone()
    gram_(C, X)
    cross_gram_(G, X, X)
    assert_close(C, zero, *expectation(zero, X, X, None), len(X), False)
    assert_close(G, zero, *expectation(zero, X, X, None), len(X), False)


def test_operators_take_the_kernels(monkeypatch, forget_choices):
    if not cpu_gram.is_supported(torch.float32, fast=False):
        pytest.skip("this processor's kernels are not faster than a BLAS")
    monkeypatch.delattr(reference, "gram_")
    monkeypatch.delattr(reference, "cross_gram_")
    X, weight = normal(300, 70, dtype=torch.float32), weights("float", 300)
    for fast, precision in ((False, "fp64"), (True, "fast")):
        zero = torch.zeros(70, 70, dtype=torch.float64)
        C, G = zero.clone(), zero.clone()
        gram_(C, X, weight, precision)
        cross_gram_(G, X, X, weight, precision)
        assert_close(C, zero, *expectation(zero, X, X, weight), len(X), fast)
        assert_close(G, zero, *expectation(zero, X, X, weight), len(X), fast)
