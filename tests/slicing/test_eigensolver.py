"""The eigensolver: against matrices whose eigenpairs are known, its fallbacks, and its errors."""

import pytest
import torch

from slicegpt.errors import SliceGPTError
from slicegpt.slicing import eigensolver
from slicegpt.slicing.eigensolver import leading_eigenvectors


def covariance(values: torch.Tensor, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A symmetric matrix with the given eigenvalues (descending) and its eigenvectors."""
    generator = torch.Generator().manual_seed(seed)
    size = len(values)
    vectors, _ = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator))
    C = (vectors * values) @ vectors.T
    return (C + C.T) / 2, vectors


@pytest.mark.parametrize(("size", "width"), [(1, 1), (2, 1), (63, 40), (200, 200)])
def test_known_eigenpairs(size, width):
    expected = torch.linspace(10, 1, size, dtype=torch.float64)
    C, vectors = covariance(expected)
    values, basis = leading_eigenvectors(C, width)
    assert values.shape == (size,)
    assert basis.shape == (size, width)
    # Backward stability: eigenvalues move by at most a small multiple of D·eps·‖C‖; eigenvectors by that over
    # the gap to their neighbours, 9/(D-1) here: 200·2e-16·10/0.045 = 1e-11 at D = 200.
    torch.testing.assert_close(values, expected, rtol=0, atol=1e-12)
    cosines = (basis * vectors[:, :width]).sum(0).abs()
    torch.testing.assert_close(cosines, torch.ones_like(cosines), rtol=0, atol=1e-10)
    identity = torch.eye(width, dtype=torch.float64)
    torch.testing.assert_close(basis.T @ basis, identity, rtol=0, atol=1e-13 * size)


def test_a_massive_direction_and_a_null_space():
    # 14 decades: as residual streams have, plus exact zeros where columns of X are equal.
    expected = torch.cat([torch.tensor([1e10]), torch.logspace(3, -4, 60), torch.zeros(20)]).double()
    C, _ = covariance(expected)
    values, basis = leading_eigenvectors(C, 61)
    assert (values - expected).abs().max() <= 81 * 2.2e-16 * 1e10
    residual = C @ basis - basis * values[:61]
    assert residual.abs().max() <= 81 * 2.2e-16 * 1e10


def test_zero_matrix():
    values, basis = leading_eigenvectors(torch.zeros(5, 5, dtype=torch.float64), 3)
    assert values.eq(0).all()
    torch.testing.assert_close(basis.T @ basis, torch.eye(3, dtype=torch.float64))


def test_orientation_is_deterministic():
    C, vectors = covariance(torch.linspace(3, 1, 30, dtype=torch.float64))
    _, basis = leading_eigenvectors(C, 30)
    assert (basis.gather(0, basis.abs().argmax(0, keepdim=True)) > 0).all()
    flipped = -vectors
    oriented = eigensolver._oriented(flipped)
    assert torch.equal(oriented.abs(), flipped.abs())
    assert torch.equal(oriented, eigensolver._oriented(vectors))


def failing(C):
    raise torch.linalg.LinAlgError("linalg.eigh: failed to converge\nmore lines")


def not_orthonormal(C):
    values, vectors = torch.linalg.eigh(C)
    vectors = vectors.clone()
    vectors[:, -1] *= 1 + 1e-6
    return values, vectors


def wrong_vector(C):
    values, vectors = torch.linalg.eigh(C)
    return values, vectors.roll(1, dims=1)


@pytest.mark.parametrize("broken", [failing, not_orthonormal, wrong_vector])
def test_falls_back_to_another_driver(monkeypatch, caplog, broken):
    expected = torch.linspace(2, 1, 40, dtype=torch.float64)
    C, _ = covariance(expected)
    monkeypatch.setattr(eigensolver, "_eigh_cpu", broken)
    values, basis = leading_eigenvectors(C, 10)
    torch.testing.assert_close(values, expected, rtol=0, atol=1e-12)
    assert (C @ basis - basis * values[:10]).abs().max() < 1e-12
    assert "eigh on the CPU failed" in caplog.text
    assert "more lines" not in caplog.text


def test_says_when_every_driver_failed(monkeypatch):
    monkeypatch.setattr(eigensolver, "_eigh_cpu", failing)
    monkeypatch.setattr(eigensolver, "_svd_cpu", wrong_vector)
    C, _ = covariance(torch.linspace(2, 1, 8, dtype=torch.float64))
    with pytest.raises(
        SliceGPTError, match=r"every solver failed.*to converge; SVD.*residual is .* of the norm"
    ):
        leading_eigenvectors(C, 4)


zeros = torch.zeros(3, 3, dtype=torch.float64)


@pytest.mark.parametrize(
    ("C", "width", "message"),
    [
        (zeros[:2], 1, r"C must be square \[D, D\], got \[2, 3\]"),
        (zeros.float(), 1, "C must be float64, got torch.float32"),
        (zeros, 0, "width must be 1 to 3, got 0"),
        (zeros, 4, "width must be 1 to 3, got 4"),
        (zeros.index_fill(0, torch.tensor(1), torch.nan), 1, "1 of its 3 rows, the first is row 1"),
        (zeros + torch.inf, 1, "NaN or infinity in 3 of its 3 rows, the first is row 0"),
    ],
)
def test_errors_name_the_argument(C, width, message):
    with pytest.raises(SliceGPTError, match=message):
        leading_eigenvectors(C, width)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_on_the_gpu_and_falling_back_from_it(monkeypatch):
    expected = torch.linspace(10, 1, 200, dtype=torch.float64)
    C, _ = covariance(expected)
    values, basis = leading_eigenvectors(C.cuda(), 100)
    assert basis.is_cuda
    torch.testing.assert_close(values.cpu(), expected, rtol=0, atol=1e-12)

    def no_memory(C):
        if C.is_cuda:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return torch.linalg.svd(C)[1].flip(0), torch.linalg.svd(C)[0].flip(1)

    monkeypatch.setattr(torch.linalg, "eigh", no_memory)
    values, basis = leading_eigenvectors(C.cuda(), 100)
    assert basis.is_cuda
    torch.testing.assert_close(values.cpu(), expected, rtol=0, atol=1e-12)
