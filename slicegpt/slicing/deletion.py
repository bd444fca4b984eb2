"""Deleting rows of a block's output weights, and what the others make of it.

The refit of a block's output weights (`objective`) solves `H W = B`, `H = aᵀa + λ diag(g²)`. Deleting the rows `J` of
`W`, what is written from the columns `J` of the activations, forces them to 0; the others make up for it as well as
they can, and the objective rises by

    tr(W_Jᵀ (H⁻¹)_JJ⁻¹ W_J),      leaving  W - (H⁻¹)_:J (H⁻¹)_JJ⁻¹ W_J,      H⁻¹ - (H⁻¹)_:J (H⁻¹)_JJ⁻¹ (H⁻¹)_J:

(optimal brain surgeon, Hassibi and Stork 1993; for whole structures ZipLM, Kurtic et al. 2023, section 3). Which rows
are deleted together is a matter of the part: `slicegpt.slicing.neurons`, `slicegpt.slicing.heads`.
"""

import logging
from collections.abc import Callable

import torch

from slicegpt.slicing.matrices import factorise_, invert_, pseudoinverse, solve_

logger = logging.getLogger("slicegpt")

# H [K, K] and B [K, D] float64, as `Objective.normal_equations` makes them: new ones with every call.
Equations = Callable[[], tuple[torch.Tensor, torch.Tensor]]


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


class Deletion:
    """The solution of one fit, from which rows are deleted, a few at a time.

    All that is as large as H is H⁻¹, which is updated where it stands.

    Args:
        equations: of the fit; H is symmetric positive definite.

    Attributes:
        inverse: H⁻¹ [K, K] of the rows that stay; weight: W [K, D], the solution in them. What is deleted is 0 in both.
        stays: bool [K].
    """

    def __init__(self, equations: Equations):
        self.inverse, self.weight = solved(equations)
        self.stays = torch.ones(len(self.inverse), dtype=torch.bool, device=self.inverse.device)

    def kept(self) -> torch.Tensor:
        """The rows that stay, int64, ascending."""
        return self.stays.nonzero().squeeze(1)

    def rise(self, rows: slice) -> torch.Tensor:
        """By how much deleting these rows, all of which stay so far, would raise the objective: float64 []."""
        written = self.weight[rows]
        factor = torch.linalg.cholesky(self.inverse[rows, rows])
        return (written * torch.cholesky_solve(written, factor)).sum()

    def delete(self, gone: torch.Tensor) -> torch.Tensor:
        """Delete these rows, int64 [n]; returns by how much that raised the objective, float64 []."""
        inverse, weight = self.inverse, self.weight
        # Rows and columns of what goes, divided by the block that they share.
        rows, written = inverse[gone], weight[gone]
        factor = torch.linalg.cholesky(rows[:, gone])
        shares = torch.cholesky_solve(rows, factor)
        rise = (written * torch.cholesky_solve(written, factor)).sum()
        weight.addmm_(shares.mT, written, alpha=-1)
        inverse.addmm_(shares.mT, rows, alpha=-1)
        # What is gone is 0, not the rounding errors of a 0. It stays in its place: copying what remains of H⁻¹ into a
        # smaller matrix would take longer than all products with it.
        self.stays[gone] = False
        weight[gone], inverse[gone], inverse[:, gone] = 0, 0, 0
        return rise
