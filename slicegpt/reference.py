"""Plain-PyTorch implementations of the operators: what runs on the CPU, the tests' oracle, the bench's baseline."""

from torch import Tensor, float64

CHUNK_TOKENS = 2048


def gram_(C: Tensor, X: Tensor, weight: Tensor | None = None) -> None:
    """Add `Xᵀ diag(weight) X` to `C` (float64 [D, D]) in place, in chunks of tokens, without a float64 copy of X."""
    for start in range(0, X.shape[0], CHUNK_TOKENS):
        chunk = X[start : start + CHUNK_TOKENS].to(float64)
        weighted = chunk if weight is None else chunk * weight[start : start + CHUNK_TOKENS, None].to(float64)
        C.addmm_(chunk.T, weighted)
