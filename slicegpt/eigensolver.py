"""The leading eigenvectors of a covariance, in float64."""

import torch
from torch import Tensor


def leading_eigenvectors(C: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """All eigenvalues [D] of `C` (float64, descending) and the `width` leading eigenvectors [D, width]."""
    values, vectors = torch.linalg.eigh(C)
    return values.flip(0), vectors.flip(1)[:, :width].contiguous()
