"""Alignment and compact shortcuts against definitions, in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slicegpt.errors import SliceGPTError
from slicegpt.slicing.rotation import align, random_orthogonal

# Orthogonal matrices of size D <= 64: products are exact to a few D * 2.2e-16; 1e-12 leaves room for the directions
# with small cosines, whose error is 2.2e-16 / cos.
TOLERANCE = 1e-12


def orthogonal(size: int, seed: int) -> torch.Tensor:
    return random_orthogonal(size, torch.Generator().manual_seed(seed))


def close(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    return (actual - expected).abs().max().item() < TOLERANCE if actual.numel() else True


def test_random_orthogonal_is_orthogonal_and_haar():
    q = orthogonal(40, 0)
    assert close(q.mT @ q, torch.eye(40, dtype=torch.float64))
    # Without fixing the signs of R, QR's convention would bias the diagonal of Q to one sign.
    diagonals = torch.stack([orthogonal(8, seed).diagonal() for seed in range(200)])
    # The mean of 1600 entries of variance 1/8 has a standard deviation of 0.009.
    assert abs(diagonals.mean().item()) < 5 * 0.009


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(2, 48), st.data())
def test_align(dense, data):
    width = data.draw(st.integers(1, dense))
    following = data.draw(st.integers(width, dense))
    previous, candidate = orthogonal(dense, 1)[:, :width], orthogonal(dense, data.draw(st.integers(2, 99)))
    basis, complement = candidate[:, :following], candidate[:, following:]
    turned, factor = align(previous, basis, complement)

    assert turned.shape == (dense, following)
    assert factor.shape == (width, min(width, dense - following))
    assert close(turned.mT @ turned, torch.eye(following, dtype=torch.float64))
    assert close(turned @ turned.mT, basis @ basis.mT)  # the same subspace
    shortcut = torch.eye(width, following, dtype=torch.float64)
    shortcut[:, :width] -= factor @ factor.mT
    assert close(previous.mT @ turned, shortcut)


@pytest.mark.parametrize(("width", "following"), [(20, 20), (20, 32), (30, 30)])
def test_align_gives_the_polar_factor(width, following):
    """The shortcut is the symmetric polar factor of the unaligned one, from its singular values."""
    previous, candidate = orthogonal(32, 3)[:, :width], orthogonal(32, 4)
    turned, _ = align(previous, candidate[:, :following], candidate[:, following:])
    left, sigma, _ = torch.linalg.svd(previous.mT @ candidate[:, :following], full_matrices=False)
    assert close((previous.mT @ turned)[:, :width], left * sigma @ left.mT)


def test_align_of_orthogonal_subspaces():
    """Principal angles of 90 degrees: the cosines vanish and nothing is divided by them."""
    identity = torch.eye(10, dtype=torch.float64)
    previous, basis, complement = identity[:, :4], identity[:, 6:], identity[:, :6]
    turned, factor = align(previous, basis, complement)
    assert close(turned.mT @ turned, torch.eye(4, dtype=torch.float64))
    assert close(factor @ factor.mT, torch.eye(4, dtype=torch.float64))


def test_align_does_not_accumulate_errors():
    previous = orthogonal(64, 0)[:, :48]
    for seed in range(1, 81):
        candidate = orthogonal(64, seed)
        previous, _ = align(previous, candidate[:, :48], candidate[:, 48:])
    assert close(previous.mT @ previous, torch.eye(48, dtype=torch.float64))


def test_align_refuses_a_narrower_basis():
    with pytest.raises(SliceGPTError, match="at least 20 columns, got 12"):
        align(orthogonal(32, 0)[:, :20], orthogonal(32, 1)[:, :12], orthogonal(32, 1)[:, 12:])


def test_align_refuses_what_is_not_orthonormal():
    with pytest.raises(SliceGPTError, match="orthonormal"):
        align(1.001 * orthogonal(32, 0)[:, :20], orthogonal(32, 1)[:, :20], orthogonal(32, 1)[:, 20:])
