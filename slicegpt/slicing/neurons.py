"""Which MLP neurons to delete, where a column of the stream costs more than they do.

A neuron is a row of the output weights, and goes by what its deletion costs (`slicegpt.slicing.deletion`), with its
rows of the gate and up projections and its column of the down projection: the matrices stay dense.
"""

from collections.abc import Iterable, Iterator

import torch

from slicegpt.slicing.deletion import Deletion, Equations
from slicegpt.slicing.matrices import panels

# Neurons are deleted in so many rounds, the cheapest at once, with exact updates in between: matrix products in place
# of thousands of passes over H⁻¹. On correlated columns the objective rises by at most 1 % more than with one neuron
# a round (tests/slicing/test_neurons.py).
ROUNDS = 32


def choose_neurons(equations: Equations, size: int, group: slice, count: int) -> torch.Tensor:
    """The rows of `W` that stay.

    Args:
        equations: of the fit; H is symmetric positive definite.
        size: K.
        group: the rows of `W` that neurons write through; the others (attention's, a shortcut's) all stay.
        count: neurons to keep.

    Returns:
        int64, ascending: indices into the K rows, `K - (neurons - count)` of them.
    """
    if count == len(range(size)[group]):
        return torch.arange(size)
    deletion = Deletion(equations)
    for _ in neuron_deletions(deletion, group, rounds_to(group, count)):
        pass
    return deletion.kept()


def rounds_to(group: slice, count: int) -> list[int]:
    """How many neurons of `group` to delete in each of `ROUNDS` rounds, so that `count` stay."""
    excess = group.stop - group.start - count
    step = -(-excess // ROUNDS)
    return [min(step, excess - done) for done in range(0, excess, step or 1)]


def neuron_deletions(deletion: Deletion, group: slice, rounds: Iterable[int]) -> Iterator[torch.Tensor]:
    """Delete so many neurons a round, each time the cheapest.

    Args:
        group: as `choose_neurons` takes it.

    Yields:
        After every round by how much it raised the objective, float64 [].
    """
    outside = torch.ones_like(deletion.stays)
    outside[group] = False
    for removed in rounds:
        weight = deletion.weight
        squares = torch.cat([weight[rows].square().sum(dim=1) for rows in panels(*weight.shape)])
        costs = squares / deletion.inverse.diagonal()
        yield deletion.delete(costs.masked_fill(outside | ~deletion.stays, torch.inf).argsort()[:removed])


def deletions(
    equations: Equations, group: slice, rounds: Iterable[int]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """`neuron_deletions` from the start of a fit; with every rise, the rows that stay, int64."""
    deletion = Deletion(equations)
    for rise in neuron_deletions(deletion, group, rounds):
        yield deletion.kept(), rise
