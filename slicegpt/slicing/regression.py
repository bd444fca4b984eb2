"""The solution of the refit's ridge regression at one λ, in float64."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import torch

from slicegpt.families import Linear
from slicegpt.slicing.moments import Moments
from slicegpt.slicing.objective import Objective, Writer

logger = logging.getLogger("slicegpt")


def prior_of(writers: Iterable[Linear]) -> Writer:
    """The output weights of a block's parts side by side, and the sum of their biases."""
    writers = list(writers)
    biases = [writer.bias for writer in writers if writer.bias is not None]
    weight = torch.cat([writer.weight for writer in writers], dim=1).mT
    return Writer(weight, sum(biases) if biases else None)


def fit(
    objective: Objective, moments: Moments, ridge: float, prior: Writer, kept: torch.Tensor | None = None
) -> Writer:
    """The fit at one λ, drawn towards the weights of `prior`; a bias that it has is fitted, too.

    Args:
        kept: int64, the rows of W' that may differ from 0; None: all.
    """
    system, right = objective.normal_equations(moments, ridge, prior)
    if kept is None:
        weight = solve(system, right)
    else:
        weight = torch.zeros_like(right)
        weight[kept] = solve(system[kept][:, kept], right[kept])
    bias = None
    if prior.bias is not None:
        bias = (moments.outputs - moments.inputs @ weight) / moments.tokens
    return Writer(weight, bias, objective.loss_of_solution(moments, ridge, prior, weight, right))


def solve(system: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """`system⁻¹ right` for a symmetric positive semidefinite system [K, K], float64.

    By Cholesky; where that fails or does not solve the system, by the pseudoinverse from the eigenvalues.
    """
    factor, info = torch.linalg.cholesky_ex(system)
    if not bool(info):
        solution = torch.cholesky_solve(right, factor)
        # A backward stable solution misses by about K·2⁻⁵³ of what it multiplies; a thousand times that is a failure.
        residual = (system @ solution[:, :8] - right[:, :8]).norm()
        limit = 1e3 * len(system) * 2.0**-53 * system.norm() * solution[:, :8].norm()
        if bool(residual <= limit):
            return solution
    logger.warning("refit: Cholesky failed on a system of %d; taking the pseudoinverse", len(system))
    values, vectors = torch.linalg.eigh(system.cpu())
    floor = values[-1] * len(values) * torch.finfo(torch.float64).eps
    inverse = torch.where(values > floor, 1 / values, 0.0)
    return (vectors @ (inverse[:, None] * (vectors.mT @ right.cpu()))).to(right.device)
