"""Bases of the residual stream: orientation, and the compact shortcuts that alignment makes possible.

A basis `V` of a boundary is [D, d] float64 with orthonormal columns; the stream there is `h = x V`. Only the
subspace matters to the network, the basis inside it is free: `V R` with `R` orthogonal is the same network.
"""

import torch

from slicegpt.errors import SliceGPTError


def random_orthogonal(size: int, generator: torch.Generator) -> torch.Tensor:
    """A Haar-distributed orthogonal matrix [size, size] in float64 (QR of a Gaussian, signs fixed by R)."""
    q, r = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator))
    return q * torch.where(r.diagonal() < 0, -1.0, 1.0)


def align(
    previous: torch.Tensor, basis: torch.Tensor, complement: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn `basis` inside its subspace so that the shortcut from `previous` is the identity less a low rank.

    Two subspaces of R^D of dimensions d <= d' share at least d + d' - D dimensions, and directions in both are
    carried over as they are. Only the rest turns, by the principal angles θ: with `K = previousᵀ complement`
    and its singular value decomposition `K = A diag(sin θ) Wᵀ`, the shortcut to the turned basis is

        previousᵀ turned = [I - F Fᵀ, 0],   F = A diag(sqrt(1 - cos θ)),   F of min(d, D - d') columns,

    the symmetric polar factor of `previousᵀ basis`. Working with the complement costs a decomposition of
    [d, D - d'] where that polar factor costs one of [d, d], and takes `1 - cos θ` as `sin² θ / (1 + cos θ)`,
    without cancellation.

    Args:
        previous: [D, d] float64, orthonormal columns.
        basis: [D, d'] float64, orthonormal columns, d' >= d.
        complement: [D, D - d'] float64, completing `basis` to an orthogonal matrix.

    Returns:
        `turned` [D, d'] spanning the subspace of `basis`, and `F` [d, min(d, D - d')].

    Errors: `SliceGPTError` where the inputs were not orthonormal, so that the shortcut would not be exact.
    """
    (dense_width, width), next_width = previous.shape, basis.shape[1]
    if next_width < width:
        raise SliceGPTError(f"must have at least {width} columns, got {next_width}", "basis")
    left, sines, _ = torch.linalg.svd(previous.mT @ complement, full_matrices=False)
    # The turned directions as seen from `basis`: orthogonal columns of length cos θ. Householder QR keeps them
    # orthonormal where cos θ vanishes (svd sorts sin θ down; flipped, the long and accurate columns come first).
    left, sines = left.flip(1), sines.flip(0)
    directions, triangle = torch.linalg.qr(basis.mT @ (previous @ left))
    cosines = triangle.diagonal()
    directions = directions * torch.where(cosines < 0, -1.0, 1.0)
    factor = left * (sines / (1 + cosines.abs()).sqrt())
    # In coordinates of `basis`, so that rounding cannot lead out of its subspace; the Newton step to the nearest
    # orthonormal columns squares what remains of the error, which would otherwise add up over the boundaries.
    inside = basis.mT @ (previous - previous @ left @ left.mT) + directions @ left.mT
    inside = inside @ (
        1.5 * torch.eye(width, dtype=inside.dtype, device=inside.device) - 0.5 * inside.mT @ inside
    )
    if next_width > width:
        inside = torch.cat((inside, torch.linalg.qr(inside, mode="complete")[0][:, width:]), dim=1)
    turned = basis @ inside

    expected = torch.eye(width, next_width, dtype=turned.dtype, device=turned.device)
    expected[:, :width] -= factor @ factor.mT
    error = max(
        (previous.mT @ turned - expected).abs().max().item(),
        (complement.mT @ turned).abs().max().item() if complement.shape[1] else 0.0,
    )
    # Products and factorisations of D x D orthogonal matrices are exact to some tens of D roundings.
    tolerance = 256 * dense_width * torch.finfo(torch.float64).eps
    if not error <= tolerance:
        raise SliceGPTError(
            f"the shortcut misses the bases by {error:.1e}, at most {tolerance:.1e} is rounding; "
            "previous, basis and complement must have orthonormal columns"
        )
    return turned, factor
