"""Symmetric float64 matrices that fill a device: factorised, solved with and inverted in their own memory.

The Gram matrix of an MLP with 28,672 neurons takes 6.6 GB, and so does every copy. A matrix is factorised where it
stands, its inverse takes the place of the factor, and a solution that of the right-hand side; what is needed besides
is panels of rows or columns, `PANEL_BYTES` each. LAPACK and cuSOLVER work on columns, so matrices to be factorised are
made by `column_major`: no copy is made of them.
"""

from collections.abc import Iterator

import torch

# A panel of rows or columns: large enough for matrix products at full rate (1170 rows of 28,672 columns).
PANEL_BYTES = 1 << 28

# Columns of a block of the inverse. A product of K x 1024 with 1024 x K reads and writes the matrix once for 2048
# operations an element, far above what a device computes in the time of a read.
BLOCK = 1024

# Columns of the product that a factor is checked by.
PROBES = 8


def panels(rows: int, columns: int) -> Iterator[slice]:
    """Slices of the rows of a float64 matrix [rows, columns], `PANEL_BYTES` each; one for all where that is enough."""
    step = max(1, PANEL_BYTES // (8 * max(1, columns)))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def column_major(rows: int, columns: int, device: torch.device) -> torch.Tensor:
    """An uninitialised float64 [rows, columns] whose columns are contiguous."""
    return torch.empty(columns, rows, dtype=torch.float64, device=device).mT


def factorise_(system: torch.Tensor) -> bool:
    """The lower Cholesky factor of a symmetric positive definite matrix in its place; zeros above it.

    A row that is all 0, as a neuron that never fires leaves it, counts as one of the identity: the others do not see
    it.

    Args:
        system: float64 [K, K], `column_major`.

    Returns:
        Whether that is the factor. If not, the matrix is lost.
    """
    diagonal = system.diagonal()
    diagonal.add_((diagonal == 0).to(system.dtype))
    probes = torch.randn(
        len(system), PROBES, dtype=system.dtype, generator=torch.Generator().manual_seed(0)
    ).to(system.device)
    images, norm = system @ probes, torch.linalg.vector_norm(system)
    info = torch.empty((), dtype=torch.int32, device=system.device)
    torch.linalg.cholesky_ex(system, out=(system, info))
    if bool(info):
        return False
    # A backward stable factor misses by about K·2⁻⁵³ of the matrix; a thousand times that is a failure.
    residual = torch.linalg.vector_norm(system @ (system.mT @ probes) - images)
    return bool(residual <= 1e3 * len(system) * 2.0**-53 * norm * torch.linalg.vector_norm(probes))


def solve_(factor: torch.Tensor, right: torch.Tensor) -> None:
    """`(L Lᵀ)⁻¹ right` in the place of `right`, float64 [K, n], `column_major`, for a factor L of `factorise_`."""
    for columns in panels(right.shape[1], len(right)):
        part = right[:, columns]
        torch.linalg.solve_triangular(factor, part, upper=False, out=part)
        torch.linalg.solve_triangular(factor.mT, part, upper=True, out=part)


def invert_(factor: torch.Tensor) -> None:
    """`(L Lᵀ)⁻¹`, both triangles of it, in the place of a factor L of `factorise_` [K, K].

    First L⁻¹, block column by block column from the last, then `L⁻ᵀ L⁻¹` from the first block row on: as LAPACK's
    potri does it, 2/3 K³ multiplications and additions beyond the factor's, and two block columns beside the matrix.
    """
    size = len(factor)
    blocks = [slice(start, min(start + BLOCK, size)) for start in range(0, size, BLOCK)]
    identity = torch.eye(min(BLOCK, size), dtype=factor.dtype, device=factor.device)
    for block in reversed(blocks):
        width, below = block.stop - block.start, slice(block.stop, size)
        inverse = torch.linalg.solve_triangular(factor[block, block], identity[:width, :width], upper=False)
        if (
            block.stop < size
        ):  # L⁻¹ below the diagonal: minus what is inverted already, times this column, times L⁻¹
            column = factor[below, block] @ inverse
            factor[below, block] = _lower_product(factor[below, below], column).neg_()
        factor[block, block] = inverse
    for block in blocks:
        below, before = slice(block.start, size), slice(0, block.stop)
        factor[block, before] = factor[below, block].mT @ factor[below, before]
    for block in blocks:
        factor[block, block.stop :] = factor[block.stop :, block].mT


def _lower_product(lower: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """`lower @ right` for a lower triangular matrix, whose zeros are not multiplied: BLAS's trmm."""
    product = torch.empty_like(right)
    for start in range(0, len(lower), BLOCK):
        stop = min(start + BLOCK, len(lower))
        product[start:stop] = lower[start:stop, :stop] @ right[:stop]
    return product


def pseudoinverse(system: torch.Tensor) -> torch.Tensor:
    """Of a symmetric positive semidefinite matrix, from its eigenvalues, on the CPU: for what Cholesky cannot do.

    It takes three matrices beside this one, of the host's memory."""
    values, vectors = torch.linalg.eigh(system.cpu())
    floor = values[-1] * len(values) * torch.finfo(torch.float64).eps
    inverse = torch.where(values > floor, 1 / values, 0.0)
    return vectors @ (inverse[:, None] * vectors.mT)
