"""The Triton kernel behind `cross_gram_`: in the interpreter."""

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
from slicegpt.kernels import cross_gram as kernel

EPS = 2.0**-53
WIDE = kernel.GramConfig(block=128, block_k=128, num_warps=4, splits=1)
SPLIT = kernel.GramConfig(block=32, block_k=16, num_warps=4, splits=3)


@pytest.fixture(scope="module")
def run(interpreter):
    def call(C, A, B, weight=None, **options):
        return interpreter("slicegpt.kernels.cross_gram", "cross_gram", C, A, B, weight, **options)[0]

    return call


def normal(tokens: int, columns: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_close(C, start, A, B, w=None, sums: int | None = None, unit: float = EPS) -> None:
    """Against np.longdouble: at most N + 3 roundings in any order, relative to the sum of magnitudes."""
    a, b = (X.double().numpy().astype(np.longdouble) for X in (A, B))
    a = a if w is None else a * w.numpy()[:, None]
    magnitude = np.abs(start.numpy()) + np.abs(a).T @ np.abs(b)
    sums = len(a) if sums is None else sums
    assert (np.abs(C.numpy() - (start.numpy() + a.T @ b)) <= (sums + 3) * unit * magnitude).all()


@pytest.mark.parametrize(
    ("tokens", "rows", "columns", "config"),
    [(1, 1, 1, SPLIT), (127, 63, 40, SPLIT), (300, 5, 200, WIDE), (40, 130, 3, SPLIT)],
)
def test_shapes(run, tokens, rows, columns, config):
    A, B = normal(tokens, rows, torch.float16, 0), normal(tokens, columns, torch.float16, 1)
    start = normal(rows, columns, torch.float64, 2)
    assert_close(run(start.clone(), A, B, config=config), start, A, B)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_strides_and_weights(run, dtype):
    A, B = normal(100, 130, dtype, 0)[:, ::2], normal(33, 100, dtype, 1).T
    weight = (torch.arange(100) % 3).double()
    start = torch.zeros(65, 33, dtype=torch.float64)
    assert_close(run(start.clone(), A, B, weight, config=SPLIT), start, A, B, weight)


def test_absent_tokens_may_hold_anything_and_present_ones_become_nan(run):
    A, B = normal(40, 6, torch.float32, 0), normal(40, 5, torch.float32, 1)
    A[3, 1], B[7, 4] = torch.inf, torch.nan
    zeros = torch.zeros(6, 5, dtype=torch.float64)
    expected = torch.zeros(6, 5, dtype=torch.bool)
    expected[1], expected[:, 4] = True, True
    assert torch.equal(run(zeros.clone(), A, B, config=SPLIT).isnan(), expected)
    weight = torch.ones(40, dtype=torch.float64)
    weight[[3, 7]] = 0
    assert run(zeros.clone(), A, B, weight, config=SPLIT).isfinite().all()


def test_fast_stays_close(run):
    """32 products summed in float32 between additions in float64."""
    A, B = normal(700, 63, torch.float16, 0), normal(700, 40, torch.float16, 1)
    start = torch.zeros(63, 40, dtype=torch.float64)
    config = kernel.GramConfig(64, 32, num_warps=4, splits=2)
    C = run(start.clone(), A, B, fast=True, config=config)
    assert_close(C, start, A, B, sums=32, unit=2.0**-24)
