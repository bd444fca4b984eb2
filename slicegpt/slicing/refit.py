"""Output refit: a block's output weights fitted in closed form to the dense model's stream.

Slicing changes what reaches a block: its activations `a` [N, K], and what its shortcut carries, `u` [N, D]. With
`x` the dense model's stream behind the block, `t = x - u` is what the block has to write. Its output weights `W` give
way to the solution of the ridge regression

    min ‖t - a W'‖² + λ ‖g (W' - W)‖²,      (aᵀa + λ diag(g²)) W' = aᵀt + λ diag(g²) W,

at full width, before the basis of the next boundary is chosen. Tokens count by `token_weights`. `g²` is the mean
diagonal of aᵀa, apart for each kind of activations where several are fitted at once: attention's, the MLP's, the
stream behind a dense shortcut. λ is chosen on held-out windows of the calibration text (`slicegpt.slicing.ridge`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from slicegpt.families import Linear
from slicegpt.hardware.devices import has_fast_bfloat16
from slicegpt.ops import cross_gram_, gram_

logger = logging.getLogger("slicegpt")

# Every call of `gram_` goes through a whole [K, K] in float64, which on a CPU costs as much as the products of some
# hundred tokens: calibration batches of one sample are joined to this many tokens.
TOKENS_PER_CALL = 4096


def teacher_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """In what the dense model's blocks run for a stream of `dtype`: bfloat16 for float32, where it is faster.

    Their roundings, a few thousandths of what a block writes, are noise in the target of a regression over all tokens:
    the fit averages it out, and what is left is far below what slicing loses (docs/quality.md). The stream between
    the blocks stays in `dtype`.
    """
    return torch.bfloat16 if dtype == torch.float32 and has_fast_bfloat16(device) else dtype


def token_weights(before: torch.Tensor, behind: torch.Tensor, eps: float) -> torch.Tensor:
    """How much a token's squared error counts: the inverse root of `|x|² + D eps`, [...].

    `x` is the dense stream before the block or behind it [..., D], whichever is longer. The next block reads the
    stream divided by that root, the blocks behind it the error as it is: between relative and absolute errors,
    halfway was best (docs/quality.md). An error is also in proportion to what came in: where a block takes the huge
    activations of an attention sink (the first token of a sequence) back to the others' size, what is wrong with
    that one token would outweigh all others.
    """
    dtype = torch.float64 if behind.dtype == torch.float64 else torch.float32
    squares = [torch.linalg.vector_norm(x, dim=-1, dtype=dtype).square() for x in (before, behind)]
    return (torch.maximum(*squares) + behind.shape[-1] * eps).rsqrt()


class Moments:
    """Second moments of activations [n, K] and of what their block has to write [n, D], all in float64.

    Attributes:
        gram: [K, K]; cross: [K, D]; energy: the sum of squares of what is to be written.
        inputs, outputs: sums [K] and [D], for an intercept; tokens: their number, or the sum of their weights.
        groups: columns of each kind of activations, K in all; their scales differ.
    """

    def __init__(self, groups: Sequence[int], outputs: int, device: torch.device):
        self.groups, inputs = tuple(groups), sum(groups)

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.gram, self.cross, self.energy = zeros(inputs, inputs), zeros(inputs, outputs), zeros()
        self.inputs, self.outputs, self.tokens = zeros(inputs), zeros(outputs), zeros()

    def add(
        self, activations: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None = None
    ) -> None:
        """Add tokens: `activations` [n, K] and `target` [n, D] of one dtype, `weight` [n] or None for ones."""
        # "fast" errs by some 1e-6 of the mean diagonal, a thousandth of the smallest ridge; so do float32 sums of one
        # batch.
        exact = activations.dtype == torch.float64
        precision, dtype = ("fp64", torch.float64) if exact else ("fast", torch.float32)
        if weight is None:
            weight = torch.ones(len(target), dtype=dtype, device=target.device)
        if activations.dtype == torch.float32 and has_fast_bfloat16(activations.device):
            # As `teacher_dtype`: roundings of single numbers, by 2^-9 of them at most, average out over all tokens.
            root = weight.to(dtype).sqrt()[:, None]
            left, right = ((states * root).bfloat16() for states in (activations, target))
            gram_(self.gram, left, None, precision)
            cross_gram_(self.cross, left, right, None, precision)
        else:
            gram_(self.gram, activations, weight, precision)
            cross_gram_(self.cross, activations, target, weight, precision)
        self.energy += (
            weight.double() @ torch.linalg.vector_norm(target, dim=1, dtype=dtype).double().square()
        )
        self.inputs += weight.to(dtype) @ activations.to(dtype)
        self.outputs += weight.to(dtype) @ target.to(dtype)
        self.tokens += weight.sum(dtype=torch.float64)

    def __iadd__(self, other: Moments) -> Moments:
        for name in ("gram", "cross", "energy", "inputs", "outputs", "tokens"):
            getattr(self, name).add_(getattr(other, name))
        return self

    def scales(self, intercept: bool) -> torch.Tensor:
        """g² [K]: the mean diagonal of each group of columns; of deviations from the means with an `intercept`."""
        diagonal = self.gram.diagonal()
        if intercept:
            diagonal = diagonal - self.inputs.square() / self.tokens
        return torch.cat([part.mean().expand(len(part)) for part in diagonal.split(self.groups)])


class JoinedBatches:
    """Adds tokens to `moments` in calls of at least TOKENS_PER_CALL; `finish` adds the rest."""

    def __init__(self, moments: Moments):
        self.moments = moments
        self.waiting: list[tuple[torch.Tensor, ...]] = []

    def add(self, activations: torch.Tensor, target: torch.Tensor, weight: torch.Tensor) -> None:
        """As `Moments.add`; the tensors must not change until they have been added."""
        self.waiting.append((activations, target, weight))
        if sum(len(batch[0]) for batch in self.waiting) >= TOKENS_PER_CALL:
            self.finish()

    def finish(self) -> Moments:
        """Add what is waiting, and return the moments of all."""
        if len(self.waiting) == 1:
            self.moments.add(*self.waiting[0])
        elif self.waiting:
            self.moments.add(*map(torch.cat, zip(*self.waiting, strict=True)))
        self.waiting.clear()
        return self.moments


@dataclass(frozen=True)
class Writer:
    """What a block writes: `a weight + bias`.

    Attributes:
        weight: W [K, D] float64; bias: [D] float64, or None.
        left: what `loss` is on the moments that it was fitted to; None where it was not fitted.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    left: float | None = None

    def loss(self, moments: Moments) -> float:
        """`‖t - a W - bias‖²`, weighted, over the tokens of `moments`: a quadratic form in them."""
        weight, bias = self.weight, self.bias
        loss = moments.energy + (weight * (moments.gram @ weight - 2 * moments.cross)).sum()
        if bias is not None:
            loss += bias @ (moments.tokens * bias - 2 * moments.outputs + 2 * (moments.inputs @ weight))
        return loss.item()


def prior_of(writers: Iterable[Linear]) -> Writer:
    """The output weights of a block's parts side by side, and the sum of their biases."""
    writers = list(writers)
    biases = [writer.bias for writer in writers if writer.bias is not None]
    weight = torch.cat([writer.weight for writer in writers], dim=1).mT
    return Writer(weight, sum(biases) if biases else None)


def normal_equations(moments: Moments, ridge: float, prior: Writer) -> tuple[torch.Tensor, torch.Tensor]:
    """`H` [K, K] and `B` [K, D] of the fit at one λ, `H W' = B`; a bias is eliminated from them, without a penalty."""
    intercept = prior.bias is not None
    penalty = ridge * moments.scales(intercept)
    system, right = moments.gram.clone(), moments.cross + penalty[:, None] * prior.weight
    if intercept:
        mean = moments.inputs / moments.tokens
        system.addr_(mean, moments.inputs, alpha=-1)
        right.addr_(mean, moments.outputs, alpha=-1)
    system.diagonal().add_(penalty)
    return system, right


def fit(moments: Moments, ridge: float, prior: Writer, kept: torch.Tensor | None = None) -> Writer:
    """The fit at one λ, drawn towards the weights of `prior`; a bias that it has is fitted, too.

    Args:
        kept: int64, the rows of W' that may differ from 0; None: all.
    """
    system, right = normal_equations(moments, ridge, prior)
    if kept is None:
        weight = solve(system, right)
    else:
        weight = torch.zeros_like(right)
        weight[kept] = solve(system[kept][:, kept], right[kept])
    bias, energy, intercept = None, moments.energy, prior.bias is not None
    if intercept:
        bias = (moments.outputs - moments.inputs @ weight) / moments.tokens
        energy = energy - moments.outputs @ moments.outputs / moments.tokens
    # ‖t - a W'‖² without another product: in the rows that are kept aᵀa W' = B - λ diag(g²) W'.
    penalty = ridge * moments.scales(intercept)[:, None]
    left = energy - (weight * (right - penalty * (2 * prior.weight - weight))).sum()
    return Writer(weight, bias, left.item())


def solve(system: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """`system⁻¹ right` for a symmetric positive semidefinite system, float64.

    By Cholesky; where that fails or does not solve the system, by the pseudoinverse from the eigenvalues.
    """
    factor, info = torch.linalg.cholesky_ex(system)
    if not bool(info):
        solution = torch.cholesky_solve(right, factor)
        # A backward stable solution leaves about K·2⁻⁵³ of what it multiplies; a thousand times that is a failure.
        left = (system @ solution[:, :8] - right[:, :8]).norm()
        limit = 1e3 * len(system) * 2.0**-53 * system.norm() * solution[:, :8].norm()
        if bool(left <= limit):
            return solution
    logger.warning("refit: Cholesky failed on a system of %d; taking the pseudoinverse", len(system))
    values, vectors = torch.linalg.eigh(system.cpu())
    floor = values[-1] * len(values) * torch.finfo(torch.float64).eps
    inverse = torch.where(values > floor, 1 / values, 0.0)
    return (vectors @ (inverse[:, None] * (vectors.mT @ right.cpu()))).to(right.device)
