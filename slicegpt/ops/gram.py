"""`gram_`: the streamed covariance update `C += Xᵀ diag(weight) X` in float64."""

from torch import Tensor

from slicegpt import reference


def gram_(
    C: Tensor, X: Tensor, weight: Tensor | None = None, precision: str = "auto", digits: int | None = None
) -> None:
    """Add `Xᵀ diag(weight) X` to `C` in place.

    C: float64 [D, D]; X: [N, D], half, bfloat16, float32 or float64; weight: [N] or None.
    """
    reference.gram_(C, X, weight)
