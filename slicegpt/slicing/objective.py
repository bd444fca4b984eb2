"""The calibration objective: what a block's output weights are fitted to, and by what they are judged.

Slicing changes what reaches a block: its activations `a` [n, K], and what its shortcut carries, `u` [n, D]. With
`x` the dense model's stream after the block, the block has to write `t = x - u`. Its output weights `W` give way to the
`W'` that minimises

    Σ w ‖t - a W'‖² + λ ‖g (W' - W)‖²,      (aᵀ w a + λ diag(g²)) W' = aᵀ w t + λ diag(g²) W,

a ridge regression over the full width, before the basis of the next boundary is chosen. All of its choices are methods
of `Objective`: the target `t`, the weights `w` of the tokens, the penalty `λ g²` and what it draws towards, the
candidates of λ, and the dtype of the dense model's blocks. What follows from them is elsewhere: the sums over the
tokens (`slicegpt.slicing.moments`), the solution (`slicegpt.slicing.regression`), which MLP neurons are deleted
(`slicegpt.slicing.neurons`), and how many of each layer (`slicegpt.slicing.plans`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from slicegpt.errors import SliceGPTError
from slicegpt.hardware.devices import has_fast_bfloat16
from slicegpt.slicing.matrices import column_major, panels
from slicegpt.slicing.moments import Moments


@dataclass(frozen=True)
class Writer:
    """What a block writes: `a weight + bias`.

    Attributes:
        weight: W [K, D] float64, before a fit also in the checkpoint's dtype; bias: [D] float64, or None.
        loss: of the tokens that it was fitted to, `Objective.loss`; None where it was not fitted.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    loss: float | None = None


@dataclass(frozen=True)
class Objective:
    """What the output refit minimises; another one is a subclass, or an edit of this file.

    Attributes:
        ridges: candidates of λ, ascending. The calibration tokens go on with the fit at the first, whatever is stored
            (docs/quality.md). Half decades: the loss is flat around its minimum.
        unjudged_ridge: the candidate that is stored where there are no windows to judge by; 0.3 loses little with a few
            samples and with many (docs/quality.md).
    """

    ridges: tuple[float, ...] = (0.1, 0.3, 1.0)
    unjudged_ridge: float = 0.3

    def __post_init__(self):
        if not self.ridges or min(self.ridges) <= 0 or list(self.ridges) != sorted(set(self.ridges)):
            raise SliceGPTError(f"must be above 0 and ascending, got {self.ridges}", "ridges")
        if self.unjudged_ridge not in self.ridges:
            raise SliceGPTError(f"must be one of {self.ridges}, got {self.unjudged_ridge}", "unjudged_ridge")

    # --- tokens ------------------------------------------------------------------------------------------------

    def teacher_dtype(self, dtype: torch.dtype, device: torch.device) -> torch.dtype:
        """In what the dense model's blocks run for a stream of `dtype`: bfloat16 for float32, where it is faster.

        Their roundings, a few thousandths of what a block writes, are noise in the target of a regression over all
        tokens: the fit averages it out, and what remains is far below what slicing loses (docs/quality.md). The stream
        between the blocks stays in `dtype`.
        """
        return torch.bfloat16 if dtype == torch.float32 and has_fast_bfloat16(device) else dtype

    def target(self, dense: torch.Tensor, carried: torch.Tensor | None) -> torch.Tensor:
        """t [..., D]: what the block has to write.

        Args:
            dense: x, the dense model's stream after the block.
            carried: u, what the block's shortcut carries; None: the shortcut is fitted as well, so nothing is given.
        """
        return dense if carried is None else dense - carried

    def token_weights(self, before: torch.Tensor, after: torch.Tensor, eps: float) -> torch.Tensor:
        """w: how much a token's squared error counts, the inverse root of `|x|² + D eps`, [...].

        `x` is the dense stream before the block or after it [..., D], whichever is longer. The next block reads the
        stream divided by that root, the blocks after it the error as it is: between relative and absolute errors,
        halfway was best (docs/quality.md). An error is also in proportion to what came in: where a block takes the huge
        activations of an attention sink (the first token of a sequence) back to the others' size, what is wrong with
        that one token would outweigh all others.

        Args:
            eps: the model's own, of its norms.

        Returns:
            float32, or float64 for streams of float64.
        """
        dtype = torch.float64 if after.dtype == torch.float64 else torch.float32
        squares = [torch.linalg.vector_norm(x, dim=-1, dtype=dtype).square() for x in (before, after)]
        return (torch.maximum(*squares) + after.shape[-1] * eps).rsqrt()

    def before_norm(
        self, target: torch.Tensor, weights: torch.Tensor, size: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """t and w of a block that writes through a norm, `g ⊙ a W / r` with `r = rms(a W)`.

        With r taken as known, from the weights before the fit, `a W diag(g)` has to be `r t`, and an error of it counts
        `w / r²`: as much as what becomes of it in the stream.

        Args:
            target, weights: t [..., D] and w [...] of what the block writes behind the norm.
            size: r [...].
        """
        return target * size[..., None].to(target.dtype), weights / size.square().to(weights.dtype)

    # --- the regression ----------------------------------------------------------------------------------------

    def penalty(self, moments: Moments, ridge: float, intercept: bool) -> torch.Tensor:
        """`λ g²` [K]. g² is the mean diagonal of aᵀ w a, apart for each kind of activations where several are fitted
        at once (attention's, the MLP's, the stream before a dense shortcut); of deviations from the means where an
        `intercept` is fitted along."""
        diagonal = moments.diagonal()
        if intercept:
            diagonal = diagonal - moments.inputs.square() / moments.tokens
        scales = torch.cat([part.mean().expand(len(part)) for part in diagonal.split(moments.groups)])
        return ridge * scales

    def normal_equations(
        self, moments: Moments, ridge: float, prior: Writer, kept: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`H` [k, k] and `B` [k, D] of the fit at one λ, `H W' = B`; a bias is eliminated, without a penalty.

        Both are new, float64, with contiguous columns (`slicegpt.slicing.matrices`), and the caller's to overwrite;
        they are filled from panels of the moments, which may be out of the device's memory.

        Args:
            prior: `W`, what the penalty draws towards, and the bias where one is fitted.
            kept: int64, the rows of W' that may differ from 0; None: all K.
        """
        intercept, mean = prior.bias is not None, moments.inputs / moments.tokens
        penalty = self.penalty(moments, ridge, intercept)
        size = moments.size if kept is None else len(kept)
        system = column_major(size, size, moments.device)
        right = column_major(size, prior.weight.shape[1], moments.device)
        for part in panels(size, moments.size):
            rows = part if kept is None else kept[part]
            columns, cross = moments.rows(rows)
            right[part] = self._right(moments, penalty, prior, rows, cross)
            if intercept:  # these are columns of H, also of the product of the inputs' sums with their means
                columns = torch.addr(columns, moments.inputs[rows], mean, alpha=-1)
            if kept is not None:
                columns = columns.index_select(1, kept)
            system.mT[part] = columns
            del columns, cross  # before the next ones are read
        system.diagonal().add_(penalty if kept is None else penalty[kept])
        return system, right

    def _right(
        self,
        moments: Moments,
        penalty: torch.Tensor,
        prior: Writer,
        rows: slice | torch.Tensor,
        cross: torch.Tensor,
    ) -> torch.Tensor:
        """Rows of `B`, from those of the moments."""
        right = cross + penalty[rows, None] * prior.weight[rows].double()
        if prior.bias is not None:
            right.addr_(moments.inputs[rows] / moments.tokens, moments.outputs, alpha=-1)
        return right

    def loss(self, moments: Moments, writer: Writer) -> float:
        """`Σ w ‖t - a W' - bias‖²` over the tokens of `moments`, without the penalty: a quadratic form in them."""
        weight, bias, loss = writer.weight.double(), writer.bias, moments.energy
        for rows in panels(moments.size, moments.size):
            gram, cross = moments.rows(rows)
            loss = loss + (weight[rows] * (gram @ weight - 2 * cross)).sum()
            del gram, cross  # before the next ones are read
        if bias is not None:
            loss = loss + bias @ (moments.tokens * bias - 2 * moments.outputs + 2 * (moments.inputs @ weight))
        return loss.item()

    def loss_of_solution(self, moments: Moments, ridge: float, prior: Writer, weight: torch.Tensor) -> float:
        """`loss` of a solution of `normal_equations`, rows of which may be 0, without a product with [K, K].

        In the rows that are not 0, `aᵀ w a W' = B - λ diag(g²) W'`.

        Args:
            weight: W' [K, D]; its bias is the best one.
        """
        intercept, energy = prior.bias is not None, moments.energy
        if intercept:
            energy = energy - moments.outputs @ moments.outputs / moments.tokens
        penalty = self.penalty(moments, ridge, intercept)
        for rows in panels(moments.size, weight.shape[1]):
            right = self._right(moments, penalty, prior, rows, moments.cross_rows(rows))
            drawn = penalty[rows, None] * (2 * prior.weight[rows].double() - weight[rows])
            energy = energy - (weight[rows] * (right - drawn)).sum()
        return energy.item()
