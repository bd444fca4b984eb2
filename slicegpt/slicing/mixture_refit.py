"""The refit of a mixture of experts: each expert's output weights, on the tokens that are routed to it.

A token t is written by several experts, `Σ_e p_e a_e W_e`, and with all weights as they are it is off by `r`, what the
block has to write less what it writes. All weights in one regression would have experts x neurons columns. With
`P = Σ_e p_e`, the shares `p_e / P` of the error add up to all of it, and by convexity

    ‖r - Σ_e p_e a_e Δ_e‖² <= Σ_e p_e P ‖r / P - a_e Δ_e‖²,

with equality before the fit, at Δ = 0. The right side is a regression for each expert alone: on its own tokens,
weighted by the router's `p_e` (and by `P`, 1 where the weights are normalised), towards what it writes plus `r / P`.
Its minimum lies no higher than the error before, whatever the experts have in common (majorise and minimise; Hunter and
Lange 2004, "A Tutorial on MM Algorithms").

The penalty λ g² is that of `slicegpt.slicing.objective`, with one g² for all experts of a layer: the mean diagonal of
their Gram matrices. What few tokens say counts less than it, and such an expert stays near its own weights; one that no
token was routed to keeps them. Biases of output layers stay as they are.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch

from slicegpt.families import Linear
from slicegpt.slicing.mixture_moments import MixtureMoments
from slicegpt.slicing.mixtures import SHARED, routed_to
from slicegpt.slicing.neurons import Equations
from slicegpt.slicing.objective import Objective
from slicegpt.slicing.refit import BlockFits, fit_block
from slicegpt.slicing.regression import prior_of


def fit_mixture(
    objective: Objective,
    moments: MixtureMoments,
    writers: Mapping[str, Linear],
    ridges: Sequence[float],
    neurons: int | None = None,
    scratch: str | os.PathLike | None = None,
    set_aside: Callable[[], None] | None = None,
) -> BlockFits:
    """As `slicegpt.slicing.refit.fit_block`, of every expert by itself; `neurons` stay in each of them.

    The shared expert keeps all of its neurons.
    """
    moments.share_scale()
    fitted: dict[float, dict[str, Linear]] = {ridge: {} for ridge in ridges}
    kept: dict[str, torch.Tensor] = {}
    before, after = 0.0, dict.fromkeys(ridges, 0.0)
    for name, writer in writers.items():
        plain = {"mlp": Linear(writer.weight)}
        own = None if name == SHARED else neurons
        fits = fit_block(objective, moments.parts[name], plain, ridges, own, scratch, set_aside)
        set_aside = None
        before += fits.before
        for ridge in ridges:
            fitted[ridge][name] = Linear(fits.writers[ridge]["mlp"].weight, writer.bias)
            share = fits.remaining[ridge]
            after[ridge] += fits.before if share is None else share * fits.before
        if fits.neurons is not None:
            kept[name] = fits.neurons
    measurable = before > 0
    remaining = {ridge: after[ridge] / before if measurable else None for ridge in ridges}
    return BlockFits(fitted, kept or None, remaining=remaining, before=before)


def mixture_equations(
    objective: Objective, moments: MixtureMoments, writers: Mapping[str, Linear], ridge: float
) -> dict[str, Equations]:
    """The normal equations of every expert that neurons are deleted from."""
    moments.share_scale()
    return {
        name: partial(
            objective.normal_equations,
            moments.parts[name],
            ridge,
            prior_of([Linear(writers[name].weight)]),
        )
        for name in routed_to([*writers])
    }
