"""An independent objective for the choice of neurons."""

import torch


def objective(system: torch.Tensor, right: torch.Tensor, kept) -> float:
    """The least of `tr(Wᵀ H W) - 2 tr(Wᵀ B)` where only the rows `kept` may differ from 0."""
    kept = torch.as_tensor(kept)
    weight = torch.linalg.solve(system[kept][:, kept], right[kept])
    return -(weight * right[kept]).sum().item()
