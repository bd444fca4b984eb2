"""The solution of the refit's ridge regression at one λ, in float64."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import torch

from slicegpt.families import Linear
from slicegpt.slicing.matrices import factorise_, pseudoinverse, solve_
from slicegpt.slicing.moments import Moments
from slicegpt.slicing.objective import Objective, Writer

logger = logging.getLogger("slicegpt")


def prior_of(writers: Iterable[Linear]) -> Writer:
    """The output weights of a block's parts side by side, and the sum of their biases."""
    writers = list(writers)
    biases = [writer.bias for writer in writers if writer.bias is not None]
    weights = [writer.weight for writer in writers]
    weight = (weights[0] if len(weights) == 1 else torch.cat(weights, dim=1)).mT
    return Writer(weight, sum(biases) if biases else None)


def fit(
    objective: Objective, moments: Moments, ridge: float, prior: Writer, kept: torch.Tensor | None = None
) -> Writer:
    """The fit at one λ, drawn towards the weights of `prior`; a bias that it has is fitted, too.

    Args:
        kept: int64, the rows of W' that may differ from 0; None: all.
    """
    weight = solution(objective, moments, ridge, prior, kept)
    if kept is not None:
        rows, weight = weight, weight.new_zeros(moments.size, weight.shape[1])
        weight[kept] = rows
    bias = None
    if prior.bias is not None:
        bias = (moments.outputs - moments.inputs @ weight) / moments.tokens
    return Writer(weight, bias, objective.loss_of_solution(moments, ridge, prior, weight))


def solution(
    objective: Objective, moments: Moments, ridge: float, prior: Writer, kept: torch.Tensor | None
) -> torch.Tensor:
    """The rows `kept` of W', float64: by Cholesky, where that fails by the pseudoinverse."""
    system, right = objective.normal_equations(moments, ridge, prior, kept)
    if not len(system):  # a block whose parts are deleted
        return right
    if factorise_(system):
        solve_(system, right)
        return right
    del system, right  # the one is lost, and the other takes as much memory as what follows
    system, right = objective.normal_equations(moments, ridge, prior, kept)
    logger.warning("refit: Cholesky failed on a system of %d; taking the pseudoinverse", len(system))
    return (pseudoinverse(system) @ right.cpu()).to(right.device)
