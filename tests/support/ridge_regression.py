"""A ridge regression to be solved, and an independent solution of it."""

import torch

from slicegpt.slicing.matrices import column_major
from slicegpt.slicing.moments import Moments
from slicegpt.slicing.objective import Writer

SUMS = ("gram", "cross", "energy", "inputs", "outputs", "tokens")  # of `Moments`


def in_columns(matrix: torch.Tensor) -> torch.Tensor:
    """A copy with contiguous columns, as what is overwritten by a solution has to be."""
    return column_major(*matrix.shape, matrix.device).copy_(matrix)


def problem(
    tokens: int, inputs: int = 12, outputs: int = 7, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations with a mean and correlated columns, and targets that are partly linear in them."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(inputs, inputs, generator=torch.Generator().manual_seed(99)).double()
    truth = torch.randn(inputs, outputs, generator=torch.Generator().manual_seed(98)).double()
    activations = torch.randn(tokens, inputs, generator=generator).double() @ mixing + 0.5
    noise = torch.randn(tokens, outputs, generator=generator).double()
    return activations, activations @ truth + 2 * noise + 3


def moments_of(activations: torch.Tensor, target: torch.Tensor, keep=None) -> Moments:
    moments = Moments([activations.shape[1]], target.shape[1], torch.device("cpu"))
    for rows in torch.arange(len(activations)).split(17):
        rows = rows if keep is None else rows[keep[rows]]
        moments.add(activations[rows], target[rows])
    return moments


def prior_of(inputs: int = 12, outputs: int = 7, bias: bool = False) -> Writer:
    weight = torch.randn(inputs, outputs, generator=torch.Generator().manual_seed(97)).double()
    return Writer(weight, torch.zeros(outputs).double() if bias else None)


def stacked_ridge(
    activations: torch.Tensor, target: torch.Tensor, penalty: torch.Tensor | float, prior: Writer
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same regression as one least-squares problem, by SVD: rows √penalty I below the activations.

    Args:
        penalty: λ g² of each column, or λ itself: g² is then the mean diagonal.
    """
    inputs = activations.shape[1]
    centred = activations - activations.mean(dim=0) if prior.bias is not None else activations
    if not isinstance(penalty, torch.Tensor):
        penalty = (penalty * centred.square().sum(dim=0).mean()).expand(inputs)
    rows = torch.diag(penalty.sqrt())
    left, right = torch.cat((activations, rows)), torch.cat((target, rows @ prior.weight))
    if prior.bias is not None:
        ones = torch.cat((torch.ones(len(activations)), torch.zeros(inputs))).double()
        left = torch.cat((left, ones[:, None]), dim=1)
    solution = torch.linalg.lstsq(left, right, driver="gelsd").solution
    return solution[:inputs], solution[inputs:].sum(dim=0)
