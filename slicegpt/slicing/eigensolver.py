"""The leading eigenvectors of a covariance, in float64, checked before anyone uses them."""

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from slicegpt.errors import SliceGPTError

logger = logging.getLogger("slicegpt")

# Backward-stable solvers reach about D·2⁻⁵³, in orthonormality and in the residual relative to ‖C‖₂. A
# result ten times worse is a failure, not bad luck.
TOLERANCE = 20 * torch.finfo(torch.float64).eps
PROBES = 16


def leading_eigenvectors(C: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """All eigenvalues of a symmetric matrix and the eigenvectors of its `width` largest (paper, section 3.4).

    Tries `eigh` on C's device, then on the CPU, then the singular value decomposition on the CPU; each
    result is checked before it counts. Each eigenvector's largest entry is positive, so that the
    orientation does not depend on the solver.

    Args:
        C: float64 [D, D], symmetric (the lower triangle is read).
        width: 1 to D.

    Returns:
        eigenvalues, float64 [D], descending; basis, float64 [D, width], orthonormal columns; on C's device.

    Raises:
        SliceGPTError: C is not a finite float64 square matrix, width is out of range, or every solver failed.
    """
    _check(C, width)
    solvers: list[tuple[str, Callable]] = [("eigh on the CPU", _eigh_cpu), ("SVD on the CPU", _svd_cpu)]
    if C.device.type != "cpu":
        solvers.insert(0, (f"eigh on {C.device}", torch.linalg.eigh))
    failures = []
    for name, solve in solvers:
        try:
            values, vectors = solve(C)
            basis = vectors[:, C.shape[0] - width :].flip(1)
            values = values.flip(0)
            problem = _problem(C, values, basis)
        except RuntimeError as error:  # torch.linalg.LinAlgError and out of memory among them
            problem = str(error).splitlines()[0]
        if problem is None:
            return values, _oriented(basis)
        logger.warning("eigensolver: %s failed: %s", name, problem)
        failures.append(f"{name}: {problem}")
    raise SliceGPTError(f"eigensolver: every solver failed on C {list(C.shape)}: {'; '.join(failures)}")


def _check(C: Tensor, width: int) -> None:
    if C.dim() != 2 or C.shape[0] != C.shape[1]:
        raise SliceGPTError(f"eigensolver: C must be square [D, D], got {list(C.shape)}")
    if C.dtype != torch.float64:
        raise SliceGPTError(f"eigensolver: C must be float64, got {C.dtype}")
    if not 1 <= width <= C.shape[0]:
        raise SliceGPTError(f"eigensolver: width must be 1 to {C.shape[0]}, got {width}")
    bad_rows = (~C.isfinite()).any(dim=1)
    if bad_rows.any():
        first = int(bad_rows.nonzero()[0])
        raise SliceGPTError(
            f"eigensolver: C must be finite, got NaN or infinity in {int(bad_rows.sum())} of its"
            f" {C.shape[0]} rows, the first is row {first}"
        )


def _eigh_cpu(C: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(C.cpu())
    return values.to(C.device), vectors.to(C.device)


def _svd_cpu(C: Tensor) -> tuple[Tensor, Tensor]:
    """Another algorithm: the singular vectors of a positive semidefinite C are its eigenvectors."""
    vectors, values, _ = torch.linalg.svd(C.cpu())
    return values.flip(0).to(C.device), vectors.flip(1).to(C.device)


def _problem(C: Tensor, values: Tensor, basis: Tensor) -> str | None:
    """What is wrong with a result, or None: `BᵀB g = g` and `C B g = B Λ g` for random vectors g.

    A few vectors see a single wrong column as well as the full products do, at a hundredth of their cost.
    """
    generator = torch.Generator().manual_seed(0)
    probes = torch.randn((basis.shape[1], PROBES), dtype=C.dtype, generator=generator).to(C.device)
    images = basis @ probes
    limit = TOLERANCE * C.shape[0] * probes.norm()
    orthonormality = (basis.T @ images - probes).norm()
    residual = (C @ images - basis @ (values[: basis.shape[1], None] * probes)).norm()
    if not orthonormality <= limit:
        return f"the basis is not orthonormal, error {orthonormality / probes.norm():.1e}"
    if not residual <= limit * values.abs().max():
        return f"the residual is {residual / (values.abs().max() * probes.norm()):.1e} of the norm of C"
    return None


def _oriented(basis: Tensor) -> Tensor:
    largest = basis.gather(0, basis.abs().argmax(dim=0, keepdim=True))
    return torch.where(largest < 0, -basis, basis)
