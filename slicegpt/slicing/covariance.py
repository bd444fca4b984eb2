"""The covariance of a stream over the calibration tokens, accumulated in float64."""

from collections.abc import Iterable

import torch

from slicegpt.hardware.ranks import Ranks
from slicegpt.ops import gram_


class Covariance:
    """`C = Σ xᵀ x` over all tokens that are not padding (paper section 3.4, equation 8).

    Args:
        width: D, columns of the stream.
        signal: "residual" sums over the stream as it is; "normalized" over the stream after its RMS norm, as
            the paper writes it (the published code, too, takes the stream before the norm).
        eps: the norm's epsilon, for "normalized".
    """

    def __init__(self, width: int, signal: str, eps: float, device: torch.device):
        self.matrix = torch.zeros(width, width, dtype=torch.float64, device=device)
        self.signal = signal
        self.eps = eps

    def add(self, stream: torch.Tensor, attention_mask: torch.Tensor | None) -> None:
        """Add a batch: `stream` [batch, tokens, D], `attention_mask` [batch, tokens] (None: no padding)."""
        rows = stream.reshape(-1, stream.shape[-1])
        # A mask stays bool: gram_ then knows that its weights are 0 and 1, for which integer arithmetic is exact.
        weight = None if attention_mask is None else attention_mask.reshape(-1).bool()
        if self.signal == "normalized":
            inverse = 1 / (rows.double().square().mean(dim=-1) + self.eps)
            weight = inverse if weight is None else torch.where(weight, inverse, 0.0)
        gram_(self.matrix, rows, weight)

    def reduce_(self, ranks: Ranks) -> None:
        """Add up what the ranks have added, on rank 0; on the others the matrix is of no use any more."""
        ranks.reduce_symmetric_(self.matrix)

    def is_finite(self) -> bool:
        return bool(self.matrix.isfinite().all())

    def add_prior(self, blocks: Iterable[torch.Tensor], weight: float) -> None:
        """Add `weight` times the covariance of other rows, scaled to the trace of what was added so far.

        So the prior counts as much as `weight` times the tokens seen, whatever its rows' number or length.

        Args:
            blocks: the rows, [n, D] at a time.
        """
        prior = Covariance(len(self.matrix), self.signal, self.eps, self.matrix.device)
        for rows in blocks:
            prior.add(rows, None)
        trace = prior.matrix.trace()
        if trace > 0:
            self.matrix += (weight * self.matrix.trace() / trace) * prior.matrix
