"""Which MLP neurons to delete, where a column of the stream costs more than they do.

The refit of a block's output weights (`objective`) solves `H W = B`, `H = aᵀa + λ diag(g²)`. Deleting the neurons
`J` forces their rows of `W` to 0; the others make up for it as well as they can, and the objective rises by

    tr(W_Jᵀ (H⁻¹)_JJ⁻¹ W_J),      leaving  W - (H⁻¹)_:J (H⁻¹)_JJ⁻¹ W_J,      H⁻¹ - (H⁻¹)_:J (H⁻¹)_JJ⁻¹ (H⁻¹)_J:

(optimal brain surgeon, Hassibi and Stork 1993; for whole structures ZipLM, Kurtic et al. 2023, section 3). A neuron
goes with its rows of the gate and up projections and its column of the down projection: the matrices stay dense.
"""

import logging
from collections.abc import Callable, Iterable, Iterator

import torch

from slicegpt.slicing.matrices import factorise_, invert_, panels, pseudoinverse, solve_

logger = logging.getLogger("slicegpt")

# H [K, K] and B [K, D] float64, as `Objective.normal_equations` makes them: new ones with every call.
Equations = Callable[[], tuple[torch.Tensor, torch.Tensor]]

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
    excess = len(range(size)[group]) - count
    step = -(-excess // ROUNDS)
    rounds = [min(step, excess - done) for done in range(0, excess, step or 1)]
    kept = torch.arange(size)
    for kept, _ in deletions(equations, group, rounds):  # noqa: B007
        pass
    return kept


def solved(equations: Equations) -> tuple[torch.Tensor, torch.Tensor]:
    """`H⁻¹` and `W`, in the memory of H and B.

    A neuron that never fires, in a layer where none does, leaves its row and column of H empty: it costs nothing and
    goes for nothing, see `factorise_`.
    """
    inverse, weight = equations()
    if factorise_(inverse):
        solve_(inverse, weight)
        invert_(inverse)
        return inverse, weight
    del inverse, weight
    system, right = equations()
    logger.warning("refit: Cholesky failed on a system of %d; taking the pseudoinverse", len(system))
    diagonal = system.diagonal()
    diagonal.add_((diagonal == 0).to(system.dtype))
    inverse = pseudoinverse(system).to(right.device)
    return inverse, inverse @ right


def deletions(
    equations: Equations, group: slice, rounds: Iterable[int]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Delete so many neurons a round, each time the cheapest.

    All that is as large as H is H⁻¹, which is updated where it stands.

    Args:
        equations, group: as `choose_neurons` takes them.

    Yields:
        After every round the rows that stay, int64, and by how much it raised the objective, float64 [].
    """
    inverse, weight = solved(equations)
    stays = torch.ones(len(inverse), dtype=torch.bool, device=inverse.device)
    outside = stays.clone()
    outside[group] = False
    for removed in rounds:
        squares = torch.cat([weight[rows].square().sum(dim=1) for rows in panels(*weight.shape)])
        costs = squares / inverse.diagonal()
        cheapest = costs.masked_fill(outside | ~stays, torch.inf).argsort()[:removed]
        # Rows and columns of what goes, divided by the block that they share.
        rows, written = inverse[cheapest], weight[cheapest]
        factor = torch.linalg.cholesky(rows[:, cheapest])
        shares = torch.cholesky_solve(rows, factor)
        rise = (written * torch.cholesky_solve(written, factor)).sum()
        weight.addmm_(shares.mT, written, alpha=-1)
        inverse.addmm_(shares.mT, rows, alpha=-1)
        # What is gone is 0, not the rounding errors of a 0. It stays in its place: copying what remains of H⁻¹ into a
        # smaller matrix would take longer than all products with it.
        stays[cheapest] = False
        weight[cheapest], inverse[cheapest], inverse[:, cheapest] = 0, 0, 0
        yield stays.nonzero().squeeze(1), rise
