"""Calibration objectives other than the default one."""

from dataclasses import dataclass

import torch

from slicegpt.slicing import Objective


@dataclass(frozen=True)
class Unweighted(Objective):
    """Every token counts alike."""

    def token_weights(self, before: torch.Tensor, after: torch.Tensor, eps: float) -> torch.Tensor:
        return torch.ones_like(super().token_weights(before, after, eps))


@dataclass(frozen=True)
class PerColumn(Objective):
    """Every column of the activations is penalised in proportion to its own energy, not to the mean of all."""

    def penalty(self, moments, ridge: float, intercept: bool) -> torch.Tensor:
        diagonal = moments.diagonal()
        if intercept:
            diagonal = diagonal - moments.inputs.square() / moments.tokens
        return ridge * diagonal
